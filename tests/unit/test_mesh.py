"""The mesh: ranks, coordinates and groups fit together, and errors say what was received."""

import doctest
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_tf import mesh as mesh_module
from llmos_tf.mesh import AXES, BATCH_AXES, Mesh

pytestmark = pytest.mark.fast

SIZES = st.fixed_dictionaries({axis: st.integers(1, 4) for axis in AXES}).filter(
    lambda sizes: math.prod(sizes.values()) <= 96
)
MESHES = SIZES.map(lambda sizes: Mesh(**sizes))
AXIS_SETS = st.lists(st.sampled_from(AXES), max_size=4)


@settings(max_examples=60, deadline=None)
@given(MESHES)
def test_rank_and_coordinate_are_inverse(mesh):
    """Catches an axis left out of, or in another order in, one of the two directions."""
    seen = set()
    for rank in range(mesh.size):
        where = mesh.coordinate(rank)
        assert tuple(where) == AXES
        assert all(0 <= where[axis] < mesh.sizes[axis] for axis in AXES)
        assert mesh.rank(**where) == rank
        assert mesh.rank(**{axis: index for axis, index in where.items() if index}) == rank
        assert mesh.coordinates()[rank].tolist() == list(where.values())
        seen.add(tuple(where.values()))
    assert len(seen) == mesh.size == math.prod(mesh.sizes.values())
    assert mesh.coordinates().dtype == np.int32


@settings(max_examples=60, deadline=None)
@given(MESHES, AXIS_SETS)
def test_groups_partition_the_ranks(mesh, axes):
    """Catches a group that misses a rank, holds one twice, or mixes ranks of another axis."""
    groups = mesh.groups(axes)
    assert sorted(itertools.chain(*groups)) == list(range(mesh.size))
    assert {len(group) for group in groups} == {mesh.axis_size(axes)}
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    others = [axis for axis in AXES if axis not in axes]
    for group in groups:
        for rank in group:
            assert mesh.group(rank, axes) == group
        places = [mesh.coordinate(rank) for rank in group]
        assert len({tuple(place[axis] for axis in others) for place in places}) == 1


@settings(max_examples=60, deadline=None)
@given(MESHES, AXIS_SETS)
def test_the_order_in_a_group_is_index_along(mesh, axes):
    """Catches a group order that differs from the order in which collectives lay out parts."""
    for group in mesh.groups(axes):
        assert [mesh.index_along(rank, axes) for rank in group] == list(range(len(group)))
    # The order in which the caller names the axes does not matter, nor that one is named twice.
    rank = mesh.size - 1
    assert mesh.index_along(rank, [*reversed(axes), *axes]) == mesh.index_along(rank, axes)
    assert mesh.group(rank, [*reversed(axes), *axes]) == mesh.group(rank, axes)
    assert mesh.axis_size([*axes, *axes]) == math.prod(mesh.sizes[axis] for axis in set(axes))


@settings(max_examples=60, deadline=None)
@given(MESHES)
def test_neighbours_on_tensor_are_neighbours_on_the_devices(mesh):
    """Catches an order of axes in which the groups that talk most are spread over the machines."""
    assert AXES == ("pipe", "data", "fsdp", "expert", "context", "tensor")
    for group in mesh.groups("tensor"):
        assert group == tuple(range(group[0], group[0] + len(group)))
    # Stages are contiguous blocks of the device list, the outermost cut.
    block = mesh.size // mesh.axis_size("pipe")
    for rank in range(mesh.size):
        assert mesh.coordinate(rank)["pipe"] == rank // block


def test_a_mesh_in_numbers():
    """Catches two axes exchanged in the arithmetic, written out for one mesh by hand."""
    mesh = Mesh(data=2, fsdp=3, tensor=4)
    assert (mesh.size, mesh.batch_ways) == (24, 6)
    assert mesh.rank(data=1, fsdp=2, tensor=3) == 23
    assert mesh.rank(data=1, fsdp=0, tensor=2) == 14
    assert mesh.group(14, "data") == (2, 14)
    assert mesh.group(14, "fsdp") == (14, 18, 22)
    assert mesh.group(14, "tensor") == (12, 13, 14, 15)
    assert mesh.group(14, BATCH_AXES) == (2, 6, 10, 14, 18, 22)
    assert mesh.index_along(14, BATCH_AXES) == 3
    assert mesh.group(14, "pipe") == (14,)
    assert mesh.groups("data")[1] == (1, 13)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.randoms())
def test_a_mesh_is_read_back_from_what_it_prints(sizes, random):
    """Catches a printed mesh that the flag --mesh would not take, that of one device too."""
    mesh = Mesh(**sizes)
    assert Mesh.from_string(str(mesh)) == mesh
    assert eval(repr(mesh), {"Mesh": Mesh}) == mesh
    items = [f" {axis} = {size} " for axis, size in sizes.items()]
    random.shuffle(items)
    assert Mesh.from_string(",".join(items)) == mesh


