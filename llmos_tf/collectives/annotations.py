"""What travels between ranks, noted on the ops that send it.

A graph says of a collective neither its axes nor how often the loop around it turns. So whoever
makes such an op notes it there, as an attribute, which stays with the op wherever TensorFlow or a
pipeline copies it: into functions, their gradients, and parts that are cut out.
`llmos_tf.collectives.traffic_report` reads the notes of the functions that are really called.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.spmd.program import ReplicaProgram

_ATTRIBUTE = "_llmos_wire"
# Losses, metrics and norms are smaller, in bytes.
SMALL = 1024


class Sent(NamedTuple):
    """What one rank sends by one collective.

    Args:
        strategy: the first collective key of the strategy whose program it is.
        axes: along which the group extends, joined by "+".
        kind: "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute" within a group,
            or "send" from one stage of a pipeline to another.
        ranks: in the group.
        dtype: of what is sent, its name.
        is_gradient: whether it sums gradients of weights.
        shape: of the whole tensor: of an all-gather its result, of the others its input. None for
            a length that is not static.
    """

    strategy: int
    axes: str
    kind: str
    ranks: int
    dtype: str
    is_gradient: bool
    shape: tuple[int | None, ...]

    @classmethod
    def along(
        cls,
        program: ReplicaProgram,
        axes: tuple[str, ...],
        kind: str,
        dtype: tf.DType,
        shape: Iterable[int | None],
    ) -> "Sent":
        """Returns what a rank of a program sends.

        Args:
            program: the program.
            axes: canonical axis names; those of size 1 are left out.
            kind: as of the class.
            dtype: of what is sent.
            shape: as of the class.

        Returns:
            What it sends.
        """
        mesh = program.mesh
        split = "+".join(axis for axis in axes if mesh.axis_size(axis) > 1)
        ranks = mesh.axis_size(axes)
        is_gradient = program.reduces_gradients
        return cls(program.keys.first, split, kind, ranks, dtype.name, is_gradient, tuple(shape))

    @property
    def bytes(self) -> int | None:
        """Of the whole tensor; None where its size is not static."""
        return None if None in self.shape else math.prod(self.shape) * tf.as_dtype(self.dtype).size

    @property
    def wire(self) -> Fraction:
        """Bytes that a rank sends, 0 where they are not known: of N ranks' S bytes 2(N-1)/N · S for
        an all-reduce, (N-1)/N · S for what gathers or scatters, all S from one rank to another."""
        share = {
            "all_reduce": Fraction(2 * (self.ranks - 1), self.ranks),
            "permute": Fraction(1),
            "send": Fraction(1),
        }.get(self.kind, Fraction(self.ranks - 1, self.ranks))
        return share * (self.bytes or 0)

    @property
    def is_scalars(self) -> bool:
        """Whether it counts as one of the losses, metrics, norms and counts of a step.

        Weights are gathered in parts, and their gradients scattered and summed: a small one is none
        of them.
        """
        if self.bytes is None or self.bytes >= SMALL or self.is_gradient:
            return False
        moves_parts = self.kind in ("all_gather", "reduce_scatter")
        return not (moves_parts and tf.as_dtype(self.dtype).is_floating)

    def noted(self) -> AbstractContextManager:
        """Returns the context in which the op is made."""
        return _noting({"sent": self})


@contextmanager
def sending(strategy: tf.distribute.Strategy) -> Iterator[bool]:
    """Has programs communicate by ops also where devices of one process need none.

    What is counted is what a step sends between devices that share no memory.

    Args:
        strategy: any strategy.

    Yields:
        Whether programs that were traced before may have left such ops out.
    """
    extended = strategy.extended
    before = getattr(extended, "shares_memory", False)
    if before:
        extended.shares_memory = False
    try:
        yield before
    finally:
        if before:
            extended.shares_memory = True


def noted_turns(count: int) -> AbstractContextManager:
    """Returns the context in which the op of a loop is made.

    Args:
        count: how often its body is called.

    Returns:
        The context.
    """
    return _noting({"turns": count})


def noted_branches(counts: Sequence[int]) -> AbstractContextManager:
    """Returns the context in which the op of a choice between branches is made.

    Args:
        counts: how often each branch is taken, in all turns of the loop around it.

    Returns:
        The context.
    """
    return _noting({"branches": list(counts)})


def sent_by(node: Any) -> Sent | None:
    """Returns what a node of a function sends.

    Args:
        node: a `NodeDef`.

    Returns:
        What was noted; None for any other op, and for one that only receives.
    """
    if not node.op.startswith("Collective") or _ATTRIBUTE not in node.attr:
        return None
    *values, shape = _note(node)["sent"]
    return Sent(*values, tuple(shape))


def turns_of(node: Any) -> int | None:
    """Returns how often the body of a loop is called, None where it was not noted.

    Args:
        node: a `NodeDef`.

    Returns:
        The number of turns.
    """
    return _note(node).get("turns")


def branches_of(node: Any) -> list[int] | None:
    """Returns how often the branches of a node are taken, None where it was not noted.

    Args:
        node: a `NodeDef`.

    Returns:
        A number for each branch.
    """
    return _note(node).get("branches")


def _noting(note: dict[str, Any]) -> AbstractContextManager:
    graph = tf.compat.v1.get_default_graph()
    return _internal.op_attribute(graph, _ATTRIBUTE, json.dumps(note).encode())


def _note(node: Any) -> dict[str, Any]:
    return json.loads(node.attr[_ATTRIBUTE].s) if _ATTRIBUTE in node.attr else {}
