"""Layouts: what the ranks store is the tensor, cut as promised, outside and inside a program."""

import doctest
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmos_tf import collectives
from llmos_tf.mesh import AXES, Mesh
from llmos_tf.sharding import Layout
from llmos_tf.sharding import layout as layout_module
from llmos_tf.strategies import MeshStrategy

pytestmark = pytest.mark.fast

EVERYWHERE = ("data", "fsdp", "tensor")


@st.composite
def laid_out_tensors(draw):
    """Draws (shape, layout, mesh): any axes on any dimensions, the rest free for flat cuts."""
    axes = draw(st.permutations(AXES))
    mesh = Mesh(**{axis: draw(st.integers(1, 3)) for axis in axes[:4]})
    uneven = draw(st.booleans())
    dims, shape = [], []
    for axis in axes[: draw(st.integers(0, 3))]:
        cut = draw(st.booleans())
        dims.append(axis if cut else None)
        length = draw(st.integers(0, 5))
        shape.append(length * mesh.axis_size(axis) if cut and not uneven else length)
    free = [axis for axis in axes if axis not in dims]
    flat = tuple(free[: draw(st.integers(0, 3))])
    return tuple(shape), Layout(tuple(dims), flat, uneven), mesh


def numbered(shape):
    """Returns a tensor of distinct numbers, none of them zero as padding is."""
    return np.arange(1, 1 + math.prod(shape), dtype=np.float32).reshape(shape)


def cut_by_numpy(full, layout, mesh, rank):
    """What `rank` stores, as the docstring of Layout tells it."""
    where = mesh.coordinate(rank)
    part = full
    for dim, axis in enumerate(layout.dims):
        if axis is not None:
            padding = [(0, 0)] * part.ndim
            padding[dim] = (0, -part.shape[dim] % mesh.axis_size(axis))
            part = np.split(np.pad(part, padding), mesh.axis_size(axis), dim)[where[axis]]
    for axis in layout.flat:
        part = np.pad(part.ravel(), (0, -part.size % mesh.axis_size(axis)))
        part = np.split(part, mesh.axis_size(axis))[where[axis]]
    return part


# One row over two ranks: a slice has the shape of the whole.
@example(((1,), Layout(("tensor",), uneven=True), Mesh(tensor=2)))
@settings(max_examples=80, deadline=None)
@given(laid_out_tensors())
def test_the_parts_of_all_ranks_are_the_tensor(case):
    """Catches an element that is lost, doubled or moved by a cut, at any nesting of flat axes."""
    shape, layout, mesh = case
    layout.check("a/path", shape, mesh)
    full = numbered(shape)
    parts = {r: layout.part_of(tf.constant(full), mesh, r).numpy() for r in range(mesh.size)}
    for rank, part in parts.items():
        assert part.shape == layout.part_shape(shape, mesh)
        np.testing.assert_array_equal(part, cut_by_numpy(full, layout, mesh, rank))
    np.testing.assert_array_equal(layout.join(parts, shape, mesh), full)
    # One rank for each distinct part is enough.
    used = {axis for axis in (*layout.dims, *layout.flat) if axis is not None}
    few = {r: parts[r] for r in parts if not any(mesh.coordinate(r)[a] for a in {*AXES} - used)}
    assert len(few) == mesh.axis_size(used)
    np.testing.assert_array_equal(layout.join(few, shape, mesh), full)


@settings(max_examples=80, deadline=None)
@given(laid_out_tensors())
def test_no_cut_pads_by_as_much_as_its_axis(case):
    """Catches parts that are longer than the byte formulas say."""
    shape, layout, mesh = case
    for length, cut, axis in zip(shape, layout.slice_shape(shape, mesh), layout.dims, strict=True):
        ways = 1 if axis is None else mesh.axis_size(axis)
        assert 0 <= cut * ways - length < ways
        assert layout.uneven or cut * ways == length
    lengths = layout.flat_lengths(shape, mesh)
    assert lengths[0] == math.prod(layout.slice_shape(shape, mesh))
    for axis, before, after in zip(layout.flat, lengths[:-1], lengths[1:], strict=True):
        assert 0 <= after * mesh.axis_size(axis) - before < mesh.axis_size(axis)
    assert math.prod(layout.part_shape(shape, mesh)) == lengths[-1]


