"""Loops and queues of a stage's program: it grows neither with microbatches nor with stages."""

from collections.abc import Callable, Sequence

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.collectives.annotations import noted_turns
from llmos_tf.graph.errors import trace_for_devices


def repeat(
    zero: tf.Tensor,
    count: int,
    body: Callable[..., list[tf.Tensor]],
    variables: Sequence[tf.Tensor],
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Calls a function again and again.

    `tf.while_loop` becomes a frame of the graph around it, and TensorFlow puts a frame's name into
    the keys by which the ops of different devices meet. This loop calls its body as a function.

    Args:
        zero: 0, int32 scalar; no constant, or the graph optimizer may run the loop by itself.
        count: how often.
        body: of (number of the turn, int32 scalar; variables) to the variables of the next turn.
        variables: at the start.

    Returns:
        The number of turns, int32 scalar, without whose use the loop is left out; and the
        variables after the last turn.
    """
    start = [zero, *variables]
    turn = _traced(lambda i, *values: [i + 1, *body(i, *values)], start)
    captured = list(turn.captured_inputs)
    everything = [*start, *captured]

    def turn_with_captures(*values):
        mine, theirs = list(values[: len(start)]), list(values[len(start) :])
        return [*_internal.call_with_captures(turn, mine, theirs), *theirs]

    # Called stateless, as stateful ops would be put in a row, and loops run side by side.
    with noted_turns(count):
        results = tf.raw_ops.StatelessWhile(
            input=everything,
            cond=_traced(lambda i, *values: i < count, everything),
            body=_traced(turn_with_captures, everything),
            output_shapes=[x.shape for x in everything],
        )
    for x, y in zip(everything, results, strict=True):
        y.set_shape(x.shape)
    return results[0], results[1 : len(start)]


def _traced(
    function: Callable, values: Sequence[tf.Tensor]
) -> tf.types.experimental.ConcreteFunction:
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in values]
    return trace_for_devices(function, specs, values)


class Queue:
    """Tensors that one loop leaves for another one, or for itself, first in first out.

    Args:
        name: of the queue on its device; every user of the same name has the same queue.
        like: tensors like the components of an element.
        capacity: elements after which whoever adds one waits; -1 for any number.
    """

    def __init__(self, name: str, like: Sequence[tf.Tensor], capacity: int = -1):
        self._name, self._capacity = name, capacity
        self._like = list(like)

    def put(self, values: Sequence[tf.Tensor]) -> list[tf.Operation]:
        """Adds an element.

        Args:
            values: its components.

        Returns:
            The op that does it; none where an element has no components.
        """
        if not self._like:
            return []
        return [tf.raw_ops.QueueEnqueueV2(handle=self._handle(), components=list(values))]

    def take(self) -> list[tf.Tensor]:
        """Removes the first element, as soon as there is one.

        Returns:
            Its components.
        """
        if not self._like:
            return []
        values = tf.raw_ops.QueueDequeueV2(
            handle=self._handle(), component_types=[x.dtype for x in self._like]
        )
        for x, value in zip(self._like, values, strict=True):
            value.set_shape(x.shape)
        return list(values)

    def clear(self) -> list[tf.Operation]:
        """Removes all elements, such as those that a failed step did not take.

        Returns:
            The op, which must run before any user; none where an element has no components.
        """
        if not self._like:
            return []
        # The next user creates a new queue.
        return [tf.raw_ops.DestroyResourceOp(resource=self._handle())]

    def _handle(self) -> tf.Tensor:
        # A handle of each user's own: by a common one TensorFlow would put the users in a row.
        return tf.raw_ops.FIFOQueueV2(
            component_types=[x.dtype for x in self._like],
            capacity=self._capacity,
            shared_name=self._name,
        )
