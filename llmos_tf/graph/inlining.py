"""A traced program as one list of ops: what it calls stands in its place, loops are unrolled.

TensorFlow's executor takes ops in the order in which their inputs are ready, and the ops of a
called function take part in that. So does this list. Of a condition the branch with more ops is
taken. A loop stays one op with its body, but for one that works on queues, as a pipeline's: such a
one is unrolled, turn by turn, so that what waits in the queues is seen. What the host makes takes
no memory of the device; what it hands over is a copy there.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.graph.buffers import NO_BYTES, bytes_of, output_bytes, shared_inputs

# What carries a value to the host or from it. No TensorFlow op: there it is part of an edge.
COPIES = "Copy"
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_CONDITIONS = ("If", "StatelessIf", "Case", "StatelessCase")
_LOOPS = ("While", "StatelessWhile")
# What has no place of its own, as the ops inside stand in its place.
_INLINED = (*_CALLS, *_CONDITIONS)
# Values of so many elements at most are followed, to know which branch a turn of a loop takes.
_SMALL = 4096
_EVALUATED = {
    "Identity": lambda x: x,
    "AddV2": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Pack": lambda *x: np.stack(x),
    "GatherV2": lambda x, index, axis: np.take(x, index, int(axis)),
    "StridedSlice": lambda x, begin, *_: x[int(begin[0])] if x.ndim == 1 else None,
}


@dataclass(slots=True, eq=False)
class Work:
    """One op as it is run.

    Args:
        kind: its type.
        name: its name in the graph.
        inputs: numbers of values.
        outputs: numbers of values.
        after: what it waits for beside its inputs.
        shares: for each output the place of the input whose memory it is, or None.
        body: for a loop, or what XLA compiles: the program inside.
        is_loop: whether the body runs more than once.
    """

    kind: str
    name: str
    inputs: list[int]
    outputs: list[int]
    after: list["Work"] = field(default_factory=list)
    shares: list[int | None] = field(default_factory=list)
    body: "ProgramOps | None" = None
    is_loop: bool = False


class ProgramOps:
    """The ops of a function's graph.

    Args:
        graph: of a concrete function.
        host: the device of the host, where some ops are placed there; None where none is.

    Example:
        >>> ops = ProgramOps(step.get_concrete_function(x, y).graph)
        >>> [work.kind for work in ops.works]
    """

    def __init__(self, graph: tf.Graph, host: str | None = None):
        self.works: list[Work] = []
        self._host = host
        # Values on the host, and the copies of values in the other place.
        self._on_host: set[int] = set()
        self._copies: dict[int, int] = {}
        # Of each value: bytes, and the number of the input of the program that it is.
        self.sizes: list[int] = []
        self.inputs = [self._value(x) for x in graph.inputs]
        self.input_dtypes = [x.dtype for x in graph.inputs]
        self._constants: dict[int, np.ndarray] = {}
        self._queues: dict[str, tuple[list[Work], list[Work], int]] = {}
        self.outputs, _ = self._add(graph, self.inputs, [])
        self._connect_queues()

    def in_order_of_execution(self) -> list[Work]:
        """Returns the ops as one worker of the executor takes them: what is ready first, first."""
        makers = {output: work for work in self.works for output in work.outputs}
        followers: dict[int, list[Work]] = defaultdict(list)
        missing = {}
        for work in self.works:
            needed = [makers[i] for i in work.inputs if i in makers] + work.after
            missing[id(work)] = len(needed)
            for other in needed:
                followers[id(other)].append(work)
        ready = [work for work in self.works if not missing[id(work)]]
        for work in ready:  # It grows.
            for follower in followers[id(work)]:
                missing[id(follower)] -= 1
                if not missing[id(follower)]:
                    ready.append(follower)
        return ready

    def device_sizes(self) -> list[int]:
        """Returns the bytes that each value takes on the device: 0 for what is on the host."""
        return [0 if i in self._on_host else size for i, size in enumerate(self.sizes)]

    # --- making the list --------------------------------------------------------------------------

    def _value(self, x: tf.Tensor | None = None, size: int = 0) -> int:
        self.sizes.append(size if x is None else bytes_of(x))
        return len(self.sizes) - 1

    def _work(self, kind: str, name: str, inputs: list[int], sizes: list[int], **more) -> Work:
        outputs = [self._value(size=size) for size in sizes]
        work = Work(kind, name, inputs, outputs, **more)
        work.shares = work.shares or [None] * len(outputs)
        self.works.append(work)
        return work

    def _add(
        self, graph: tf.Graph, arguments: Sequence[int], after: list[Work]
    ) -> tuple[list[int], list[Work]]:
        """Adds the ops of a graph; returns its outputs, and what there is to be waited for."""
        known = {x.ref(): i for x, i in zip(graph.inputs, arguments, strict=True)}
        ends: dict[str, list[Work]] = defaultdict(list)
        operations = graph.get_operations()
        for op in operations:
            if op.type in ("Placeholder", "NoOp"):
                continue
            inputs = self._carried(op, [known[x.ref()] for x in op.inputs])
            waits = after + [w for x in op.control_inputs for w in _ends_of(x, ends)]
            outputs, ends[op.name] = self._add_op(op, inputs, waits)
            if self._is_on_host(op):
                self._on_host.update(outputs)
            known.update({x.ref(): i for x, i in zip(op.outputs, outputs, strict=True)})
        return [known[x.ref()] for x in graph.outputs], [
            w for op in operations for w in ends[op.name]
        ]

    def _is_on_host(self, op: tf.Operation) -> bool:
        return self._host is not None and op.device == self._host

    def _carried(self, op: tf.Operation, inputs: list[int]) -> list[int]:
        """The inputs of an op, or their copies in the place where it runs."""
        if self._host is None or op.type in _INLINED:
            return inputs
        on_host = self._is_on_host(op)
        return [
            i if (i in self._on_host) == on_host or x.dtype in NO_BYTES else self._copy(i, x)
            for i, x in zip(inputs, op.inputs, strict=True)
        ]

    def _copy(self, value: int, x: tf.Tensor) -> int:
        if value not in self._copies:
            work = self._work(COPIES, x.op.name, [value], [self.sizes[value]])
            (copy,) = work.outputs
            self._copies[value] = copy
            if value not in self._on_host:
                self._on_host.add(copy)
            if value in self._constants:
                self._constants[copy] = self._constants[value]
        return self._copies[value]

    def _add_op(
        self, op: tf.Operation, inputs: list[int], after: list[Work]
    ) -> tuple[list[int], list[Work]]:
        if op.type in _CALLS:
            return self._add_call(op, inputs, after)
        if op.type in _CONDITIONS:
            graph = self._branch(op, inputs)
            outputs, ends = self._add(graph, inputs[1:], after)
            return outputs, ends
        if op.type in _LOOPS:
            turns = _turns(op)
            if turns is not None and _has_queue(_function(op, "body")):
                return self._unroll(_function(op, "body"), turns, inputs, after)
            body = ProgramOps(_function(op, "body"), self._host)
            work = self._work(
                op.type, op.name, inputs, list(map(bytes_of, op.outputs)), after=after
            )
            work.body, work.is_loop = body, True
            # What every turn hands on as it is.
            work.shares = [
                i if same == first else None
                for i, (same, first) in enumerate(zip(body.outputs, body.inputs, strict=True))
            ]
            return work.outputs, [work]
        given = [self.sizes[i] for i in inputs]
        sizes = [output_bytes(op, x, given) for x in op.outputs]
        shares = shared_inputs(op)
        work = self._work(op.type, op.name, inputs, sizes, after=after, shares=shares)
        if op.type.startswith("Queue"):
            self._note_queue(op, work)
        self._follow_constant(op, work)
        return work.outputs if not op.type.startswith("QueueEnqueue") else [], [work]

    def _add_call(
        self, op: tf.Operation, inputs: list[int], after: list[Work]
    ) -> tuple[list[int], list[Work]]:
        graph = _function(op, "f")
        attributes = _internal.attributes_of_function(op.graph, op.get_attr("f").name)
        if attributes["_XlaMustCompile"].b:
            work = self._work(
                op.type, op.name, inputs, list(map(bytes_of, op.outputs)), after=after
            )
            work.body = ProgramOps(graph)
            return work.outputs, [work]
        if attributes["_noinline"].b:
            # It begins when all that it is given is there.
            after = [self._work("Call", op.name, inputs, [], after=after)]
        outputs, ends = self._add(graph, inputs, after)
        # A graph that has been differentiated since has more outputs, for its gradient.
        outputs = outputs[: len(op.outputs)]
        if not attributes["_noinline"].b:
            return outputs, ends
        # The caller holds the arguments until the function is through.
        shares = [len(inputs) + i for i in range(len(outputs))]
        sizes = [self.sizes[i] for i in outputs]
        back = self._work("Return", op.name, inputs + outputs, sizes, after=ends, shares=shares)
        return back.outputs, [back]

    def _branch(self, op: tf.Operation, inputs: list[int]) -> tf.Graph:
        """The branch that is taken, or may be: that of more ops."""
        if "If" in op.type:
            graphs = [_function(op, "then_branch"), _function(op, "else_branch")]
        else:
            names = [branch.name for branch in op.get_attr("branches")]
            graphs = [_internal.graph_of_function(op.graph, name) for name in names]
        index = self._constants.get(inputs[0])
        if index is not None and op.type in ("Case", "StatelessCase"):
            return graphs[int(index)]
        return max(graphs, key=lambda graph: len(graph.get_operations()))

    def _unroll(
        self, graph: tf.Graph, turns: int, inputs: list[int], after: list[Work]
    ) -> tuple[list[int], list[Work]]:
        values, ends = list(inputs), after
        for turn in range(turns):
            # The counter, which begins with a number that the graph does not tell.
            values[0] = self._value(size=4)
            self._constants[values[0]] = np.asarray(turn)
            outputs, inner = self._add(graph, values, ends)
            values = outputs
            # A turn begins when all of the one before is through.
            ends = [self._work("Turn", graph.name, [], [], after=inner or ends)]
        return values, ends

    def _follow_constant(self, op: tf.Operation, work: Work) -> None:
        if op.type == "Const":
            value = op.outputs[0]
            if value.dtype.is_integer and (value.shape.num_elements() or _SMALL) <= _SMALL:
                self._constants[work.outputs[0]] = tf.make_ndarray(op.get_attr("value"))
        elif op.type in _EVALUATED and all(i in self._constants for i in work.inputs):
            value = _EVALUATED[op.type](*(self._constants[i] for i in work.inputs))
            if value is not None:
                self._constants[work.outputs[0]] = np.asarray(value)

    def _note_queue(self, op: tf.Operation, work: Work) -> None:
        queue = op.inputs[0].op
        name = queue.get_attr("shared_name").decode()
        puts, takes, _ = self._queues.setdefault(name, ([], [], queue.get_attr("capacity")))
        if op.type.startswith("QueueEnqueue"):
            # What the queue holds is what was put into it.
            components = work.inputs[1:]
            work.outputs = [self._value(size=self.sizes[i]) for i in components]
            work.shares = list(range(1, len(work.inputs)))
            puts.append(work)
        else:
            takes.append(work)

    def _connect_queues(self) -> None:
        for puts, takes, capacity in self._queues.values():
            for put, take in zip(puts, takes, strict=False):
                take.inputs = [*take.inputs[:1], *put.outputs]
                take.shares = [1 + i for i in range(len(take.outputs))]
                for output, held in zip(take.outputs, put.outputs, strict=True):
                    self.sizes[output] = self.sizes[held]
            if capacity > 0:
                for take, put in zip(takes, puts[capacity:], strict=False):
                    put.after = [*put.after, take]


def _ends_of(op: tf.Operation, ends: dict[str, list[Work]]) -> Iterable[Work]:
    """What is waited for by who waits for an op."""
    if op.type != "NoOp":
        return ends[op.name]
    return [work for before in op.control_inputs for work in _ends_of(before, ends)]


def _function(op: tf.Operation, attribute: str) -> tf.Graph:
    return _internal.graph_of_function(op.graph, op.get_attr(attribute).name)


def _turns(op: tf.Operation) -> int | None:
    """How often a loop runs that counts from 0 up to a constant, or None."""
    (result,) = _function(op, "cond").outputs
    while result.op.type == "Identity":
        result = result.op.inputs[0]
    if result.op.type != "Less":
        return None
    limit = tf.get_static_value(result.op.inputs[1])
    return None if limit is None else int(limit)


def _has_queue(graph: tf.Graph) -> bool:
    for op in graph.get_operations():
        if op.type.startswith("Queue"):
            return True
        names = []
        if op.type in _CALLS:
            names = [op.get_attr("f").name]
        elif op.type in ("Case", "StatelessCase"):
            names = [branch.name for branch in op.get_attr("branches")]
        elif op.type in _LOOPS:
            names = [op.get_attr("body").name]
        if any(_has_queue(_internal.graph_of_function(graph, name)) for name in names):
            return True
    return False
