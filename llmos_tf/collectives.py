"""Communication along named mesh axes, each function with its gradient.

Called in a replica's program (inside ``strategy.run`` of a mesh strategy). `x` may have another
value on every rank; `axes` is an axis name or several, and the group of a rank are the ranks that
differ from it only on those axes. Along an axis of size 1 nothing is sent.

Gradients are adjoints: for the loss Σ_ranks ℓ_r, the gradient of a rank's input is what all ranks'
losses owe it. The functions named ``*_axis`` are the other half of the trade: Megatron's conjugate
pairs (arXiv 1909.08053), for activations that are *replicated* along the axis, where the same loss
is computed on every rank and counted once.

Each rank orders its own collectives by passing its own resource as an ordering token, without which
TensorFlow chains the ops of different devices of one process and they wait for each other forever.
"""

from collections.abc import Iterable

import tensorflow as tf

from llmos_tf.blocks import NotABlock
from llmos_tf.point_to_point import Edge
from llmos_tf.program import MAX_INSTANCES, ReplicaProgram, require_program

Axes = str | Iterable[str]

# Keys are int32; lengths that differ by this much would meet in one, and TensorFlow would say so.
_MAX_LENGTHS = 2**31 // MAX_INSTANCES - 2

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


def all_reduce(x: tf.Tensor, axes: Axes, op: str = "sum") -> tf.Tensor:
    """Reduces `x` over the group and gives every rank the result: y = Σ_j x_j.

    Args:
        x: same shape and dtype on every rank of the group.
        axes: axis name or names.
        op: "sum", "max" or "min". Only the sum has a gradient: all_reduce of the cotangents.

    Returns:
        Tensor like `x`.

    Raises:
        ValueError: an unknown `op`.

    Example:
        >>> strategy.run(lambda: collectives.all_reduce(tf.constant(1.0), "data"))
    """
    if op not in _MERGE_OPS:
        raise ValueError(f"all_reduce knows {', '.join(_MERGE_OPS)}. Received: op={op!r}.")
    group = _Group(axes, "all_reduce")
    if op != "sum":
        # Before the size is looked at: one device trains as many do.
        x = tf.stop_gradient(x)
    if group.size == 1:
        return tf.identity(x)
    if op != "sum":
        return group.reduce(x, _MERGE_OPS[op])

    @tf.custom_gradient
    def summed(x):
        return group.reduce(x), lambda dy: all_reduce(dy, axes)

    return summed(x)


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
    group = _Group(axes, "all_gather")
    if group.size == 1:
        return tf.identity(x)

    @tf.custom_gradient
    def gathered(x):
        return group.gather(x, dim), lambda dy: reduce_scatter(dy, axes, dim)

    return gathered(x)


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
    group = _Group(axes, "reduce_scatter")
    if group.size == 1:
        return tf.identity(x)
    group.check_divides(x, dim)

    @tf.custom_gradient
    def scattered(x):
        return group.reduce_scatter(x, dim), lambda dy: all_gather(dy, axes, dim)

    return scattered(x)


