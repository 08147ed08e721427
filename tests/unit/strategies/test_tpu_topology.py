"""Where ranks lie on chips: every core once, tensor groups as boxes and rings, by hosts."""

import doctest
import itertools
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_tf.mesh import AXES, BATCH_AXES, Mesh
from llmos_tf.strategies import tpu_topology
from llmos_tf.strategies.tpu import device_assignment
from llmos_tf.strategies.tpu_topology import CORE_AXES, core_coordinates

pytestmark = pytest.mark.fast

V3_8 = (2, 2, 1, 2)
V3_32 = (4, 4, 1, 2)
V4_16 = (2, 2, 4, 1)
V4_64 = (4, 4, 4, 1)


def topology_of(shape, missing=()):
    """A slice whose hosts have 2 by 2 chips each, as those of TPU v2 to v4."""
    corners = itertools.product(range(0, shape[2]), range(0, shape[1], 2), range(0, shape[0], 2))
    hosts = [
        [
            (x + dx, y + dy, z, core)
            for dy in range(min(2, shape[1]))
            for dx in range(min(2, shape[0]))
            for core in range(shape[3])
        ]
        for z, y, x in corners
    ]
    hosts = [[core for core in host if core not in missing] for host in hosts]
    return tf.tpu.experimental.Topology(
        mesh_shape=shape, device_coordinates=np.array([host for host in hosts if host])
    )


def hops(a, b):
    """Links between the chips of two cores, without links from end to end."""
    return int(np.abs(np.asarray(a)[:3] - np.asarray(b)[:3]).sum())


def extent(cores):
    """Number of cores of the smallest box around `cores`."""
    cores = cores.reshape(-1, 4)
    return math.prod((cores.max(axis=0) - cores.min(axis=0) + 1).tolist())


SMALL = st.integers(1, 4)
POWERS = st.sampled_from([1, 2, 4, 8])


@st.composite
def placements(draw, numbers=SMALL):
    """A topology and a mesh that is not larger."""
    shape = (draw(numbers), draw(numbers), draw(numbers), draw(st.integers(1, 2)))
    sizes, room = {}, math.prod(shape)
    for axis in draw(st.permutations(AXES)):
        sizes[axis] = draw(numbers.filter(lambda size, room=room: size <= room))
        room //= sizes[axis]
    return Mesh(**sizes), shape


