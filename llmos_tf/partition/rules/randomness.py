"""Rules of ops that draw random numbers from a state of their own.

With a seed, as `tf.random.set_seed` gives one to each op, all ranks draw the numbers of one device.
Without one each rank draws others: of rows that does no harm, and of all else the first rank's
count.
"""

from collections.abc import Sequence

from llmos_tf.partition.graph.choice import Choice, Rule, can_shard, same
from llmos_tf.partition.graph.flat_graph import Node
from llmos_tf.partition.graph.placements import PARTIAL, REPLICATED, Placement, Sharded
from llmos_tf.partition.rules.movement import with_local_shape

_OF_A_SHAPE = (
    "RandomStandardNormal",
    "RandomUniform",
    "RandomUniformInt",
    "TruncatedNormal",
)
# Of parameters, or of what is shuffled.
_OF_VALUES = (
    "Multinomial",
    "ParameterizedTruncatedNormal",
    "RandomGamma",
    "RandomPoissonV2",
    "RandomShuffle",
)


def has_seed(node: Node) -> bool:
    """Returns whether an op draws the same numbers wherever it is run.

    Args:
        node: an op of this table.

    Returns:
        True where one of its two seeds is not 0.
    """
    return bool(node.int_attr("seed") or node.int_attr("seed2"))


def of_a_shape(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Draws numbers of a shape that is given."""
    if has_seed(node):
        return None
    needed = [REPLICATED] * len(inputs)
    if can_shard(node.outputs[0], 0):
        return same(node, needed, Sharded(0), with_local_shape(0, 0))
    return same(node, needed, PARTIAL, _of_the_first_rank)


def of_values(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Draws numbers of parameters that are given."""
    if has_seed(node):
        return None
    if node.type == "Multinomial" and can_shard(node.inputs[0], 0):
        return same(node, [Sharded(0), REPLICATED], Sharded(0))
    return same(node, [REPLICATED] * len(inputs), PARTIAL, _of_the_first_rank)


def _of_the_first_rank(emission, node, inputs):
    return [emission.as_part(x) for x in emission.copy(node, inputs)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(_OF_A_SHAPE, of_a_shape),
    **dict.fromkeys(_OF_VALUES, of_values),
}
