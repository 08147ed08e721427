"""What is in memory at the fullest moment of a traced program.

The program's ops are gone through in the order in which the executor takes them. An output takes
memory when its op runs, and gives it back after the last op that uses it. Two take no memory: an
output that is its input in another shape, and one that TensorFlow writes over an input of the
same size that nobody else needs. A variable that is assigned while an earlier value of it is still
to be used has two. Of a function that XLA compiles, what is computed element by element is part of
a loop and is never laid down.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from llmos_tf.graph.inlining import ProgramOps, Work

# Ops that write their first output over an input of its size, where nobody else needs that one.
OVERWRITES = frozenset(
    [
        "Abs",
        "Add",
        "AddN",
        "AddV2",
        "BiasAdd",
        "Cast",
        "CollectiveReduceV2",
        "Cos",
        "Div",
        "DivNoNan",
        "Elu",
        "Erf",
        "Exp",
        "Expm1",
        "Floor",
        "Inv",
        "InvGrad",
        "LeakyRelu",
        "Log",
        "Log1p",
        "LogSoftmax",
        "Maximum",
        "Minimum",
        "Mul",
        "MulNoNan",
        "Neg",
        "Pow",
        "RealDiv",
        "Reciprocal",
        "Relu",
        "Relu6",
        "ReluGrad",
        "Rsqrt",
        "RsqrtGrad",
        "Selu",
        "Sigmoid",
        "SigmoidGrad",
        "Sign",
        "Sin",
        "Softmax",
        "Softplus",
        "Sqrt",
        "SqrtGrad",
        "Square",
        "SquaredDifference",
        "Sub",
        "Tanh",
        "TanhGrad",
        "Xdivy",
        "ZerosLike",
    ]
)
# Ops that XLA makes part of the loop of what uses them.
_FUSED = OVERWRITES | {
    "BroadcastTo",
    "ClipByValue",
    "Equal",
    "Fill",
    "Greater",
    "GreaterEqual",
    "Less",
    "LessEqual",
    "LogicalAnd",
    "LogicalNot",
    "LogicalOr",
    "NotEqual",
    "OneHot",
    "Range",
    "Select",
    "SelectV2",
}
_ASSIGNS = "AssignVariableOp"
# What changes variables where they lie.
_CHANGES = ("AssignAddVariableOp", "AssignSubVariableOp", "ResourceApply")
READS = "ReadVariableOp"


@dataclass(frozen=True)
class Moment:
    """The fullest moment of a program.

    Args:
        total: bytes that live then, beside the variables and the program's inputs.
        at: name of the op that is running.
        held: of each value that is in memory, the bytes.
        inside: bytes that live inside of the op, such as in the body of a loop.
    """

    total: int
    at: str
    held: Mapping[int, int]
    inside: int


def fullest_moment(
    program: ProgramOps, inputs_count: bool = False, compiled: bool = False
) -> Moment:
    """Finds the moment at which a program holds most.

    Args:
        program: its ops.
        inputs_count: whether its inputs are its own to give back; else they are the caller's.
        compiled: whether XLA compiles it.

    Returns:
        The moment.

    Example:
        >>> fullest_moment(ProgramOps(concrete.graph)).total
        8388608
    """
    return _Run(program, inputs_count, compiled).moment


class _Run:
    """Goes through a program. A *block* is a piece of memory; values may share one."""

    def __init__(self, program: ProgramOps, inputs_count: bool, compiled: bool):
        order = program.in_order_of_execution()
        self._sizes = program.device_sizes()
        if compiled:
            _leave_out_compiled(self._sizes, program, order)
        self._uses = Counter(i for work in order for i in work.inputs)
        self._uses.update(program.outputs)
        self._block_of: dict[int, int] = {}
        self._block_sizes: dict[int, int] = {}
        self._users: Counter[int] = Counter()
        # The value for which a block was made.
        self._first_value: dict[int, int] = {}
        # The block of each variable's value, by the number of its handle.
        self._stored: dict[int, int] = {}
        # Of blocks that are variables' values, which are counted by themselves, the handles.
        self._outside: dict[int, int] = {}
        self._variable_sizes = _variable_sizes(self._sizes, order)
        self._live = 0
        self.moment = Moment(0, "", {}, 0)
        for i in program.inputs:
            self._give(i, self._new(i, self._sizes[i] if inputs_count else 0))
        for work in order:
            self._run(work)

    def _run(self, work: Work) -> None:
        if work.kind == _ASSIGNS:
            self._store(work.inputs[0], self._block_of[work.inputs[1]])
        elif work.kind.startswith(_CHANGES):
            for handle in work.inputs:
                self._change(handle, work.inputs[-1])
        elif work.kind == READS:
            self._give(work.outputs[0], self._stored_block(work.inputs[0]))
        else:
            taken: set[int] = set()
            for place, output in enumerate(work.outputs):
                self._give(output, self._block_for(work, place, taken))
        self._look(work)
        for i in work.inputs:
            self._leave(self._block_of.get(i))
        for i in work.outputs:
            if not self._uses[i]:
                self._leave(self._block_of[i])

    def _block_for(self, work: Work, place: int, taken: set[int]) -> int:
        shared = work.shares[place]
        if shared is not None and work.inputs[shared] in self._block_of:
            return self._block_of[work.inputs[shared]]
        output = work.outputs[place]
        size = self._sizes[output]
        # Of the two outputs of this op the second is written over the logits.
        first = 1 if work.kind == "SparseSoftmaxCrossEntropyWithLogits" else 0
        overwrites = work.kind in OVERWRITES or first
        if size and overwrites and place == first:
            for i in work.inputs:
                block = self._block_of.get(i)
                fits = block is not None and self._block_sizes[block] == size
                if fits and block not in taken and self._users[block] == 1:
                    taken.add(block)
                    return block
        return self._new(output, size)

    def _change(self, handle: int, by: int) -> None:
        size = self._variable_sizes.get(handle, 0)
        if size and self._users[self._stored_block(handle)] > 1:
            # Somebody is still to use the value, so that it is not changed where it lies.
            self._store(handle, self._new(by, size))

    def _store(self, handle: int, block: int) -> None:
        before = self._stored_block(handle)
        self._users[block] += 1
        self._stored[handle] = block
        self._leave(before)

    def _stored_block(self, handle: int) -> int:
        if handle not in self._stored:
            block = self._new(-1, 0)
            self._users[block] += 1
            self._stored[handle], self._outside[block] = block, handle
        return self._stored[handle]

    def _new(self, value: int, size: int) -> int:
        block = len(self._users) + 1
        self._users[block] = 0
        self._block_sizes[block] = size
        self._first_value[block] = value
        self._live += size
        return block

    def _give(self, value: int, block: int) -> None:
        self._block_of[value] = block
        self._users[block] += max(1, self._uses[value])

    def _leave(self, block: int | None) -> None:
        if block is None:
            return
        self._users[block] -= 1
        if not self._users[block]:
            self._drop(block)
            handle = self._outside.pop(block, None)
            if handle is not None:
                # The variable is the value that was stored since.
                self._drop(self._stored[handle])
                self._outside[self._stored[handle]] = handle

    def _drop(self, block: int) -> None:
        self._live -= self._block_sizes[block]
        self._block_sizes[block] = 0

    def _look(self, work: Work) -> None:
        inside = 0
        if work.body is not None:
            moment = fullest_moment(work.body, work.is_loop, compiled=not work.is_loop)
            inside = moment.total
            # What the body returns, and what a loop begins with, is counted here too.
            inside -= sum(self._sizes[i] for i in work.outputs)
            inside = max(0, inside)
        if self._live + inside > self.moment.total:
            held: Counter[int] = Counter()
            for block, size in self._block_sizes.items():
                if size:
                    held[self._first_value[block]] += size
            self.moment = Moment(self._live + inside, work.name, held, inside)


def _variable_sizes(sizes: list[int], order: list[Work]) -> dict[int, int]:
    """Bytes of the variables that are read, by the numbers of their handles."""
    return {w.inputs[0]: sizes[w.outputs[0]] for w in order if w.kind == READS}


def _leave_out_compiled(sizes: list[int], program: ProgramOps, order: list[Work]) -> None:
    """Takes from bytes of values those that a function that XLA compiles does not lay down."""
    results = set(program.outputs)
    for work in order:
        for i in work.outputs:
            if work.kind in _FUSED and i not in results:
                sizes[i] = 0
