"""The parts of a pipeline: forward and backward of each, cut out of one trace."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import tensorflow as tf

from llmos_tf.graph.subgraph import Cut, GraphCuts, Ops
from llmos_tf.sharding import SeedVariable
from llmos_tf.spmd.program import ReplicaProgram
from llmos_tf.strategies.pipeline.microbatch_trace import ModelTrace, Read

# Ops that make nothing new of their first input.
_COPIES = ("Cast", "Identity", "Reshape")


class Message(NamedTuple):
    """A tensor that one part sends to the next, or a gradient that it sends back.

    Attributes:
        sent: the tensor in the sender's graph.
        received: what it is called at the receiver.
        key: the first of as many instance keys as there are microbatches, and as many more for its
            shape.
    """

    sent: tf.Tensor
    received: tf.Tensor
    key: int


@dataclass
class Part:
    """What a stage does for one part of the model. All tensors are those of the trace.

    Args:
        inputs: what comes from the part before.
        outputs: what goes to the part after.
        gradient_inputs: gradients of `outputs` that come back.
        gradient_outputs: gradients of `inputs` that are sent back.
        reads: values of variables.
        gradients: of reads: (read, gradient), the gradient a tensor or `tf.IndexedSlices`.
        sums: for each dense gradient: (sum before, sum after this microbatch).
        totals: (number of a microbatch, sum over all), as far as the part uses the sum.
        lookups: (`id` of a table, rows) of what was only looked up; see `program.read_gradients`.
        writes: (variable, new value).
        kept: what the forward pass keeps for what comes later.
        handed_on: what the backward pass hands on to `weights`.
        forward: inputs and data to outputs, results, and what is kept.
        backward: gradients of inputs, and where the schedule does not split it, of reads.
        weights: gradients of reads, where the schedule splits the backward pass.
        count: the numbers of `totals` for one microbatch.
    """

    inputs: list[Message] = field(default_factory=list)
    outputs: list[Message] = field(default_factory=list)
    gradient_inputs: list[Message] = field(default_factory=list)
    gradient_outputs: list[Message] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    gradients: list[tuple[Read, Any]] = field(default_factory=list)
    sums: list[tuple[tf.Tensor, tf.Tensor]] = field(default_factory=list)
    totals: list[tuple[tf.Tensor, tf.Tensor]] = field(default_factory=list)
    lookups: list[tuple[int, tf.IndexedSlices]] = field(default_factory=list)
    writes: list[tuple[Any, tf.Tensor]] = field(default_factory=list)
    kept: list[tf.Tensor] = field(default_factory=list)
    handed_on: list[tf.Tensor] = field(default_factory=list)
    forward: Cut | None = None
    backward: Cut | None = None
    weights: Cut | None = None
    count: Cut | None = None

    @property
    def rows(self) -> list[tf.IndexedSlices]:
        """The sparse gradients."""
        sparse = [g for _, g in self.gradients if isinstance(g, tf.IndexedSlices)]
        return [*sparse, *(rows for _, rows in self.lookups)]


class Division:
    """Divides a trace into parts, while it is the default graph.

    Args:
        program: in which the trace is made.
        trace: of the forward pass, complete.
        begins: for each part its first unit.
        results: tensors that the last part has to give, the loss among them.
        free: names of ops whose results each part computes by itself.
    """

    def __init__(
        self,
        program: ReplicaProgram,
        trace: ModelTrace,
        begins: Sequence[int],
        results: Sequence[tf.Tensor],
        free: set[str],
    ):
        self._program, self._trace, self._results = program, trace, list(results)
        self._operations = trace.graph.get_operations()
        # The number of the op with which each part begins.
        starts = [0, *(trace.units[unit].begin for unit in begins[1:])]
        self._part_of = {}
        part = 0
        for index, op in enumerate(self._operations):
            while part + 1 < len(starts) and index >= starts[part + 1]:
                part += 1
            self._part_of[op.name] = part
        self.free = free
        self._copies = _copies_of_weights(self._operations, trace.reads)
        self.parts = [Part() for _ in begins]
        for read in trace.reads:
            self.parts[part_of_unit(begins, read.unit)].reads.append(read)
        for variable, value in trace.writes:
            if isinstance(variable, SeedVariable):
                continue
            self.parts[self._part_of[value.op.name]].writes.append((variable, value))
        self._connect()

    def _connect(self) -> None:
        """Finds what crosses each cut: what was made before it and is used after it."""
        last_use: dict[Any, tuple[tf.Tensor, int]] = {}
        for op in self._operations:
            for x in op.inputs:
                last_use[x.ref()] = (x, self._part_of[op.name])
        for x in self._results:
            last_use[x.ref()] = (x, len(self.parts) - 1)
        for x, last in last_use.values():
            if x.op.type == "Placeholder" or x.op.name in self.free:
                continue
            for part in range(self._part_of[x.op.name], last):
                message = self._message(x, x)
                self.parts[part].outputs.append(message)
                self.parts[part + 1].inputs.append(message)

    def _message(self, sent: tf.Tensor, received: tf.Tensor) -> Message:
        count = 2 * self._trace.num_microbatches
        return Message(sent, received, self._program.keys.next_instance("trace", count))

    def differentiate(self, loss: tf.Tensor, seed: tf.Tensor) -> None:
        """Adds the backward pass of each part to the graph, from the last to the first.

        Args:
            loss: the result of the forward pass.
            seed: gradient of what is minimized by the loss, a scalar.
        """
        targets, upstream = [loss], [seed]
        for part in reversed(self.parts):
            sources = [m.received for m in part.inputs if m.received.dtype.is_floating]
            reads = [read for read in part.reads if read.is_differentiated]
            known = [read.value for read in reads]
            # Not by a tape: of two inputs one may depend on the other, in the part before. What
            # goes that way is added there.
            gradients = tf.gradients(
                targets, [*sources, *known], grad_ys=upstream, stop_gradients=sources
            )
            part.gradients = [
                (read, gradient)
                for read, gradient in zip(reads, gradients[len(sources) :], strict=True)
                if gradient is not None
            ]
            part.sums = [_sum(r, g) for r, g in part.gradients if isinstance(g, tf.Tensor)]
            part.lookups = self._lookups()
            targets, upstream = [], []
            for x, gradient in zip(sources, gradients, strict=False):
                if gradient is None:
                    continue
                gradient = tf.convert_to_tensor(gradient)
                placeholder = tf.compat.v1.placeholder(x.dtype, x.shape)
                part.gradient_outputs.append(self._message(gradient, placeholder))
                targets.append(x)
                upstream.append(placeholder)
        for before, part in zip(self.parts, self.parts[1:], strict=False):
            before.gradient_inputs = part.gradient_outputs

    def _lookups(self) -> list[tuple[int, tf.IndexedSlices]]:
        """Rows that were looked up, of the part whose gradients were just computed."""
        noted = self._program.read_gradients
        lookups = [
            (key, rows)
            for key, reads in noted.items()
            if all(isinstance(rows, tf.IndexedSlices) for rows in reads)
            for rows in reads
        ]
        noted.clear()
        return lookups

    def cut(self, cuts: GraphCuts, splits_backward: bool) -> list[Part]:
        """Cuts the functions of each part out of the graph.

        Args:
            cuts: of the graph, complete.
            splits_backward: whether gradients of weights have a function of their own.

        Returns:
            The parts.
        """
        for number, part in enumerate(self.parts):
            results = self._results if number == len(self.parts) - 1 else []
            self._cut_part(cuts, part, results, splits_backward)
        return self.parts

    def _cut_part(self, cuts: GraphCuts, part: Part, results: list, splits_backward: bool) -> None:
        received = [message.received for message in part.inputs]
        wanted = [*(m.sent for m in part.outputs), *results, *(value for _, value in part.writes)]
        forward = cuts.ancestors(wanted, given=received)
        inputs = [message.sent for message in part.gradient_outputs]
        weights = [after for _, after in part.sums]
        weights += [x for rows in part.rows for x in (rows.values, rows.indices)]
        # Not kept: one for each microbatch on its way would be many times the weights.
        backward = cuts.ancestors(inputs, received, without=forward - self._copies)
        rest = cuts.ancestors(weights, received, without=(forward | backward) - self._copies)
        used = [*cuts.inputs_of(backward | rest), *inputs, *weights]
        known = {x.ref() for x in received}
        part.kept = _unique([x for x in used if x.op.name in forward or x.ref() in known])
        part.forward = cuts.cut(forward, _unique([*wanted, *part.kept]))
        if not splits_backward:
            part.backward = cuts.cut(backward | rest, _unique([*inputs, *weights]))
        else:
            known |= {m.received.ref() for m in part.gradient_inputs}
            known |= {x.ref() for x in part.kept}
            used = [*cuts.inputs_of(rest), *weights]
            part.handed_on = _unique([x for x in used if x.op.name in backward or x.ref() in known])
            made = [x for x in part.handed_on if x.op.name in backward]
            part.backward = cuts.cut(backward, _unique([*inputs, *made]))
            part.weights = cuts.cut(rest, _unique(weights))
        self._cut_totals(cuts, part, forward | backward | rest)

    def _cut_totals(self, cuts: GraphCuts, part: Part, names: Ops) -> None:
        used = {x.ref() for x in cuts.inputs_of(names)}
        part.totals = [(x, total) for x, total in self._trace.totals if total.ref() in used]
        counts = [x for x, _ in part.totals]
        for x in counts:
            if x.op.name not in self.free and x.op.type != "Placeholder":
                raise ValueError(
                    "A loss or metric of this model is divided by a number that depends on the "
                    f"model's weights ({x.op.name}), such as a mask that a layer computes. In a "
                    "pipeline the other microbatches, over which it is summed, come later. Give "
                    "masks and weights with the data, or use a mesh without a pipe axis."
                )
        part.count = cuts.cut(cuts.ancestors(counts), counts)


def free_ops(graph: tf.Graph, known: Sequence[tf.Tensor]) -> set[str]:
    """Returns the ops that follow from the data and the rank alone, and from no weight.

    Args:
        graph: of the trace.
        known: placeholders of data, coordinates and states.

    Returns:
        Names of ops, without placeholders.
    """
    given = {x.op.name for x in known}
    free: set[str] = set()
    for op in graph.get_operations():
        if op.type == "Placeholder" or op.op_def.is_stateful:
            continue
        sources = (*(x.op for x in op.inputs), *op.control_inputs)
        if all(source.name in free or source.name in given for source in sources):
            free.add(op.name)
    return free


def _copies_of_weights(operations: Sequence[tf.Operation], reads: Sequence[Read]) -> Ops:
    """Names of the ops that only turn weights into another type, such as one of 16 bits."""
    weights = {read.value.op.name for read in reads}
    copies: set[str] = set()
    for op in operations:
        if op.type in _COPIES and op.inputs[0].op.name in weights | copies:
            copies.add(op.name)
    return frozenset(copies)


def _sum(read: Read, gradient: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """A gradient's sum over the microbatches, before and after this one.

    Of what is overwritten the largest value, as Keras accumulates it.
    """
    before = tf.compat.v1.placeholder(gradient.dtype, read.value.shape)
    gradient = tf.ensure_shape(gradient, read.value.shape)
    is_overwritten = getattr(read.variable, "is_overwritten", False)
    return before, tf.maximum(before, gradient) if is_overwritten else before + gradient


def part_of_unit(begins: Sequence[int], unit: int) -> int:
    """Returns the part in which something is that comes after some units have begun.

    Args:
        begins: for each part its first unit.
        unit: how many units have begun.

    Returns:
        Number of the part.
    """
    return max(i for i, begin in enumerate(begins) if i == 0 or begin < unit)


def _unique(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    return list({x.ref(): x for x in tensors}.values())
