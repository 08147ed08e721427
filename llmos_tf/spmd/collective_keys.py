"""The integers by which TensorFlow tells collectives apart."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from llmos_tf import _internal
from llmos_tf.mesh import AXES, Mesh

# Collective ops in all programs of one strategy; a program of 126 blocks has a few thousand.
MAX_INSTANCES = 2**17


class CollectiveKeys:
    """Integers that tell TensorFlow which collective ops belong together.

    A group key names a set of ranks, an instance key one op of the program. Both are the same in
    every process of a cluster, because every process makes its strategies, and traces its
    programs, in the same order.

    Args:
        mesh: the mesh whose groups are named.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        # The first key, another one for each strategy of a process.
        self.first = _internal.reserve_collective_keys()
        # By axes, and whether gradients are summed: these have groups of their own.
        self._groups: dict[tuple[tuple[str, ...], bool], int] = {}
        self._edges: dict[tuple, int] = {}
        self._next_instance: dict[Any, int] = {"pipe": 1}
        split = [axis for axis in AXES if mesh.axis_size(axis) > 1]
        for length in range(len(split) + 1):
            for group in itertools.product(itertools.combinations(split, length), (False, True)):
                self._groups[group] = self.first + len(self._groups) * mesh.size

    def edge_keys(self, axes: tuple[str, ...], shift: int) -> int:
        """Returns the first of `mesh.size` keys of pairs; see `collectives.point_to_point`.

        Args:
            axes: the axes of the groups in which ranks are paired, canonical.
            shift: how many places the receiver is further than the sender.

        Returns:
            The key of the pair whose sender is rank 0.
        """
        edge = (axes, shift)
        if edge not in self._edges:
            taken = len(self._groups) + len(self._edges)
            self._edges[edge] = self.first + taken * self._mesh.size
        return self._edges[edge]

    def next_instance(self, kind: Any, count: int = 1) -> int:
        """Returns keys for one more collective op.

        Processes trace the programs of the stages that they have, and the keys of a group have to
        agree in those that have some of its ranks. So each kind is counted by itself: the
        number of a stage for the ops of its program among its own ranks; "pipe" for those that
        the programs of all stages have alike; "trace" for those in traces that all processes make.

        Args:
            kind: of the op.
            count: how many: one for each time that the op may run in a step.

        Returns:
            The first of `count` integers in turn, positive and below `MAX_INSTANCES`, others at
            each call.

        Raises:
            RuntimeError: the strategy has traced more than `MAX_INSTANCES` of them.
        """
        if self._mesh.axis_size("pipe") == 1:
            # Without stages there is one kind.
            kind, begin, size = "pipe", 0, MAX_INSTANCES
        else:
            size = MAX_INSTANCES // 4
            begin = {"pipe": size, "trace": 2 * size}.get(kind, 0)
        key = self._next_instance.setdefault(kind, 1)
        self._next_instance[kind] += count
        if self._next_instance[kind] > size:
            raise RuntimeError(
                f"A strategy may trace {size} collective ops, and this one has. Most likely a "
                "program is traced again at every step: call strategy.run inside one tf.function, "
                "with arguments of the same shapes."
            )
        return begin + key

    def each_stage(self, stages: Iterable[Any]) -> Iterator[Any]:
        """Yields stages, at each of which ops that all stages have alike are counted anew.

        Args:
            stages: one item for each stage's program.

        Yields:
            The items.
        """
        start = self._next_instance["pipe"]
        for stage in stages:
            self._next_instance["pipe"] = start
            yield stage

    def group_strides(
        self, axes: tuple[str, ...], reduces_gradients: bool
    ) -> tuple[int, list[int]]:
        """Returns (base, strides): a rank's key along `axes` is base + coordinate · strides.

        Args:
            axes: the axes along which the group extends, canonical.
            reduces_gradients: whether it sums gradients.

        Returns:
            The key of the group at coordinate 0, and one stride for each mesh axis (0 on `axes`).
        """
        split = tuple(axis for axis in axes if self._mesh.axis_size(axis) > 1)
        strides, stride = [0] * len(AXES), 1
        for position in reversed(range(len(AXES))):
            if AXES[position] not in split:
                strides[position] = stride
                stride *= self._mesh.axis_size(AXES[position])
        return self._groups[split, reduces_gradients], strides
