"""The options of a strategy fit its mesh, or it says which one does not and what would."""

import pytest

from llmos_tf import Mesh
from llmos_tf.strategies import MeshStrategy

pytestmark = pytest.mark.fast

PIPE4 = Mesh(pipe=4)


@pytest.mark.parametrize(
    ("mesh", "options", "message"),
    [
        (Mesh(data=2), {"zero_stage": 4}, r"0, 1, 2 or 3\. Received: 4"),
        (Mesh(fsdp=2), {"zero_stage": 1}, r"along the data axis, which has size 1 in the mesh fsd"),
        (Mesh(data=2), {"zero_stage": 3}, r"Mesh\(fsdp="),
        (Mesh(data=2), {"sequence_parallel": True}, "over the tensor axis, which has size 1"),
        (Mesh(context=2), {"context_method": "all"}, r"ring or ulysses\. Received: 'all'"),
        (Mesh(data=2), {"num_microbatches": 2}, "num_microbatches=2 is for a pipeline"),
        (Mesh(data=2), {"num_chunks": 2}, "num_chunks=2 is for a pipeline"),
        (Mesh(data=2), {"stage_of": {"a": 1}}, "leave stage_of out"),
        (Mesh(data=2), {"bucket_bytes": 0}, r"bucket_bytes is a positive integer.* Received: 0"),
        (Mesh(data=2), {"gradient_compression": "int4"}, r"int8 or powersgd\. Received: 'int4'"),
        (Mesh(data=2), {"powersgd_rank": 2}, "Received: gradient_compression=None"),
        (Mesh(fsdp=2), {"gradient_compression": "bf16"}, "take a data axis, or the dtype policy"),
        (
            Mesh(data=2, fsdp=2),
            {"gradient_compression": "powersgd"},
            "Take 'int8', or no fsdp axis",
        ),
        (
            Mesh(data=2),
            {"gradient_compression": "powersgd", "zero_stage": 1},
            "Take 'int8', or zero_stage=0",
        ),
        (Mesh(data=2), {"offload": "weights"}, r"which is the same\. Received: 'weights'"),
        (Mesh(data=2), {"offload": ("all",)}, r"a tuple of both, .* Received: \('all',\)"),
        (Mesh(data=2), {"offload": True}, r"Received: True"),
        (Mesh(data=2), {"host_device": "CPU:0"}, "Add offload='optimizer', or leave it out"),
        (Mesh(data=2), {"offload": "all", "host_device": "CPU:99"}, "no device 'CPU:99'"),
        (PIPE4, {"offload": "all"}, "Take offload='optimizer', or fsdp in place of pipe"),
        (PIPE4, {"schedule": "dualpipe"}, r"gpipe, 1f1b, .*\. Received: 'dualpipe'"),
        (PIPE4, {"num_microbatches": 3}, r"num_microbatches=3 .* pipe=4\. Take 4 or more"),
        (PIPE4, {"num_microbatches": 1, "schedule": "zb-h1"}, "'gpipe', which takes any number"),
        (PIPE4, {"num_microbatches": 0, "schedule": "gpipe"}, "num_microbatches=0"),
        (
            PIPE4,
            {"num_microbatches": 6, "schedule": "interleaved", "num_chunks": 2},
            "6, which is not a multiple of num_stages=4",
        ),
    ],
)
def test_what_does_not_fit(mesh, options, message):
    """Fails if an option is taken that the mesh cannot follow, or the message lacks a way out."""
    with pytest.raises(ValueError, match=message):
        MeshStrategy(mesh, **options)


@pytest.mark.parametrize(
    ("mesh", "options", "expected"),
    [
        (Mesh(data=2), {}, 1),
        (PIPE4, {}, 4),
        (PIPE4, {"num_microbatches": 6}, 6),
        (PIPE4, {"num_microbatches": 2, "schedule": "gpipe"}, 2),
    ],
)
def test_number_of_microbatches(mesh, options, expected):
    """Fails if what is left out is no number that the schedule takes."""
    assert MeshStrategy(mesh, **options).extended.options.num_microbatches == expected