@settings(max_examples=80, deadline=None)
@given(laid_out_tensors())
def test_axes_of_size_one_cut_nothing(case):
    """Catches a layout that changes what a rank stores when it drops its idle axes."""
    shape, layout, mesh = case
    effective = layout.effective(mesh)
    named = [axis for axis in (*effective.dims, *effective.flat) if axis is not None]
    assert all(mesh.axis_size(axis) > 1 for axis in named)
    assert effective.is_whole == (not named)
    assert effective.uneven == layout.uneven
    assert math.prod(effective.part_shape(shape, mesh)) == math.prod(layout.part_shape(shape, mesh))
    full = numbered(shape)
    for rank in (0, mesh.size - 1):
        before = layout.part_of(tf.constant(full), mesh, rank)
        after = effective.part_of(tf.constant(full), mesh, rank)
        np.testing.assert_array_equal(np.ravel(before), np.ravel(after))


@pytest.mark.parametrize(
    ("layout", "shape", "named"),
    [
        (Layout((None, "tensor")), (4,), ["(None, 'tensor')", "(4,)"]),
        (Layout(("tensor",)), (4, 6), ["('tensor',)", "(4, 6)"]),
        (Layout(("tensor", "tensor")), (4, 4), ["('tensor', 'tensor')", "twice"]),
        (Layout(("tensor", None), ("tensor",)), (4, 4), ["('tensor', None)", "twice"]),
        (Layout(("data", "tensor")), (4, 6), ["(4, 6)", "tensor of size 4", "1 of 6"]),
    ],
)
def test_a_layout_that_does_not_fit_is_named(layout, shape, named):
    """Catches a variable that is silently replicated or cut unevenly."""
    with pytest.raises(ValueError, match="a/path") as error:
        layout.check("a/path", shape, Mesh(data=2, tensor=4))
    assert all(text in str(error.value) for text in named)


def test_a_layout_that_may_be_uneven_takes_any_length():
    """Catches a vocabulary that must be divisible although its layer said it need not."""
    Layout(("tensor",), uneven=True).check("a/path", (5,), Mesh(tensor=4))
    assert Layout(("tensor",), uneven=True).part_shape((5,), Mesh(tensor=4)) == (2,)


# --- inside a program -----------------------------------------------------------------------------

# Shapes that no axis divides among them, both flat orders, and more flat axes than elements.
CASES = [
    ((4, 6), Layout((None, None))),
    ((4, 6), Layout((None, "tensor"))),
    ((4, 6), Layout(("tensor", "fsdp"))),
    ((3, 5), Layout((None, None), ("fsdp",))),
    ((3, 5), Layout((None, None), ("fsdp", "data"))),
    ((3, 5), Layout((None, None), ("data", "fsdp", "tensor"))),
    ((4, 3), Layout(("tensor", None), ("fsdp", "data"))),
    ((5, 3), Layout(("tensor", None), ("fsdp",), uneven=True)),
    ((5, 3, 2), Layout(("tensor", "fsdp", None), uneven=True)),
    ((), Layout((), ("fsdp", "data"))),
    ((1,), Layout((None,), ("fsdp",))),
    ((1,), Layout(("tensor",), uneven=True)),
]


