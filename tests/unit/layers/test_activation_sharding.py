"""How a batch is split over ranks that have the same rows, and put together again."""

import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import Mesh, collectives
from llmos_tf.layers import Dropout, stream_positions
from llmos_tf.layers.activation_sharding import Stream, current_stream, entered, open_stream
from llmos_tf.spmd.program import current_program
from llmos_tf.strategies import MeshStrategy

pytestmark = pytest.mark.fast

ALL = ("data", "fsdp", "expert", "context", "tensor")


def on_ranks(strategy, program):
    """What each rank of the mesh has, by its coordinate on the axes that are more than 1."""

    def gathering():
        return collectives.all_gather(program()[tf.newaxis], ALL)

    result = tf.function(lambda: strategy.run(gathering), autograph=False)()
    result = result.values[0] if hasattr(result, "values") else result
    sizes = [size for size in strategy.mesh.sizes.values() if size > 1]
    return result.numpy().reshape(*sizes, *result.shape[1:])


def opened(shape):
    return open_stream((), tf.TensorShape(shape))


def test_zigzag_gives_each_rank_an_early_and_a_late_piece():
    """Fails for another order of the pieces, or positions that are not those of the entries."""

    def program():
        stream = opened((2, 8))
        tokens = tf.tile(tf.range(8)[tf.newaxis], [2, 1])
        return tf.concat([stream.enter(tokens), stream.positions(4)[tf.newaxis]], 0)

    held = on_ranks(MeshStrategy(Mesh(context=2)), program)
    assert (held[0] == [0, 1, 6, 7]).all()
    assert (held[1] == [2, 3, 4, 5]).all()


def test_ulysses_places_contiguously():
    """Fails if the placement does not follow the method."""
    strategy = MeshStrategy(Mesh(context=2), context_method="ulysses")
    held = on_ranks(strategy, lambda: opened((1, 6)).positions(3))
    assert held.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("shape", "row_axes", "position_axes"),
    [
        ((4, 8), ("expert",), ("context",)),
        ((None, 8), (), ("expert", "context")),
        ((3, 8), (), ("expert", "context")),
        # 2 · 2 · 2 does not divide 12.
        ((3, 12), (), ("context",)),
    ],
)
def test_expert_splits_rows_else_positions_else_nothing(shape, row_axes, position_axes):
    """Fails if rows are split that cannot be, or ranks compute the same without need."""
    found = []

    def program():
        stream = opened(shape)
        found.append((stream.row_axes, stream.position_axes))

    MeshStrategy(Mesh(expert=2, context=2)).run(program)
    assert found == [(row_axes, position_axes)]


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_leaving_undoes_entering_forward_and_backward(method, rows):
    """Fails if parts are put together in another order, or a cotangent reaches another entry."""
    strategy = MeshStrategy(Mesh(expert=2, context=2), context_method=method)
    rng = np.random.default_rng(0)
    x, cotangent = (tf.constant(rng.normal(size=(rows, 8, 3))) for _ in range(2))

    def program():
        stream = opened((rows, 8))
        with tf.GradientTape() as tape:
            tape.watch(x)
            part = stream.enter(x)
            y = stream.leave(part)
        assert part.shape.num_elements() == x.shape.num_elements() // 4
        return tf.stack([y, tape.gradient(y, x, output_gradients=cotangent)])

    held = on_ranks(strategy, program)
    assert (held == np.stack([x, cotangent])).all()


def test_sequence_parallelism_splits_a_rank_s_positions_once_more():
    """Fails if positions between blocks are counted as if those of a rank were in order."""
    strategy = MeshStrategy(
        Mesh(context=2, tensor=2),
        sequence_parallel=True,
        layout_map={"kernel": (None, "tensor")},
    )

    def program():
        with entered(opened((1, 8))):
            return stream_positions(2)

    held = on_ranks(strategy, program)
    assert held.tolist() == [[[0, 1], [6, 7]], [[2, 3], [4, 5]]]


def test_without_axes_nothing_is_split():
    """Fails if one device, or a mesh of other axes, has a stream to care for."""
    x = tf.reshape(tf.range(6), [2, 3])
    stream = opened((2, 3))
    with entered(stream):
        assert current_stream() is None
        assert (stream.leave(stream.enter(x)) == x).numpy().all()
        assert stream_positions(3).numpy().tolist() == [0, 1, 2]

    def program():
        with entered(opened((2, 3))):
            assert current_stream() is None

    MeshStrategy(Mesh(data=2)).run(program)


def test_masks_differ_where_the_stream_is_split():
    """Fails if ranks drop the same entries of the different positions that they hold, in the stream
    only, or different ones where they hold the same."""
    strategy = MeshStrategy(Mesh(context=2, tensor=2), layout_map={"kernel": (None, "tensor")})
    with strategy.scope():
        layer = Dropout(0.5, seed=1)

    def program():
        ones = tf.ones([20, 20])
        with entered(opened((1, 8))):
            within = layer(ones, training=True)
        return tf.stack([within, layer(ones, training=True)])

    within, outside = np.moveaxis(on_ranks(strategy, program), 2, 0)
    assert (within[0, 0] != within[1, 0]).any()
    assert (within[:, 0] == within[:, 1]).all()
    assert (outside == outside[0, 0]).all()


@pytest.mark.parametrize(
    ("mesh", "options", "length", "words"),
    [
        (Mesh(context=4), {}, 12, "context=4, context_method='ring'.* of 8.*12. 16 would"),
        (
            Mesh(context=4),
            {"context_method": "ulysses"},
            10,
            "of 4. Received: 10. 8 would",
        ),
        (Mesh(context=4), {}, 2, "multiple of 8. Received: 2. 8 would"),
        (
            Mesh(context=2, tensor=4),
            {"sequence_parallel": True, "layout_map": {"kernel": ("tensor",)}},
            20,
            "and sequence_parallel=True, .* multiple of 8. Received: 20. 16 would",
        ),
        (Mesh(context=2), {}, None, "not known when the step is traced.* multiple of 4"),
    ],
)
def test_positions_that_cannot_be_split(mesh, options, length, words):
    """Fails if such a length is not refused with both numbers and one that works."""
    strategy = MeshStrategy(mesh, **options)
    with pytest.raises(ValueError, match=words):
        strategy.run(lambda: opened((2, length)))


def test_all_of_a_model_s_gradients_are_partial():
    """Fails if a variable's gradient by one rank's part is taken for all of it."""
    strategy = MeshStrategy(Mesh(expert=2, context=2))
    with strategy.scope():
        variable = tf.Variable(1.0)
    found = []

    def program():
        open_stream([variable], tf.TensorShape((None, 8)))
        found.append(current_program().partial_gradients[id(variable)])

    strategy.extended.layout_rules.add_split_axes(("context", "expert"))
    strategy.run(program)
    assert found == [("expert", "context")]


def test_stream_tells_over_which_axes_a_sum_goes():
    """Fails if `axes` leaves one out."""
    assert Stream(("expert",), ("context",), zigzag=True).axes == ("expert", "context")