def all_to_all(x: tf.Tensor, axes: Axes, split_dim: int = 0, concat_dim: int = 0) -> tf.Tensor:
    """Splits `x` along `split_dim`, sends part j to rank j, concatenates what came.

    The gradient is the all_to_all the other way.

    Args:
        x: same shape and dtype on every rank; `split_dim` divisible by the group size.
        axes: axis name or names.
        split_dim: tensor dimension that is split, part j for rank j.
        concat_dim: tensor dimension along which the received parts are laid, in group order.

    Returns:
        Tensor with `split_dim` shorter and `concat_dim` longer by the group size.

    Raises:
        ValueError: the group size does not divide `split_dim`.
    """  # noqa: DOC502
    group = _Group(axes, "all_to_all")
    if group.size == 1:
        return tf.identity(x)
    group.check_divides(x, split_dim)

    @tf.custom_gradient
    def exchanged(x):
        return (
            group.exchange(x, split_dim, concat_dim),
            lambda dy: all_to_all(dy, axes, concat_dim, split_dim),
        )

    return exchanged(x)


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
    group = _Group(axes, "broadcast")
    if not 0 <= root < group.size:
        raise ValueError(
            f"broadcast along {axes!r} has roots 0 to {group.size - 1}. Received: root={root}."
        )
    if group.size == 1:
        return tf.identity(x)
    at_root = tf.equal(group.index, root)

    # A sum in which all but the root give zero: the op of TensorFlow that broadcasts needs another
    # program on the root than elsewhere, and there is one program. `where`, not a product, so that
    # a NaN elsewhere stays out.
    @tf.custom_gradient
    def spread(x):
        def gradient(dy):
            total = group.reduce(dy)
            return tf.where(at_root, total, tf.zeros_like(total))

        return group.reduce(tf.where(at_root, x, tf.zeros_like(x))), gradient

    return spread(x)


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
    group = _Group(axes, "permute")
    if shift % group.size == 0:
        return tf.identity(x)

    @tf.custom_gradient
    def shifted(x):
        return group.permute(x, shift), lambda dy: permute(dy, axes, -shift)

    return shifted(x)


def copy_to_axis(x: tf.Tensor, axes: Axes) -> tf.Tensor:
    """Megatron's f: x as it is; the cotangents are summed over the group.

    For a replicated activation that enters a region where each rank computes a part.

    Args:
        x: the same value on every rank of the group.
        axes: axis name or names.

    Returns:
        `x`.
    """
    if _Group(axes, "copy_to_axis").size == 1:
        return x

    @tf.custom_gradient
    def copied(x):
        return tf.identity(x), lambda dy: all_reduce(dy, axes)

    return copied(x)


def reduce_from_axis(x: tf.Tensor, axes: Axes) -> tf.Tensor:
    """Megatron's g: the sum over the group; the cotangent passes as it is.

    For partial sums that leave such a region as a replicated activation.

    Args:
        x: a part of the sum on every rank.
        axes: axis name or names.

    Returns:
        The sum, on every rank.
    """
    group = _Group(axes, "reduce_from_axis")
    if group.size == 1:
        return x

    @tf.custom_gradient
    def reduced(x):
        return group.reduce(x), lambda dy: dy

    return reduced(x)


def gather_from_axis(x: tf.Tensor, axes: Axes, dim: int = -1) -> tf.Tensor:
    """Concatenates the parts along `dim`; of the cotangent each rank keeps its part.

    Args:
        x: this rank's part.
        axes: axis name or names.
        dim: tensor dimension along which the parts lie.

    Returns:
        The whole, replicated over the group.
    """
    group = _Group(axes, "gather_from_axis")
    if group.size == 1:
        return x

    @tf.custom_gradient
    def gathered(x):
        return group.gather(x, dim), lambda dy: group.part(dy, dim)

    return gathered(x)


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
    group = _Group(axes, "split_to_axis")
    if group.size == 1:
        return x
    group.check_divides(x, dim)

    @tf.custom_gradient
    def split(x):
        return group.part(x, dim), lambda dy: group.gather(dy, dim)

    return split(x)


