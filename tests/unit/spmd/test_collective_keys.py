"""Collective keys: groups that TensorFlow must tell apart have different ones."""

import itertools

import pytest

from llmos_tf import Mesh
from llmos_tf.mesh import AXES
from llmos_tf.spmd.collective_keys import CollectiveKeys

pytestmark = pytest.mark.fast

MESHES = [Mesh(data=8), Mesh(data=2, tensor=2), Mesh(pipe=2, data=2, tensor=2), Mesh()]


def groups_of(mesh):
    """Every group of ranks along every set of axes, as its members."""
    split = [axis for axis in AXES if mesh.axis_size(axis) > 1]
    for length in range(len(split) + 1):
        for axes in itertools.combinations(split, length):
            members = {}
            for rank, where in enumerate(mesh.coordinates()):
                others = tuple(w for axis, w in zip(AXES, where, strict=True) if axis not in axes)
                members.setdefault(others, []).append(rank)
            yield axes, list(members.values())


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_group_has_one_key_for_gradients_and_one_for_all_else(mesh):
    """Fails if two groups share a key, if the ranks of one have different keys, or if sums of
    gradients, which run in an order of their own, share the key of what the passes send."""
    keys, owners = CollectiveKeys(mesh), {}
    for axes, groups in groups_of(mesh):
        for reduces_gradients in (False, True):
            base, strides = keys.group_strides(axes, reduces_gradients)
            for ranks in groups:
                (key,) = {
                    base + sum(int(w) * s for w, s in zip(where, strides, strict=True))
                    for where in mesh.coordinates()[ranks]
                }
                owner = (tuple(ranks), axes, reduces_gradients)
                assert owners.setdefault(key, owner) == owner
    edges = [keys.edge_keys((axis,), shift) for axis in ("data", "tensor") for shift in (1, -1)]
    taken = [first + rank for first in edges for rank in range(mesh.size)]
    assert len(set(taken)) == len(taken)
    assert owners.keys().isdisjoint(taken)