@settings(max_examples=150, deadline=None)
@given(placements(), st.integers(0, 3), st.randoms())
def test_every_core_is_used_at_most_once(case, num_missing, random):
    """Catches boxes that overlap, stick out of the topology, or take a core that is missing."""
    mesh, shape = case
    every = list(itertools.product(*map(range, shape)))
    spare = min(num_missing, len(every) - mesh.size)
    for missing in ([], random.sample(every, spare)):
        cores = core_coordinates(mesh, shape, missing)
        assert cores.dtype == np.int32
        assert cores.shape == (mesh.batch_ways, mesh.size // mesh.batch_ways, 4)
        used = {tuple(core) for core in cores.reshape(-1, 4).tolist()}
        assert len(used) == mesh.size
        assert used <= set(every) - set(missing)


@settings(max_examples=150, deadline=None)
@given(placements())
def test_tensor_neighbours_are_one_hop_apart(case):
    """Catches a walk that jumps: from row end to row start, or out of a box and back."""
    mesh, shape = case
    cores = core_coordinates(mesh, shape).reshape(-1, mesh.axis_size("tensor"), 4)
    for group in cores:
        assert all(hops(a, b) <= 1 for a, b in itertools.pairwise(group))


@settings(max_examples=150, deadline=None)
@given(placements(POWERS))
def test_powers_of_two_make_boxes_and_rings(case):
    """Catches groups that are spread out, or open where the last rank could end by the first."""
    mesh, shape = case
    cores = core_coordinates(mesh, shape)
    inside = 1
    for axis in ("tensor", "context", "expert", "pipe"):
        inside *= mesh.axis_size(axis)
        assert all(extent(group) == inside for group in cores.reshape(-1, inside, 4))
    ring = sum(side > 1 for side in shape[:3]) > 1 or mesh.axis_size("tensor") <= 2 * shape[3]
    if ring:
        for group in cores.reshape(-1, mesh.axis_size("tensor"), 4):
            assert hops(group[0], group[-1]) <= 1
    # One step on the context axis moves the whole box by one of its own sides, or by a core.
    groups = cores.reshape(-1, mesh.axis_size("context"), mesh.axis_size("tensor"), 4)[..., :3]
    sides = np.ptp(groups[0, 0], axis=0) + 1
    for a, b in itertools.pairwise(groups.swapaxes(0, 1)):
        moves = {tuple(move) for move in np.abs(b - a).reshape(-1, 3).tolist()}
        assert moves <= {(0, 0, 0), *map(tuple, np.diag(sides).tolist())}


@settings(max_examples=40, deadline=None)
@given(placements())
def test_a_placement_is_the_same_every_time(case):
    """Catches an order that rests on a set, on hashes or on what was placed before."""
    mesh, shape = case
    first = core_coordinates(mesh, shape)
    tpu_topology._box_factors.cache_clear()
    np.testing.assert_array_equal(core_coordinates(mesh, shape), first)
    np.testing.assert_array_equal(core_coordinates(mesh, np.array(shape, np.int32)), first)


def test_axes_are_replicas_or_cores():
    """Catches an axis that is counted twice, or by neither."""
    assert sorted((*CORE_AXES, *BATCH_AXES)) == sorted(AXES)
    assert CORE_AXES == ("pipe", "expert", "context", "tensor")


def test_eight_cores_of_a_v3_board():
    """Catches cores of a chip that are split over groups while a chip's width is free."""
    assignment = device_assignment(Mesh(data=2, tensor=4), topology_of(V3_8))
    assert (assignment.num_replicas, assignment.num_cores_per_replica) == (2, 4)
    assert assignment.core_assignment.tolist() == [
        [[0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [1, 0, 0, 1]],
        [[0, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 0], [1, 1, 0, 1]],
    ]
    assert assignment.coordinates(1, 2) == (1, 1, 0, 0)
    ring = device_assignment(Mesh(tensor=8), topology_of(V3_8)).core_assignment[0]
    assert ring[::2, :3].tolist() == [[0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0]]
    pairs = device_assignment(Mesh(data=4, tensor=2), topology_of(V3_8)).core_assignment
    assert (pairs[:, 0, :3] == pairs[:, 1, :3]).all()
    assert pairs[3].tolist() == [[1, 0, 0, 0], [1, 0, 0, 1]]


def test_thirty_two_cores_of_a_v3_slice():
    """Catches a tensor group of 8 that is not a square of chips, or context groups torn apart."""
    assignment = device_assignment(Mesh(data=4, tensor=8), topology_of(V3_32))
    squares = assignment.core_assignment[:, ::2, :2].tolist()
    assert squares == [
        [[x, y], [x, y + 1], [x + 1, y + 1], [x + 1, y]]
        for x, y in [(0, 0), (0, 2), (2, 2), (2, 0)]
    ]
    # The same squares as replicas, each of two context ranks of two chips.
    assignment = device_assignment(Mesh(data=4, context=2, tensor=4), topology_of(V3_32))
    halves = assignment.core_assignment[0, ::2, :2].tolist()
    assert halves == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert [
        sorted(map(tuple, replica[::2, :2].tolist())) for replica in assignment.core_assignment
    ] == [sorted(map(tuple, square)) for square in squares]


def test_cubes_of_a_v4_slice():
    """Catches a third dimension that is left out: groups of 8 chips as 4 by 2, not as cubes."""
    assignment = device_assignment(Mesh(data=2, tensor=8), topology_of(V4_16))
    assert assignment.core_assignment.tolist() == [
        [[0, 0, z, 0], [0, 0, z + 1, 0], [0, 1, z + 1, 0], [0, 1, z, 0],
         [1, 1, z, 0], [1, 1, z + 1, 0], [1, 0, z + 1, 0], [1, 0, z, 0]]
        for z in (0, 2)
    ]  # fmt: skip
    cores = device_assignment(Mesh(data=2, context=4, tensor=8), topology_of(V4_64)).core_assignment
    assert cores.shape == (2, 32, 4)
    for group in cores.reshape(8, 8, 4):
        assert (np.ptp(group, axis=0) == (1, 1, 1, 0)).all()
        assert hops(group[0], group[-1]) == 1
    # The context ring: four cubes around a square, so the last is beside the first.
    cubes = cores.reshape(2, 4, 8, 4)[0, :, 0, :3].tolist()
    assert cubes == [[0, 0, 0], [0, 2, 0], [2, 2, 0], [2, 0, 0]]


def test_the_longest_ring_of_a_v4_slice():
    """Catches a ring through 64 chips that breaks between layers or does not come back."""
    (walk,) = device_assignment(Mesh(tensor=64), topology_of(V4_64)).core_assignment
    assert len({tuple(core) for core in walk.tolist()}) == 64
    assert all(hops(walk[i - 1], walk[i]) == 1 for i in range(64))


def test_replicas_come_host_by_host():
    """Catches the order of the walk kept for replicas, which takes rows to another host."""
    topology = topology_of(V3_32)
    for mesh in (Mesh(data=32), Mesh(data=4, fsdp=2, tensor=4), Mesh(data=16, tensor=2)):
        assignment = device_assignment(mesh, topology)
        hosts = [
            topology.task_ordinal_at_coordinates(assignment.coordinates(replica, 0))
            for replica in range(mesh.batch_ways)
        ]
        assert len([host for host, _ in itertools.groupby(hosts)]) == len(set(hosts)) == 4
        placed = {tuple(map(tuple, replica)) for replica in assignment.core_assignment.tolist()}
        walked = {tuple(map(tuple, r)) for r in core_coordinates(mesh, V3_32).tolist()}
        assert placed == walked


def test_a_shape_that_boxes_cannot_fill_is_one_snake():
    """Catches a refusal, or a jump, where 5 groups of 3 lie on 4 by 4 chips."""
    cores = core_coordinates(Mesh(data=5, tensor=3), (4, 4, 1, 1)).reshape(15, 4)
    assert all(hops(a, b) == 1 for a, b in itertools.pairwise(cores))
    assert core_coordinates(Mesh(tensor=3), (2, 2, 1, 1))[0, :, :2].tolist() == [
        [0, 0],
        [0, 1],
        [1, 1],
    ]


def test_a_slice_with_a_missing_host_is_used_without_it():
    """Catches missing devices that are handed out: TensorFlow names them task -1."""
    gone = {(x, y, 0, core) for x in (2, 3) for y in (0, 1) for core in (0, 1)}
    topology = topology_of(V3_32, missing=gone)
    assignment = device_assignment(Mesh(data=6, tensor=4), topology)
    assert not gone & {tuple(core) for core in assignment.core_assignment.reshape(-1, 4).tolist()}
    names = {assignment.tpu_device(r, c) for r in range(6) for c in range(4)}
    assert len(names) == 24
    assert not any("-1" in name for name in names)
    with pytest.raises(ValueError, match=r"data=8,tensor=4 needs 32.*8 of them missing: 24 cores"):
        device_assignment(Mesh(data=8, tensor=4), topology)


def test_a_small_mesh_leaves_cores_idle():
    """Catches a smaller mesh that is refused, or spread over all of the slice."""
    assignment = device_assignment(Mesh(data=2, tensor=4), topology_of(V3_32))
    assert extent(assignment.core_assignment) == 8


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        (
            Mesh(data=8, tensor=2),
            "data=8,tensor=2 needs 16 cores.*2 x 2 x 1.*2 cores.*fits: data=4",
        ),
        (Mesh(tensor=16), r"needs 16 cores.*8 cores\. What fits: a product of at most 8"),
        (Mesh(data=2, devices=["CPU:0", "CPU:1"]), r"devices=\['CPU:0', 'CPU:1'\].*Leave devices"),
        ("data=8", "Received: 'data=8'"),
    ],
)
def test_a_mesh_that_does_not_fit_is_named(mesh, said):
    """Catches a mesh that is cut down or placed twice, and an error without a way out."""
    with pytest.raises(ValueError, match=said):
        device_assignment(mesh, topology_of(V3_8))


def test_a_topology_that_is_none_is_named():
    """Catches an AttributeError from deep inside for a shape given in place of a topology."""
    with pytest.raises(ValueError, match=r"initialize_tpu_system.*Received: \(2, 2, 1, 2\)"):
        device_assignment(Mesh(data=8), V3_8)


def test_examples():
    """Catches a docstring that no longer says what happens."""
    results = doctest.testmod(tpu_topology)
    assert results.attempted > 0
    assert results.failed == 0