class _Group:
    """This rank's group along some axes, and the raw TensorFlow ops in it."""

    def __init__(self, axes: Axes, what: str):
        self._program: ReplicaProgram = require_program(f"collectives.{what}")
        self._what = what
        self.axes = self._program.mesh.canonical_axes(axes)
        self.size = self._program.mesh.axis_size(self.axes)
        block = self._program.block
        if self.size > 1 and block is not None and block.compiled:
            raise NotABlock("it communicates")

    @property
    def index(self) -> tf.Tensor:
        return self._program.axis_index(self.axes)

    def check_divides(self, x: tf.Tensor, dim: int) -> None:
        length = x.shape[dim]
        if length is not None and length % self.size:
            raise ValueError(
                f"{self._what} along {', '.join(self.axes)} splits dimension {dim} into "
                f"{self.size} equal parts. Received: a tensor of shape {tuple(x.shape)}, whose "
                f"{length} is not divisible by {self.size}."
            )

    def reduce(self, x: tf.Tensor, merge_op: str = "Add") -> tf.Tensor:
        if x.dtype == tf.bool:
            raise ValueError(f"{self._what} needs numbers. Received: a boolean tensor.")
        sent = _one_length(x)
        y = tf.raw_ops.CollectiveReduceV2(
            input=sent, merge_op=merge_op, final_op="Id", **self._arguments(sent)
        )
        return _unfold(y, x)

    def gather(self, x: tf.Tensor, dim: int) -> tf.Tensor:
        # The op concatenates along dimension 0 and needs one.
        front = _move_dim(x, dim, 0)
        # Nor does it know bfloat16; it only moves bits, so another type of 16 bits does as well.
        bits = tf.bitcast(front, tf.float16) if x.dtype == tf.bfloat16 else front
        sent = self._not_empty(_one_length(bits))
        y = tf.raw_ops.CollectiveGatherV2(input=sent, **self._arguments(sent))
        y = self._in_mesh_order(_unfold(y, bits, times=self.size))
        return _move_dim(y if y.dtype == x.dtype else tf.bitcast(y, x.dtype), 0, dim)

    def exchange(self, x: tf.Tensor, split_dim: int, concat_dim: int) -> tf.Tensor:
        parts = self.swap(self.stack_parts(x, split_dim))
        return tf.concat(tf.unstack(parts, self.size), concat_dim)

    def swap(self, parts: tf.Tensor) -> tf.Tensor:
        """[group, ...] to [group, ...]: part j goes to rank j."""
        sent = self._not_empty(_one_length(self._in_transport_order(parts), self.size))
        y = tf.raw_ops.CollectiveAllToAllV2(input=sent, **self._arguments(sent))
        return self._in_mesh_order(_unfold(y, parts))

    def stack_parts(self, x: tf.Tensor, dim: int) -> tf.Tensor:
        return tf.stack(tf.split(x, self.size, dim))

    def reduce_scatter(self, x: tf.Tensor, dim: int) -> tf.Tensor:
        if self._program.communication == "nccl":
            front = _move_dim(x, dim, 0)
            sent = _one_length(self._in_transport_order(front))
            y = tf.raw_ops.CollectiveReduceScatterV2(
                input=sent, merge_op="Add", final_op="Id", **self._arguments(sent)
            )
            y = _unfold(y, front, divided_by=self.size)
            return _move_dim(y, 0, dim)
        # The op has no CPU kernel; an exchange and a local sum move the same bytes.
        return tf.reduce_sum(self.swap(self.stack_parts(x, dim)), axis=0)

    def permute(self, x: tf.Tensor, shift: int) -> tf.Tensor:
        edge = Edge(self._program, self.axes, shift)
        flat = _one_length(x)
        key = self._instance_key(flat)
        sent = edge.send(flat, key)
        received = edge.receive(x.dtype, tf.shape(flat), key)
        # Or nothing would be sent.
        with tf.control_dependencies([sent]):
            return _unfold(tf.identity(received), x)

    def part(self, x: tf.Tensor, dim: int) -> tf.Tensor:
        """This rank's equal part of `x` along `dim`."""
        dim %= x.shape.rank
        length = (x.shape[dim] if x.shape[dim] is not None else tf.shape(x)[dim]) // self.size
        begin = [0] * x.shape.rank
        begin[dim] = self.index * length
        size = [-1] * x.shape.rank
        size[dim] = length
        y = tf.slice(x, tf.stack(begin), tf.stack(size))
        return _with_shape(y, _scaled(x.shape, dim, 1 / self.size))

    def _not_empty(self, x: tf.Tensor) -> tf.Tensor:
        """`x`, or an error: of nothing TensorFlow's CPU kernels divide by zero, and all ends."""
        message = (
            f"{self._what} along {', '.join(self.axes)} takes no tensor without elements. Received "
            f"one of shape {tuple(x.shape)}. Add an element that does not count."
        )
        if x.shape.is_fully_defined():
            if x.shape.num_elements() == 0:
                raise ValueError(message)
            return x
        if self._program.communication == "nccl":
            return x
        with tf.control_dependencies([tf.debugging.assert_positive(tf.size(x), message)]):
            return tf.identity(x)

    def _in_mesh_order(self, x: tf.Tensor) -> tf.Tensor:
        """The members' equal parts along dimension 0, laid as the mesh has the members."""
        places = self._program.member_places(self.axes)
        return x if places is None else _reordered(x, places)

    def _in_transport_order(self, x: tf.Tensor) -> tf.Tensor:
        """The same parts, laid as TensorFlow has the members."""
        places = self._program.member_places(self.axes)
        return x if places is None else _reordered(x, tf.math.invert_permutation(places))

    def _arguments(self, x: tf.Tensor) -> dict:
        self._program.communicates = True
        return {
            "group_size": self.size,
            "group_key": self._program.group_key(self.axes),
            "instance_key": self._instance_key(x),
            "ordering_token": [self._program.token],
            "communication_hint": self._program.communication,
        }

    def _instance_key(self, x: tf.Tensor) -> int | tf.Tensor:
        """A key for this op; TensorFlow remembers one shape for each key.

        So an op that may see another number of rows in the next step gets a key for each number.
        """
        key = self._program.instance_key(self.axes)
        if x.shape.is_fully_defined():
            return key
        return with_length(key, tf.shape(x)[x.shape.as_list().index(None)])


