"""What the values of a traced program are: activations, gradients, communication or copies."""

from collections.abc import Container, Iterable

from llmos_tf.graph.inlining import COPIES, ProgramOps, Work
from llmos_tf.memory.liveness import OVERWRITES, READS

ACTIVATIONS, GRADIENTS, COMMUNICATION, OTHER = (
    "activations",
    "gradients",
    "communication",
    "other",
)
# Ops by which elements are laid in another order or place.
_MOVES = frozenset(
    [
        "ConcatV2",
        COPIES,
        "GatherV2",
        "IdentityN",
        "Pack",
        "Pad",
        "PadV2",
        "Return",
        "Slice",
        "Split",
        "SplitV",
        "StridedSlice",
        "Tile",
        "Transpose",
        "Unpack",
    ]
)
_RECEIVES = "CollectiveBcastRecvV2"
# What computes one element of one element of each input: a gradient stays one.
_ELEMENTWISE = OVERWRITES | {"ClipByValue", "Select", "SelectV2"}


def kinds_of_values(
    program: ProgramOps, data: Iterable[int], trained: Container[int]
) -> dict[int, str]:
    """Says of each value what it is.

    - *gradients*: what is written into a trained variable or the state of an optimizer, and what
      that was made of by operations on single elements, back to the product or sum over rows and
      positions that made it. So an optimizer's temporaries are among them.
    - *communication*: gradients and weights as collectives leave them, such as the weights that
      fsdp has gathered; and what is packed for a collective alone, activations too.
    - *other*: what is computed of variables alone, such as weights in another type.
    - *activations*: what is left, which follows from the batch.

    Args:
        program: its ops.
        data: the numbers of the inputs that hold the batch.
        trained: the numbers of the handles of weights and of what an optimizer keeps.

    Returns:
        The kind of each value by its number.
    """
    order = program.in_order_of_execution()
    of_data = _followers(order, data)
    of_variables = _of_variables(order) - of_data
    gradients = _gradients(program, order, of_variables, trained)
    kinds = {}
    for work in order:
        for i in work.outputs:
            kinds[i] = GRADIENTS if i in gradients else OTHER if i in of_variables else ACTIVATIONS
    moved: set[int] = set()
    for work in order:
        moves = _moves(work) and not moved.isdisjoint(work.inputs)
        if _is_collective(work) or (moves and OTHER in {kinds[i] for i in work.outputs}):
            moved.update(work.outputs)
            for i in work.outputs:
                if kinds[i] != ACTIVATIONS:
                    kinds[i] = COMMUNICATION
    for i in _packed(order):
        kinds[i] = COMMUNICATION
    return kinds


def _followers(order: list[Work], first: Iterable[int]) -> set[int]:
    """All that is computed of some values, and what another rank has sent."""
    found = set(first)
    for work in order:
        if work.kind == _RECEIVES or not found.isdisjoint(work.inputs):
            found.update(work.outputs)
    return found


def _of_variables(order: list[Work]) -> set[int]:
    """What is computed of variables, but for random numbers, whose seeds are variables too."""
    found: set[int] = set()
    for work in order:
        follows = not found.isdisjoint(work.inputs) and "Random" not in work.kind
        if work.kind == READS or follows:
            found.update(work.outputs)
    return found


def _gradients(
    program: ProgramOps, order: list[Work], of_variables: set[int], trained: Container[int]
) -> set[int]:
    makers = {i: work for work in order for i in work.outputs}
    found: set[int] = set()
    for work in reversed(order):
        if any(i in trained for i in _written(work)):
            found.update(i for i in work.inputs[1:] if i not in of_variables and i not in trained)
        if found.isdisjoint(work.outputs):
            continue
        # A reduce-scatter is an exchange and a sum of what came.
        sums = work.kind == "Sum" and _comes_from_collective(work, makers)
        if len(work.shares) > 1 and None not in work.shares:
            # Each output is one of the inputs, as it is.
            same = zip(work.outputs, work.shares, strict=True)
            found.update(work.inputs[place] for output, place in same if output in found)
        elif work.body is not None:
            # Of what goes over a gradient once, what is as long as that.
            sizes = {program.sizes[i] for i in work.outputs if i in found}
            alike = (i for i in work.inputs if program.sizes[i] in sizes)
            found.update(i for i in alike if i not in of_variables)
        elif sums or work.kind in _ELEMENTWISE or _moves(work) or _is_collective(work):
            found.update(i for i in work.inputs if i not in of_variables)
    return found


def _packed(order: list[Work]) -> set[int]:
    """What was laid together for a collective and is used by nothing else."""
    users: dict[int, list[Work]] = {i: [] for work in order for i in work.outputs}
    for work in order:
        for i in work.inputs:
            users.setdefault(i, []).append(work)

    def is_only_sent(i: int) -> bool:
        return any(_is_collective(user) for user in users[i]) and all(
            _is_collective(user) or not used_again(user, i) for user in users[i]
        )

    def used_again(user: Work, i: int) -> bool:
        """Whether what an op makes of a value, other than sending it, is used."""
        same = [
            output
            for output, place in zip(user.outputs, user.shares, strict=True)
            if place is not None and user.inputs[place] == i
        ]
        return not same or any(users.get(output) for output in same)

    return {
        i
        for work in order
        if work.kind in _MOVES and work.kind != "Return"
        for i in work.outputs
        if is_only_sent(i)
    }


def _comes_from_collective(work: Work, makers: dict[int, Work]) -> bool:
    maker = makers.get(work.inputs[0])
    while maker is not None and _moves(maker):
        maker = makers.get(maker.inputs[0])
    return maker is not None and _is_collective(maker)


def _moves(work: Work) -> bool:
    return work.kind in _MOVES or (len(work.shares) == 1 and work.shares[0] == 0)


def _is_collective(work: Work) -> bool:
    return work.kind.startswith("Collective")


def _written(work: Work) -> list[int]:
    """The variables that an op writes into, by the numbers of their handles."""
    if work.body is not None:
        inside = {i for op in work.body.works for i in _written(op)}
        pairs = zip(work.inputs, work.body.inputs, strict=True)
        return [outer for outer, inner in pairs if inner in inside]
    writes = ("Assign", "ResourceApply", "ResourceSparseApply", "ResourceScatter")
    return work.inputs[:1] if work.kind.startswith(writes) else []
