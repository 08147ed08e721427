"""Communication along named mesh axes, each function with its gradient.

Called in a replica's program (inside ``strategy.run`` of a mesh strategy). `x` may have another
value on every rank; `axes` is an axis name or several, and the group of a rank are the ranks that
differ from it only on those axes. Along an axis of size 1 nothing is sent.

Gradients are adjoints: for the loss Σ_ranks ℓ_r, the gradient of a rank's input is what all ranks'
losses owe it. The functions named ``*_axis`` are the other half of the trade: Megatron's conjugate
pairs (arXiv 1909.08053), for activations that are *replicated* along the axis, where the same loss
is computed on every rank and counted once.
"""

from collections.abc import Callable

import tensorflow as tf

from llmos_tf.collectives.group_ops import Axes, Group
from llmos_tf.spmd.program import require_program

_MERGE_OPS = {"sum": "Add", "max": "Max", "min": "Min"}


def axis_size(axes: Axes) -> int:
    """Returns the number of ranks in a group along `axes`.

    Args:
        axes: axis name or names.

    Returns:
        The product of the axis sizes.
    """
    return require_program("collectives.axis_size").mesh.axis_size(axes)


def axis_index(axes: Axes) -> tf.Tensor:
    """Returns this rank's position in its group along `axes`.

    Args:
        axes: axis name or names; the first in mesh order varies slowest.

    Returns:
        int32 scalar.
    """
    return require_program("collectives.axis_index").axis_index(axes)


def all_reduce(x: tf.Tensor, axes: Axes, op: str = "sum", hierarchical: bool = False) -> tf.Tensor:
    """Reduces `x` over the group and gives every rank the result: y = Σ_j x_j.

    Args:
        x: same shape and dtype on every rank of the group.
        axes: axis name or names.
        op: "sum", "max" or "min". Only the sum has a gradient: all_reduce of the cotangents.
        hierarchical: along several axes, whether to reduce-scatter along the innermost one, the
            last in mesh order, whose ranks are neighbours, then all-reduce the parts along the
            others, and gather them along the innermost. What is sent along the outer axes, the slow
            ones, is divided by the size of the innermost. Along one axis it changes nothing.

    Returns:
        Tensor like `x`.

    Raises:
        ValueError: an unknown `op`, or hierarchical with another one than the sum.

    Example:
        >>> strategy.run(lambda: collectives.all_reduce(tf.constant(1.0), "data"))
    """
    if op not in _MERGE_OPS:
        raise ValueError(f"all_reduce knows {', '.join(_MERGE_OPS)}. Received: op={op!r}.")
    if hierarchical and op != "sum":
        raise ValueError(
            f"all_reduce is hierarchical for sums. Received: op={op!r}. Leave hierarchical out."
        )
    group = Group(axes, "all_reduce")
    split = [axis for axis in group.axes if axis_size(axis) > 1]
    if hierarchical and len(split) > 1:
        return _sum_by_parts(x, split[:-1], split[-1])
    if op != "sum":
        # Before the size is looked at: one device trains as many do.
        x = tf.stop_gradient(x)
    if group.size == 1:
        return tf.identity(x)
    x = group.agreed(x)
    if op != "sum":
        return group.reduce(x, _MERGE_OPS[op])

    return _linear(x, group.reduce, lambda dy: all_reduce(dy, axes))


def _sum_by_parts(x: tf.Tensor, outer: Axes, inner: str) -> tf.Tensor:
    """A sum of which each rank of `inner` takes an equal part along `outer`."""
    ways, length = axis_size(inner), x.shape.num_elements()
    flat = tf.reshape(x, [-1])
    if length is None:
        length = tf.size(x)
    missing = -length % ways
    if not isinstance(missing, int) or missing:
        flat = tf.pad(flat, [[0, missing]])
    # Each has a gradient, and their adjoints in turn are the same three.
    part = all_reduce(reduce_scatter(flat, inner), outer)
    whole = tf.reshape(all_gather(part, inner)[:length], tf.shape(x))
    whole.set_shape(x.shape)
    return whole


def all_gather(x: tf.Tensor, axes: Axes, dim: int = 0) -> tf.Tensor:
    """Concatenates the ranks' `x` along `dim`, in group order, on every rank.

    The gradient is `reduce_scatter`: every rank used every part.

    Args:
        x: same shape and dtype on every rank.
        axes: axis name or names.
        dim: tensor dimension along which to concatenate.

    Returns:
        Tensor whose `dim` is group size times as long.
    """
    group = Group(axes, "all_gather")
    if group.size == 1:
        return tf.identity(x)

    x = group.agreed(x)
    return _linear(x, lambda x: group.gather(x, dim), lambda dy: reduce_scatter(dy, axes, dim))


def reduce_scatter(x: tf.Tensor, axes: Axes, dim: int = 0) -> tf.Tensor:
    """Sums `x` over the group and gives each rank its part of the sum along `dim`.

    The gradient is `all_gather`.

    Args:
        x: same shape and dtype on every rank; `dim` divisible by the group size.
        axes: axis name or names.
        dim: tensor dimension along which to split.

    Returns:
        Tensor whose `dim` is group size times shorter.

    Raises:
        ValueError: the group size does not divide `dim`.
    """  # noqa: DOC502
    group = Group(axes, "reduce_scatter")
    if group.size == 1:
        return tf.identity(x)
    group.check_divides(x, dim)

    x = group.agreed(x)
    return _linear(x, lambda x: group.reduce_scatter(x, dim), lambda dy: all_gather(dy, axes, dim))


