"""Which options of a verification apply to which of its meshes."""

import pytest

from llmos_tf import Mesh
from llmos_tf.testing.cases import cases_of

pytestmark = pytest.mark.fast

OPTIONS = {
    "zero_stage": 0,
    "sequence_parallel": False,
    "layout_map": None,
    "num_microbatches": 1,
    "schedule": "1f1b",
    "num_chunks": 1,
    "context_method": "ring",
}


def test_a_pipeline_beside_another_mesh():
    """Fails if microbatches are given to a mesh without stages, which refuses them, or are lost."""
    options = OPTIONS | {"num_microbatches": 4, "schedule": "interleaved", "num_chunks": 2}
    data, pipe = cases_of([Mesh(data=2), Mesh(pipe=2)], **options)
    assert (data.num_microbatches, data.schedule, data.num_chunks) == (None, "1f1b", 1)
    assert (pipe.num_microbatches, pipe.schedule, pipe.num_chunks) == (4, "interleaved", 2)
    assert pipe.parallelism == "pipeline interleaved"


def test_an_option_that_no_mesh_has_a_use_for():
    """Fails if an option is ignored without a word."""
    with pytest.raises(ValueError, match=r"a pipe axis, which no mesh has. Received: data=2"):
        cases_of([Mesh(data=2)], **OPTIONS | {"num_microbatches": 2})


def test_the_names_of_the_axes():
    """Fails if the table of a verification does not say what a mesh stands for."""
    (case,) = cases_of([Mesh(context=2, expert=2)], **OPTIONS | {"context_method": "ulysses"})
    assert case.parallelism == "context parallel (ulysses) + expert parallel"