@pytest.mark.parametrize("text", ["", " ", "1", ",", "data=1"])
def test_one_device_as_text(text):
    """Catches a spelling of a single device that is refused."""
    assert Mesh.from_string(text) == Mesh()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model=2", "'model=2'"),
        ("data=2,data=2", "'data=2,data=2'"),
        ("data=two", "'data=two'"),
        ("data=-1", "'data=-1'"),
        ("data=2.0", "'data=2.0'"),
        ("data", "'data'"),
        ("data=", "'data='"),
        ("2", "'2'"),
        ("tensor=2 data=2", "'tensor=2 data=2'"),
        ("data=0", "data=0"),
    ],
)
def test_text_that_is_no_mesh_is_named(text, named):
    """Catches text that is taken half, or an error that leaves the reader to guess."""
    with pytest.raises(ValueError, match="Received") as error:
        Mesh.from_string(text)
    assert named in str(error.value)


@pytest.mark.parametrize("size", [0, -1, 2.0, "2", True, None])
def test_a_size_that_is_no_positive_integer_is_named(size):
    """Catches a size that is taken as something else, as True is taken for 1."""
    for axis in AXES:
        with pytest.raises(ValueError, match="positive integer") as error:
            Mesh(**{axis: size})
        assert f"Received: {axis}={size!r}" in str(error.value)


def test_an_unknown_axis_names_those_that_exist():
    """Catches an error that leaves the reader to guess what tp is called here."""
    with pytest.raises(TypeError, match=f"axes of a mesh are {', '.join(AXES)}") as error:
        Mesh(tp=2, data=2, dp=4, size=3)
    assert "Received: tp=2, dp=4, size=3." in str(error.value)
    assert "Did you mean Mesh(tensor=2, data=4)?" in str(error.value)
    with pytest.raises(TypeError, match=r"Received: rows=2\.$"):
        Mesh(rows=2)


def test_numpy_integers_are_sizes():
    """Catches a mesh that refuses what np.prod returns, or keeps it and prints it oddly."""
    mesh = Mesh(data=np.int64(2))
    assert type(mesh.sizes["data"]) is int
    assert str(mesh) == "data=2"


def test_wrong_devices_are_named():
    """Catches devices that are dropped, invented or used twice without a word."""
    with pytest.raises(ValueError, match=r"data=2 needs 2 devices.*\['CPU:0'\] \(1 of them\)"):
        Mesh(data=2, devices=["CPU:0"])
    with pytest.raises(ValueError, match=r"only once.*\['CPU:0', 'CPU:0'\]"):
        Mesh(data=2, devices=["CPU:0", "CPU:0"])
    with pytest.raises(ValueError, match=r"needs 2 devices.*\(3 of them\)"):
        Mesh(data=2).with_devices(["a", "b", "c"])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda mesh: mesh.axis_size("model"), "'model'"),
        (lambda mesh: mesh.axis_size(("data", "model")), "'model'"),
        (lambda mesh: mesh.group(0, "model"), "'model'"),
        (lambda mesh: mesh.index_along(0, "batch"), "'batch'"),
        (lambda mesh: mesh.rank(model=0), "'model'"),
        (lambda mesh: mesh.rank(data=2), "data=2"),
        (lambda mesh: mesh.rank(pipe=1), "pipe=1"),
        (lambda mesh: mesh.rank(tensor=-1), "tensor=-1"),
        (lambda mesh: mesh.coordinate(4), "Received: 4"),
        (lambda mesh: mesh.coordinate(-1), "Received: -1"),
        (lambda mesh: mesh.index_along(4, "data"), "Received: 4"),
        (lambda mesh: mesh.group(4, "data"), "Received: 4"),
        (lambda mesh: mesh.group(-1, "data"), "Received: -1"),
    ],
)
def test_a_place_outside_the_mesh_is_named(call, named):
    """Catches a rank or axis that wraps around or is ignored."""
    with pytest.raises(ValueError, match="Received") as error:
        call(Mesh(data=2, tensor=2))
    assert named in str(error.value)


def test_meshes_are_values():
    """Catches a mesh that cannot be a key, or is equal to one over other devices."""
    mesh = Mesh(data=2)
    over = mesh.with_devices(["CPU:0", "CPU:1"])
    assert over.devices == ("CPU:0", "CPU:1")
    assert mesh.devices is None
    assert over.sizes == mesh.sizes
    assert eval(repr(over), {"Mesh": Mesh}) == over
    assert len({mesh, Mesh(data=2), over, Mesh(tensor=2), Mesh(data=2, tensor=1)}) == 3
    assert mesh != over.with_devices(["CPU:1", "CPU:0"])
    assert over != over.with_devices(["CPU:1", "CPU:0"])
    assert mesh != "data=2"
    # The sizes that it hands out are the reader's own.
    dict.update(mesh.sizes, data=9)
    assert mesh.size == 2


def test_examples():
    """Catches a docstring that no longer says what happens."""
    results = doctest.testmod(mesh_module)
    assert results.attempted > 0
    assert results.failed == 0
