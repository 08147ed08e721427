"""What goes from stage to stage: loops that send and receive, beside the one that computes."""

from collections.abc import Sequence

import tensorflow as tf

from llmos_tf.collectives.group_ops import with_length
from llmos_tf.collectives.point_to_point import Edge
from llmos_tf.planning.schedules import Schedule
from llmos_tf.spmd.program import ReplicaProgram
from llmos_tf.strategies.pipeline.model_parts import Message
from llmos_tf.strategies.pipeline.stage_loop import Queue, repeat
from llmos_tf.strategies.pipeline.traced_step import StepTrace

# What was received and not used yet, at most.
_AHEAD = 2


class Transport:
    """The messages of a step at one stage.

    Messages cross the *cuts* of the model: cut k is between the parts k - 1 and k. Activations
    cross it forward, gradients backward, in the order of the microbatches. Whoever computes puts
    them into a queue, and a loop of its own sends them, so that no op waits for the other stage to
    be ready; another loop receives. Between two parts of one stage there is the queue alone.

    Args:
        program: of the stage.
        schedule: says which stage has which part.
        step: the step, in parts.
        name: of the run on its device, unlike that of any other.
        is_backward: whether gradients come back.
    """

    def __init__(
        self,
        program: ReplicaProgram,
        schedule: Schedule,
        step: StepTrace,
        name: str,
        is_backward: bool,
    ):
        self._program, self._schedule, self._name = program, schedule, name
        # (direction, cut) -> messages.
        self._messages: dict[tuple[str, int], list[Message]] = {}
        for number, part in enumerate(step.parts):
            self._messages["F", number] = part.inputs
            self._messages["B", number] = part.gradient_outputs if is_backward else []

    def put(self, direction: str, cut: int, values: dict) -> list[tf.Operation]:
        """Sends a microbatch's messages over a cut.

        Args:
            direction: "F" for activations, "B" for gradients.
            cut: number of the part after it.
            values: of tensors of the trace.

        Returns:
            Ops to wait for.
        """
        messages = self._messages.get((direction, cut), [])
        queue = self._queue("out", direction, cut, messages)
        return queue.put([values[message.sent.ref()] for message in messages])

    def take(self, direction: str, cut: int) -> dict:
        """Receives the messages of the next microbatch over a cut.

        Args:
            direction: "F" for activations, "B" for gradients.
            cut: number of the part after it.

        Returns:
            Values of tensors of the trace.
        """
        messages = self._messages.get((direction, cut), [])
        values = self._queue("in", direction, cut, messages).take()
        return {m.received.ref(): x for m, x in zip(messages, values, strict=True)}

    def queues(self) -> list[Queue]:
        """Returns the queues of this stage."""
        queues = []
        for (direction, cut), messages in self._messages.items():
            stages = [self._schedule.stage_of_part(part) for part in (cut - 1, cut) if part >= 0]
            source, target = (
                (stages[0], stages[-1]) if direction == "F" else (stages[-1], stages[0])
            )
            if self._program.stage == target:
                queues.append(self._queue("in", direction, cut, messages))
            elif self._program.stage == source:
                queues.append(self._queue("out", direction, cut, messages))
        return queues

    def run(self, zero: tf.Tensor) -> list[tf.Tensor]:
        """Sends and receives until everything has come and gone.

        Args:
            zero: as for `repeat`.

        Returns:
            Tensors that are there when it has, each to be used.
        """
        turns = []
        stage, count = self._program.stage, self._schedule.num_microbatches
        for (direction, cut), messages in self._messages.items():
            if cut == 0 or not messages:
                continue
            ends = [self._schedule.stage_of_part(part) for part in (cut - 1, cut)]
            source, target = ends if direction == "F" else reversed(ends)
            if source == target:
                continue
            edge = Edge(self._program, ("pipe",), (target - source) % self._schedule.num_stages)
            if stage == source:
                turns.append(self._send_all(zero, edge, direction, cut, messages, count))
            if stage == target:
                turns.append(self._receive_all(zero, edge, direction, cut, messages, count))
        return turns

    def _queue(self, end: str, direction: str, cut: int, messages: Sequence[Message]) -> Queue:
        stages = {self._schedule.stage_of_part(p) for p in (cut - 1, cut) if p >= 0}
        if len(stages) == 1:
            end = "between"
        like = [message.received for message in messages]
        capacity = _AHEAD if end == "in" else -1
        return Queue(f"{self._name}_{end}_{direction}{cut}", like, capacity)

    def _send_all(
        self, zero, edge: Edge, direction: str, cut: int, messages, count: int
    ) -> tf.Tensor:
        def send(number, *sent):
            values = self._queue("out", direction, cut, messages).take()
            taken = []
            for message, x in zip(messages, values, strict=True):
                key = message.key + number
                if not message.received.shape.is_fully_defined():
                    taken.append(edge.send(tf.shape(x), key + count))
                    x = tf.reshape(x, [-1])
                    key = with_length(key, tf.size(x))
                taken.append(edge.send(x, key))
            with tf.control_dependencies(taken):
                return [sent[0] + 1]

        return repeat(zero, count, send, [tf.constant(0)])[1][0]

    def _receive_all(
        self, zero, edge: Edge, direction: str, cut: int, messages, count: int
    ) -> tf.Tensor:
        def receive(number, *received):
            values = [_received(edge, message, number, count) for message in messages]
            done = self._queue("in", direction, cut, messages).put(values)
            with tf.control_dependencies(done):
                return [received[0] + 1]

        return repeat(zero, count, receive, [tf.constant(0)])[1][0]


def _received(edge: Edge, message: Message, number: tf.Tensor, count: int) -> tf.Tensor:
    x, key = message.received, message.key + number
    if x.shape.is_fully_defined():
        return edge.receive(x.dtype, tuple(x.shape), key)
    shape = edge.receive(tf.int32, (x.shape.rank,), key + count)
    length = tf.reduce_prod(shape)
    flat = edge.receive(x.dtype, length[tf.newaxis], with_length(key, length))
    return tf.ensure_shape(tf.reshape(flat, shape), x.shape)
