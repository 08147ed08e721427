"""The raw TensorFlow ops of a group of ranks, without gradients: what `collectives` is made of.

Each rank orders its own collectives by passing its own resource as an ordering token, without which
TensorFlow chains the ops of different devices of one process and they wait for each other forever.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable

import tensorflow as tf

from llmos_tf.collectives.annotations import Sent
from llmos_tf.collectives.point_to_point import Edge
from llmos_tf.graph.outlined_function import NotABlock
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.spmd.collective_keys import MAX_INSTANCES
from llmos_tf.spmd.program import ReplicaProgram, require_program

Axes = str | Iterable[str]

# Keys are int32; lengths that differ by this much would meet in one, and TensorFlow would say so.
_MAX_LENGTHS = 2**31 // MAX_INSTANCES - 2


def _on_own_device(method: Callable) -> Callable:
    """A method whose ops a rank runs on its own device, though the host may do what is around."""

    @functools.wraps(method)
    def placed(*args, **kwargs):
        with tf.device(None):
            return method(*args, **kwargs)

    return placed


class Group:
    """This rank's group along some axes, and the raw TensorFlow ops in it.

    Args:
        axes: axis name or names.
        what: the collective that is asked for, for messages.

    Raises:
        NotABlock: in a block that XLA compiles.
    """

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
        """This rank's position in the group, int32 scalar."""
        return self._program.axis_index(self.axes)

    def check_divides(self, x: tf.Tensor, dim: int) -> None:
        """Checks that a tensor can be split among the group.

        Args:
            x: the tensor.
            dim: dimension to split.

        Raises:
            ValueError: its length is known and cannot.
        """
        length = x.shape[dim]
        if length is not None and length % self.size:
            raise ValueError(
                f"{self._what} along {', '.join(self.axes)} splits dimension {dim} into "
                f"{self.size} equal parts. Received: a tensor of shape {tuple(x.shape)}, whose "
                f"{length} is not divisible by {self.size}."
            )

    @_on_own_device
    def reduce(self, x: tf.Tensor, merge_op: str = "Add") -> tf.Tensor:
        """Reduces over the group.

        Args:
            x: same shape and dtype on every rank.
            merge_op: "Add", "Max" or "Min".

        Returns:
            Tensor like `x`, the same on every rank.

        Raises:
            ValueError: a boolean tensor.
        """
        if x.dtype == tf.bool:
            raise ValueError(f"{self._what} needs numbers. Received: a boolean tensor.")
        sent = _one_length(x)
        arguments = self._arguments(sent, "all_reduce")
        with self._sends("all_reduce", x.dtype, x.shape).noted():
            y = tf.raw_ops.CollectiveReduceV2(
                input=sent, merge_op=merge_op, final_op="Id", **arguments
            )
        return _unfold(y, x)

    @_on_own_device
    def gather(self, x: tf.Tensor, dim: int, ends: bool = False) -> tf.Tensor:
        """Concatenates the members' tensors.

        Args:
            x: same shape and dtype on every rank.
            dim: along which.
            ends: whether it is the second half of a sum whose first half, an exchange, was noted as
                the whole.

        Returns:
            Tensor with `dim` longer by the group size.
        """
        # The op concatenates along dimension 0 and needs one.
        front = _move_dim(x, dim, 0)
        # Nor does it know bfloat16; it only moves bits, so another type of 16 bits does as well.
        bits = tf.bitcast(front, tf.float16) if x.dtype == tf.bfloat16 else front
        sent = self._not_empty(_one_length(bits))
        arguments = self._arguments(sent, "all_gather")
        sends = self._sends("all_gather", x.dtype, _scaled(front.shape, 0, self.size))
        with contextlib.nullcontext() if ends else sends.noted():
            y = tf.raw_ops.CollectiveGatherV2(input=sent, **arguments)
        y = self._in_mesh_order(_unfold(y, bits, times=self.size))
        return _move_dim(y if y.dtype == x.dtype else tf.bitcast(y, x.dtype), 0, dim)

    def exchange(
        self, x: tf.Tensor, split_dim: int, concat_dim: int, usual_length: int | None = None
    ) -> tf.Tensor:
        """Sends part j to rank j, and concatenates what came.

        Args:
            x: same shape and dtype on every rank.
            split_dim: dimension that is split.
            concat_dim: dimension along which parts are laid.
            usual_length: of `split_dim`, where it is not static.

        Returns:
            Tensor with `split_dim` shorter and `concat_dim` longer by the group size.
        """
        usual = x.shape.as_list()
        if usual[split_dim] is None:
            usual[split_dim] = usual_length
        sends = self._sends("all_to_all", x.dtype, usual)
        parts = self._swap(self.stack_parts(x, split_dim), sends)
        return tf.concat(tf.unstack(parts, self.size), concat_dim)

    def swap(self, parts: tf.Tensor, kind: str) -> tf.Tensor:
        """Sends part j to rank j.

        Args:
            parts: ``[group, ...]``.
            kind: of which it is the communication: "all_to_all", "reduce_scatter" of what is summed
                after it, or "all_reduce", whose other half is then a `gather` that `ends` it.

        Returns:
            Tensor like `parts`; part j is from rank j.
        """
        return self._swap(parts, self._sends(kind, parts.dtype, parts.shape))

    @_on_own_device
    def _swap(self, parts: tf.Tensor, sends: Sent) -> tf.Tensor:
        """Sends part j of ``[group, ...]`` to rank j; part j of the result is from rank j."""
        sent = self._not_empty(_one_length(self._in_transport_order(parts), self.size))
        arguments = self._arguments(sent, sends.kind)
        with sends.noted():
            y = tf.raw_ops.CollectiveAllToAllV2(input=sent, **arguments)
        return self._in_mesh_order(_unfold(y, parts))

    def stack_parts(self, x: tf.Tensor, dim: int) -> tf.Tensor:
        """Splits a tensor among the group.

        Args:
            x: the tensor.
            dim: dimension to split.

        Returns:
            ``[group, ...]``.
        """
        if dim % x.shape.rank == 0 and x.shape.is_fully_defined():
            # Parts of the first dimension lie as they are wanted.
            return tf.reshape(x, [self.size, x.shape[0] // self.size, *x.shape[1:]])
        return tf.stack(tf.split(x, self.size, dim))

    @_on_own_device
    def reduce_scatter(self, x: tf.Tensor, dim: int) -> tf.Tensor:
        """Sums over the group, and gives each rank its part.

        Args:
            x: same shape and dtype on every rank.
            dim: dimension to split.

        Returns:
            Tensor with `dim` shorter by the group size.
        """
        sends = self._sends("reduce_scatter", x.dtype, x.shape)
        if self._program.communication == "nccl":
            front = _move_dim(x, dim, 0)
            sent = _one_length(self._in_transport_order(front))
            arguments = self._arguments(sent, sends.kind)
            with sends.noted():
                y = tf.raw_ops.CollectiveReduceScatterV2(
                    input=sent, merge_op="Add", final_op="Id", **arguments
                )
            y = _unfold(y, front, divided_by=self.size)
            return _move_dim(y, 0, dim)
        # The op has no CPU kernel; an exchange and a local sum move the same bytes.
        return tf.reduce_sum(self._swap(self.stack_parts(x, dim), sends), axis=0)

    @_on_own_device
    def permute(self, x: tf.Tensor, shift: int) -> tf.Tensor:
        """Sends a tensor to the rank `shift` places on, around the group.

        Args:
            x: same shape and dtype on every rank.
            shift: places.

        Returns:
            Tensor like `x`, of the rank `shift` places back.
        """
        edge = Edge(self._program, self.axes, shift, "permute")
        flat = _one_length(x)
        key = self._instance_key(flat)
        sent = edge.send(flat, key)
        # No room is made for what comes before there is something to send.
        with tf.control_dependencies([flat]):
            received = edge.receive(x.dtype, tf.shape(flat), key)
        # Or nothing would be sent.
        with tf.control_dependencies([sent]):
            return _unfold(tf.identity(received), x)

    def part(self, x: tf.Tensor, dim: int) -> tf.Tensor:
        """Takes this rank's equal part.

        Args:
            x: any tensor.
            dim: dimension to split.

        Returns:
            Tensor with `dim` shorter by the group size.
        """
        dim %= x.shape.rank
        length = (x.shape[dim] if x.shape[dim] is not None else tf.shape(x)[dim]) // self.size
        begin = [0] * x.shape.rank
        begin[dim] = self.index * length
        size = [-1] * x.shape.rank
        size[dim] = length
        y = tf.slice(x, tf.stack(begin), tf.stack(size))
        return _with_shape(y, _scaled(x.shape, dim, 1 / self.size))

    def agreed(self, x: tf.Tensor) -> tf.Tensor:
        """Checks that replicas, which may have unequal numbers of rows, give tensors of one shape.

        TensorFlow would wait for ever, as an op has another key for each length.

        Args:
            x: the tensor.

        Returns:
            `x`, or an error where the program runs. What is known is not checked: there is one
            program. Nor are gradients of weights and what ranks with the same rows exchange.
        """
        x, mesh = tf.convert_to_tensor(x), self._program.mesh
        axes = [axis for axis in self.axes if axis in BATCH_AXES and mesh.axis_size(axis) > 1]
        is_known = self._program.shapes_agree or self._program.reduces_gradients
        if not axes or x.shape.is_fully_defined() or is_known:
            return x
        shapes = Group(axes, self._what).gather(tf.shape(x)[tf.newaxis], 0)
        message = (
            f"{self._what} along {', '.join(self.axes)} needs tensors of one shape. "
            "Received, from one replica after the other, the shapes:"
        )
        same = tf.reduce_all(tf.equal(shapes, shapes[:1]))
        with tf.control_dependencies([tf.debugging.Assert(same, [message, shapes], summarize=99)]):
            return tf.identity(x)

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

    def _sends(self, kind: str, dtype: tf.DType, shape: Iterable[int | None]) -> Sent:
        return Sent.along(self._program, self.axes, kind, dtype, shape)

    def _arguments(self, x: tf.Tensor, kind: str) -> dict:
        self._program.communicates = True
        split = [axis for axis in self.axes if self._program.mesh.axis_size(axis) > 1]
        return {
            # TensorFlow's errors name the op.
            "name": f"{kind}_along_{'_'.join(split)}",
            "group_size": self.size,
            "group_key": self._program.group_key(self.axes),
            "instance_key": self._instance_key(x),
            "ordering_token": [self._program.ordering_token],
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
