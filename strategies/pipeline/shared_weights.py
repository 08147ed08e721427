"""Sums over the stages that share a weight."""

import itertools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from llmos_tf.collectives.point_to_point import Edge
from llmos_tf.sharding import ShardedVariable
from llmos_tf.spmd.program import ReplicaProgram


class SharedWeights:
    """The weights that several stages hold, such as a tied embedding, and the ways between them.

    One for the programs of all stages, so that they agree on keys.

    Args:
        program: of the stage that needs it first.
        variables: all that are trained, of all stages.
    """

    def __init__(self, program: ReplicaProgram, variables: Sequence[ShardedVariable]):
        size = program.mesh.axis_size("pipe")
        self._keys: dict[tuple[int, int, int], int] = {}
        for variable in variables:
            stages = variable.layout.stages or range(size)
            for sender, receiver in itertools.permutations(stages, 2):
                key = program.keys.next_instance("trace")
                self._keys[id(variable), sender, receiver] = key
                program.keys.edge_keys(("pipe",), (receiver - sender) % size)

    def summed(self, program: ReplicaProgram, gradient: Any, variable: ShardedVariable) -> Any:
        """Sums the gradients that stages have of a weight, each by its own use of it.

        Args:
            program: of this stage.
            gradient: this stage's, or None where it does not use the weight.
            variable: the weight; this stage holds it.

        Returns:
            The sum, the same on all stages that hold the weight.
        """
        me, size = program.stage, program.mesh.axis_size("pipe")
        others = [s for v, s, receiver in self._keys if v == id(variable) and receiver == me]
        if not others:
            return gradient
        part = variable.component
        mine = tf.zeros(part.shape, part.dtype) if gradient is None else gradient
        mine = tf.ensure_shape(tf.convert_to_tensor(mine), part.shape)
        sent, terms = [], {me: mine}
        for other in others:
            there = Edge(program, ("pipe",), (other - me) % size)
            sent.append(there.send(mine, self._keys[id(variable), me, other]))
            back = Edge(program, ("pipe",), (me - other) % size)
            key = self._keys[id(variable), other, me]
            terms[other] = back.receive(mine.dtype, tuple(part.shape), key)
        # In one order everywhere, so that the copies of the weight stay the same to the bit.
        total = tf.add_n([terms[stage] for stage in sorted(terms)])
        with tf.control_dependencies(sent):
            return tf.identity(total)
