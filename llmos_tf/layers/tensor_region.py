"""Where a block's work is split over the `tensor` axis: how activations enter and leave.

Shape suffixes here and in the other layers: B rows, T positions, D hidden width, F feed-forward
width, N query heads, K key-value heads, H head width, V vocabulary. With a tensor axis of size t a
rank holds N/t, K/t, F/t, V/t of them; under sequence parallelism T/t positions between blocks.
Where the stream is split (`layers.activation_sharding`), B and T are the rows and positions of this
rank's part.
"""

from typing import Any

import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.layers.activation_sharding import Stream, current_stream
from llmos_tf.sharding import layout_of, mark_partial_gradient
from llmos_tf.spmd.program import current_program

AXIS = "tensor"
_POSITIONS = 1


class TensorRegion:
    """The stretch of a layer between `enter` and `leave`, split over `tensor` or not.

    | weights in the region | positions split outside | enter | leave |
    |---|---|---|---|
    | cut | no | f: copy, backward all-reduce | g: all-reduce, backward copy |
    | cut | yes | all-gather, backward reduce-scatter | reduce-scatter, backward all-gather |
    | whole | no | as it is | as it is |
    | whole | yes | gather, backward own part | own part, backward gather |

    Weights are cut along `tensor`, or whole. f and g are those of Megatron-LM (arXiv 1909.08053),
    the second row is its sequence-parallel variant (arXiv 2205.05198). Outside a program nothing
    happens.

    Args:
        weight: a variable of the region whose layout tells whether the region is split.
    """

    def __init__(self, weight: Any):
        program = current_program()
        layout = layout_of(weight)
        self.is_split = layout is not None and AXIS in layout.dims
        self._split_positions = program is not None and program.sequence_parallel

    def enter(self, x: tf.Tensor) -> tf.Tensor:
        """Brings an activation of the residual stream into the region.

        Args:
            x: ``[B, T, ...]``, or ``[B, T/t, ...]`` where positions are split.

        Returns:
            ``[B, T, ...]`` on every rank.
        """
        if self._split_positions:
            gather = collectives.all_gather if self.is_split else collectives.gather_from_axis
            return gather(x, AXIS, dim=_POSITIONS)
        return collectives.copy_to_axis(x, AXIS) if self.is_split else x

    def leave(self, y: tf.Tensor) -> tf.Tensor:
        """Brings a result back to the residual stream: the sum over ranks where the work was split.

        Args:
            y: ``[B, T, ...]``; a partial sum where the region is split.

        Returns:
            ``[B, T, ...]``, or ``[B, T/t, ...]`` where positions are split.
        """
        if self._split_positions:
            scatter = collectives.reduce_scatter if self.is_split else collectives.split_to_axis
            return scatter(y, AXIS, dim=_POSITIONS)
        return collectives.reduce_from_axis(y, AXIS) if self.is_split else y


def in_stream(weight: Any) -> Any:
    """Returns a weight that is used in the residual stream, outside every region.

    Where positions are split there, each rank computes its positions' part of the gradient only,
    so it is summed over `tensor` too.

    Args:
        weight: a variable that is not cut along `tensor`.

    Returns:
        The weight.
    """
    program = current_program()
    if program is not None and program.sequence_parallel:
        mark_partial_gradient(weight, AXIS)
    return weight


def region_positions(length: int | tf.Tensor) -> tf.Tensor:
    """Returns the positions that an activation inside a region stands for.

    Args:
        length: number of positions that this rank holds there.

    Returns:
        int32 ``[length]``: from 0, or those of this rank's part where the stream is split.
    """
    stream = current_stream() or Stream()
    return stream.positions(length)


def stream_positions(length: int | tf.Tensor) -> tf.Tensor:
    """Returns the positions that an activation of the residual stream stands for.

    Args:
        length: number of positions that this rank holds in the stream.

    Returns:
        int32 ``[length]``: as in a region, or of these the part that this rank holds between
        regions under sequence parallelism.
    """
    program = current_program()
    if program is None or not program.sequence_parallel:
        return region_positions(length)
    positions = region_positions(length * collectives.axis_size(AXIS))
    return collectives.split_to_axis(positions, AXIS, dim=0)