@pytest.fixture(scope="module")
def seen():
    """One program: for each case, every rank's parts, wholes and gradients, [ranks, ...] each."""
    strategy = MeshStrategy(Mesh(data=2, fsdp=2, tensor=2))
    mesh = strategy.mesh

    def of_every_rank(x):
        return collectives.all_gather(x[tf.newaxis], EVERYWHERE)

    def one(index, shape, layout):
        full = tf.constant(numbered(shape))
        rank = collectives.axis_index(EVERYWHERE)
        part = layout.part_from_full(full, mesh)
        # Another upstream gradient on every rank.
        upstream = tf.constant(upstreams(index, mesh.size))[rank]
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(part)
            cut = layout.slice_from_part(part, shape, mesh)
            whole = layout.full_from_part(part, shape, mesh)
        nested = layout.part_from_full(full, mesh)
        if len(layout.flat) > 1:
            nested = Layout(layout.dims, layout.flat[:1], layout.uneven).part_from_full(full, mesh)
            nested = Layout.cut_flat(nested, layout.flat[1:], mesh)
        return {
            "part": part,
            "slice": cut,
            "whole": whole,
            "nested": nested,
            "gradient": tape.gradient(whole, part, upstream),
        }

    def program():
        results = [one(index, *case) for index, case in enumerate(CASES)]
        for (shape, layout), result in zip(CASES, results, strict=True):
            assert result["part"].shape == layout.part_shape(shape, mesh)
            assert result["slice"].shape == layout.slice_shape(shape, mesh)
            assert result["whole"].shape == shape
        return tf.nest.map_structure(of_every_rank, results)

    results = strategy.run(program)
    one_of = strategy.experimental_local_results
    return mesh, tf.nest.map_structure(lambda value: one_of(value)[0].numpy(), results)


def upstreams(index, ranks):
    """Small whole numbers, whose sums are exact, another gradient for each rank."""
    shape = (ranks, *CASES[index][0])
    return np.random.default_rng(index).integers(-9, 9, shape).astype(np.float32)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_a_program_cuts_and_gathers_as_the_arithmetic_does(seen, index):
    """Catches a rank that keeps or gathers other elements in a program than outside of it."""
    mesh, results = seen
    shape, layout = CASES[index]
    full = numbered(shape)
    sliced = Layout(layout.dims, (), layout.uneven)
    for rank in range(mesh.size):
        result = {name: value[rank] for name, value in results[index].items()}
        part = layout.part_of(tf.constant(full), mesh, rank)
        np.testing.assert_array_equal(result["part"], part)
        np.testing.assert_array_equal(result["nested"], part)
        np.testing.assert_array_equal(result["slice"], sliced.part_of(full, mesh, rank))
        np.testing.assert_array_equal(result["whole"], full)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_the_gradient_of_the_whole_goes_to_the_parts(seen, index):
    """Catches a gather whose gradient is not summed along flat axes, or is along dimensions' axes.

    Along flat axes ranks compute with other rows of the batch, so their gradients add up. Along the
    axes of dimensions they compute the same, so each keeps its own slice.
    """
    mesh, results = seen
    _, layout = CASES[index]
    given_upstreams = upstreams(index, mesh.size)
    for rank in range(mesh.size):
        members = list(mesh.group(rank, layout.flat))
        total = given_upstreams[members].sum(0)
        expected = cut_by_numpy(total, layout, mesh, rank)
        np.testing.assert_array_equal(results[index]["gradient"][rank], expected)


def test_examples():
    """Catches a docstring that no longer says what happens."""
    results = doctest.testmod(layout_module, extraglobs={"Mesh": Mesh})
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize(
    "layout",
    [
        Layout((None, None), ("fsdp",)),
        Layout(("tensor", None)),
        Layout(("tensor", None), ("fsdp",)),
    ],
)
def test_a_part_is_no_view_of_the_whole(layout):
    """Fails if a part shares the memory of the full tensor, which then lives as long as it."""
    mesh = Mesh(fsdp=2, tensor=2)
    full = tf.random.normal([64, 64])
    part = layout.part_of(full, mesh, 0)
    assert not np.shares_memory(np.asarray(memoryview(full)), np.asarray(memoryview(part)))