def all_to_all(
    x: tf.Tensor,
    axes: Axes,
    split_dim: int = 0,
    concat_dim: int = 0,
    usual_length: int | None = None,
) -> tf.Tensor:
    """Splits `x` along `split_dim`, sends part j to rank j, concatenates what came.

    The gradient is the all_to_all the other way.

    Args:
        x: same shape and dtype on every rank; `split_dim` divisible by the group size.
        axes: axis name or names.
        split_dim: tensor dimension that is split, part j for rank j.
        concat_dim: tensor dimension along which the received parts are laid, in group order.
        usual_length: of both together where they are one, for `traffic` if it is not static.

    Returns:
        Tensor with `split_dim` shorter and `concat_dim` longer by the group size.

    Raises:
        ValueError: the group size does not divide `split_dim`.
    """  # noqa: DOC502
    group = Group(axes, "all_to_all")
    if group.size == 1:
        return tf.identity(x)
    group.check_divides(x, split_dim)

    x = group.agreed(x)
    return _linear(
        x,
        lambda x: group.exchange(x, split_dim, concat_dim, usual_length),
        lambda dy: all_to_all(dy, axes, concat_dim, split_dim, usual_length),
    )


def broadcast(x: tf.Tensor, axes: Axes, root: int = 0) -> tf.Tensor:
    """Gives every rank the `x` of the group's rank `root`.

    The gradient is the sum of the cotangents, at the root; zero elsewhere.

    Args:
        x: same shape and dtype on every rank.
        axes: axis name or names.
        root: position in the group.

    Returns:
        Tensor like `x`.

    Raises:
        ValueError: `root` is not a position in the group.
    """
    group = Group(axes, "broadcast")
    if not 0 <= root < group.size:
        raise ValueError(
            f"broadcast along {axes!r} has roots 0 to {group.size - 1}. Received: root={root}."
        )
    if group.size == 1:
        return tf.identity(x)
    x = group.agreed(x)
    at_root = tf.equal(group.index, root)

    # A sum in which all but the root give zero: the op of TensorFlow that broadcasts needs another
    # program on the root than elsewhere, and there is one program. `where`, not a product, so that
    # a NaN elsewhere stays out.
    def root_of(x):
        return tf.where(at_root, x, tf.zeros_like(x))

    return _linear(x, lambda x: group.reduce(root_of(x)), lambda dy: root_of(group.reduce(dy)))


def permute(x: tf.Tensor, axes: Axes, shift: int = 1) -> tf.Tensor:
    """Sends `x` to the rank `shift` places further around the group's ring.

    The gradient travels the other way round.

    Args:
        x: same shape and dtype on every rank.
        axes: axis name or names.
        shift: places; rank i receives the x of rank i - shift (modulo the group size).

    Returns:
        Tensor like `x`.
    """
    group = Group(axes, "permute")
    if shift % group.size == 0:
        return tf.identity(x)

    x = group.agreed(x)
    return _linear(x, lambda x: group.permute(x, shift), lambda dy: permute(dy, axes, -shift))


def copy_to_axis(x: tf.Tensor, axes: Axes) -> tf.Tensor:
    """Megatron's f: x as it is; the cotangents are summed over the group.

    For a replicated activation that enters a region where each rank computes a part.

    Args:
        x: the same value on every rank of the group.
        axes: axis name or names.

    Returns:
        `x`.
    """
    if Group(axes, "copy_to_axis").size == 1:
        return x

    return _linear(x, tf.identity, lambda dy: all_reduce(dy, axes))


def reduce_from_axis(x: tf.Tensor, axes: Axes) -> tf.Tensor:
    """Megatron's g: the sum over the group; the cotangent passes as it is.

    For partial sums that leave such a region as a replicated activation.

    Args:
        x: a part of the sum on every rank.
        axes: axis name or names.

    Returns:
        The sum, on every rank.
    """
    group = Group(axes, "reduce_from_axis")
    if group.size == 1:
        return x

    return _linear(group.agreed(x), group.reduce, lambda dy: dy)


def gather_from_axis(x: tf.Tensor, axes: Axes, dim: int = -1) -> tf.Tensor:
    """Concatenates the parts along `dim`; of the cotangent each rank keeps its part.

    Args:
        x: this rank's part.
        axes: axis name or names.
        dim: tensor dimension along which the parts lie.

    Returns:
        The whole, replicated over the group.
    """
    group = Group(axes, "gather_from_axis")
    if group.size == 1:
        return x

    x = group.agreed(x)
    return _linear(x, lambda x: group.gather(x, dim), lambda dy: group.part(dy, dim))


def split_to_axis(x: tf.Tensor, axes: Axes, dim: int = -1) -> tf.Tensor:
    """Keeps this rank's part of a replicated `x`; the parts' cotangents are gathered.

    Args:
        x: the same value on every rank of the group; `dim` divisible by the group size.
        axes: axis name or names.
        dim: tensor dimension along which to split.

    Returns:
        This rank's part.

    Raises:
        ValueError: the group size does not divide `dim`.
    """  # noqa: DOC502
    group = Group(axes, "split_to_axis")
    if group.size == 1:
        return x
    group.check_divides(x, dim)

    return _linear(x, lambda x: group.part(x, dim), lambda dy: group.gather(dy, dim))


def _linear(
    x: tf.Tensor,
    forward: Callable[[tf.Tensor], tf.Tensor],
    adjoint: Callable[[tf.Tensor], tf.Tensor],
) -> tf.Tensor:
    """What `forward` makes of `x`, and `adjoint` of its cotangent.

    A gradient that is reduced is not differentiated again. There TensorFlow's custom gradient would
    be in the way: it hands on `x` beside the result, which then cannot take its memory.
    """
    if require_program("collectives").reduces_gradients:
        return forward(x)

    @tf.custom_gradient
    def differentiable(x):
        return forward(x), adjoint

    return differentiable(x)