def with_length(key: int | tf.Tensor, length: tf.Tensor) -> tf.Tensor:
    """Returns the key of an op for one length of what it communicates.

    Args:
        key: of the op, an instance key.
        length: int32 scalar.

    Returns:
        int32 scalar; TensorFlow remembers one shape for each key.
    """
    return key + MAX_INSTANCES * (1 + length % _MAX_LENGTHS)


def _move_dim(x: tf.Tensor, source: int, target: int) -> tf.Tensor:
    source, target = source % x.shape.rank, target % x.shape.rank
    if source == target:
        return x
    order = [dim for dim in range(x.shape.rank) if dim != source]
    order.insert(target, source)
    return tf.transpose(x, order)


def _reordered(x: tf.Tensor, order: tf.Tensor) -> tf.Tensor:
    """Equal parts of `x` along dimension 0 in another order."""
    count, lengths = order.shape[0], tf.shape(x)
    parts = tf.reshape(x, tf.concat([[count, lengths[0] // count], lengths[1:]], 0))
    return _with_shape(tf.reshape(tf.gather(parts, order), lengths), x.shape)


def _one_length(x: tf.Tensor, rows: int | None = None) -> tf.Tensor:
    """`x` flattened, or as a matrix of `rows`, where more than one of its lengths is unknown."""
    if x.shape.as_list().count(None) < 2:
        return x
    return tf.reshape(x, [-1] if rows is None else [rows, tf.size(x) // rows])


def _unfold(y: tf.Tensor, x: tf.Tensor, times: int = 1, divided_by: int = 1) -> tf.Tensor:
    """The result for `_one_length(x)` as the one for `x`, of times / divided_by as many rows."""
    if x.shape.as_list().count(None) > 1:
        lengths = tf.shape(x)
        y = tf.reshape(y, tf.concat([[lengths[0] * times // divided_by], lengths[1:]], 0))
    return _with_shape(y, _scaled(x.shape, 0, times / divided_by) if x.shape.rank else x.shape)


def _scaled(shape: tf.TensorShape, dim: int, factor: float) -> list[int | None]:
    lengths = shape.as_list()
    lengths[dim] = None if lengths[dim] is None else round(lengths[dim] * factor)
    return lengths


def _with_shape(x: tf.Tensor, shape) -> tf.Tensor:
    x.set_shape(shape)
    return x
