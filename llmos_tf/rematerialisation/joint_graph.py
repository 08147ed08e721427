"""A block with its backward pass in one graph, of which it is chosen what is kept.

Selective recomputation keeps the results of the products with weights and computes the rest again:
attention scores, softmax, dropout, norms and activations (arXiv 2205.05198). PyTorch's AOTAutograd
divides its joint graph likewise. Since all is in one graph, what each way of running a block keeps
and computes again can be counted there.
"""

from collections.abc import Iterable

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.graph.buffers import SAME_MEMORY, bytes_of
from llmos_tf.graph.checkpoint_names import said_to_be_kept
from llmos_tf.graph.op_costs import cost_of, is_product
from llmos_tf.graph.outlined_function import Block
from llmos_tf.graph.subgraph import Cut, GraphCuts, Ops

# Ops with a seed of TensorFlow's own, or none, draw other numbers each time.
_RANDOM = ("Random", "Truncated", "Parameterized", "Multinomial", "Stateful")
_CALLS = ("PartitionedCall", "StatefulPartitionedCall", "While", "If", "Case")


class JointBlock:
    """Forward and backward pass of a block.

    Args:
        block: the block, traced.

    Attributes:
        outputs: the differentiable ones, as tensors of the graph.
        sources: the differentiable inputs and captured values.
        upstream: a placeholder for the gradient of each of `outputs`.
        gradients: of `sources`; None where one has none.
    """

    def __init__(self, block: Block):
        self._block, graph = block, block.graph
        before = [op for op in graph.get_operations() if op.type != "Placeholder"]
        self.all_outputs = list(graph.outputs)
        self.outputs = [x for x in self.all_outputs if _is_differentiable(x)]
        self.sources = [x for x in graph.inputs if _is_differentiable(x)]
        with block.entered():
            self.upstream = [tf.compat.v1.placeholder(x.dtype, x.shape) for x in self.outputs]
            # Of an input that is an output too, the gradient of this use.
            targets = [tf.identity(x) for x in self.outputs]
            found = tf.gradients(targets, self.sources, grad_ys=self.upstream)
            self.gradients = [None if g is None else tf.convert_to_tensor(g) for g in found]
        _separate(graph)
        # As the gradients of loops and calls left it: those change their forward pass.
        self._cuts = GraphCuts(graph)
        used = [x for op in before for x in op.inputs]
        self._forward = frozenset(op.name for op in before) | self._cuts.ancestors(used)
        self._operations = [op for op in graph.get_operations() if op.name in self._forward]
        self._wanted = [g for g in self.gradients if g is not None]
        self._all = self._cuts.ancestors(self._wanted)

    def bound(self, values: Iterable[tf.Tensor]) -> dict:
        """Returns the values of the graph's placeholders in a call.

        Args:
            values: for the first of the graph's inputs, the flag of `Block.call` among them.

        Returns:
            Values by `ref()`; what is captured is what the graph has captured.
        """
        graph = self._block.graph
        bound = {inner.ref(): outer for outer, inner in graph.captures}
        bound.update({x.ref(): y for x, y in zip(graph.inputs, values, strict=False)})
        return bound

    def cut_keeping_products(self) -> tuple[Cut, Cut, list[tf.Tensor]]:
        """Returns the two passes, where products are kept and the rest is computed again.

        Returns:
            Forward, to all outputs and what is kept; backward, to the gradients that are not None;
            and what is kept, as tensors of the graph.
        """
        backward, kept = self._keeping_products()
        forward = self._cuts.cut(self._forward, _unique([*self.all_outputs, *kept]))
        return forward, self._cuts.cut(backward, _unique(self._wanted)), kept

    def _keeping_products(self) -> tuple[Ops, list[tf.Tensor]]:
        stays = self._kept_ops()
        backward = self._cuts.ancestors(self._wanted, without=stays)
        kept = [x for x in self._cuts.inputs_of(backward) if x.op.name in stays]
        return backward, kept

    def _kept_ops(self) -> Ops:
        """Names of forward ops whose results are kept."""
        from_inputs = {x.op.name for x in self._block.graph.inputs[1 : 1 + self._num_inputs]}
        kept: set[str] = set()
        for op in self._operations:
            if _draws(op):
                kept.add(op.name)
            if op.type.startswith("CollectiveBcast"):
                # What was sent to this rank, of which a second time nobody would send it. It
                # follows from activations, though from none of this rank's.
                kept.add(op.name)
                from_inputs.add(op.name)
            if not any(x.op.name in from_inputs for x in op.inputs):
                continue
            from_inputs.add(op.name)
            said = said_to_be_kept(op)
            if said is not None:
                kept.update([op.name] if said else [])
                continue
            by_weight = len(op.inputs) > 1 and not all(x.op.name in from_inputs for x in op.inputs)
            if is_product(op):
                # Scores are the product of two activations, and larger than either.
                if by_weight or _is_no_larger(op):
                    kept.add(op.name)
            elif op.type.startswith("Collective") and _is_no_larger(op):
                kept.add(op.name)
            elif op.type == "Sum" and op.inputs[0].op.type.startswith("CollectiveAllToAll"):
                # A rank's part of a sum, of which the others have sent it as much each.
                kept.add(op.name)
        return frozenset(kept)

    @property
    def _num_inputs(self) -> int:
        return len(self._block.inputs)

    # --- counting ---------------------------------------------------------------------------------

    def input_bytes(self) -> int:
        """Returns the bytes of the block's inputs, which a block that runs twice keeps."""
        return sum(map(bytes_of, self._block.inputs))

    def bytes_kept(self) -> int:
        """Returns what is kept of the block where nothing is computed again, in bytes."""
        backward = self._all - self._forward
        return self._bytes([x for x in self._cuts.inputs_of(backward) if self._counts(x)])

    def bytes_kept_of_products(self) -> int:
        """Returns what is kept where products are, and the block's inputs, in bytes."""
        _, kept = self._keeping_products()
        return self.input_bytes() + self._bytes(kept)

    def cost(self) -> float:
        """Returns what it costs to compute the block, in operations of a product."""
        return sum(map(cost_of, self._operations))

    def cost_beside_products(self) -> float:
        """Returns what it costs to compute again what is not kept beside products."""
        backward, _ = self._keeping_products()
        return sum(cost_of(op) for op in self._operations if op.name in backward)

    def _counts(self, x: tf.Tensor) -> bool:
        inputs = {y.ref() for y in self._block.graph.inputs[1 : 1 + self._num_inputs]}
        return x.op.name in self._forward or x.ref() in inputs

    def _bytes(self, tensors: Iterable[tf.Tensor]) -> int:
        """Bytes of tensors, of which some may be the same memory."""
        roots = {_root(x).ref(): bytes_of(x) for x in tensors}
        return sum(roots.values())


def call_keeping_products(block: Block) -> list[tf.Tensor]:
    """Calls a block now, and in its backward pass computes again what is cheap.

    Args:
        block: the block, traced.

    Returns:
        Flat outputs, for `Block.finish`.
    """
    joint = JointBlock(block)
    graph = block.graph
    values = [tf.constant(0), *block.inputs, *block.captured]
    known = joint.bound(values)
    sources = [i for i, x in enumerate(graph.inputs) if _is_differentiable(x)]
    if not sources or not joint.outputs or not any(g is not None for g in joint.gradients):
        return block.call(block.inputs, block.captured)
    forward, backward, kept = joint.cut_keeping_products()

    @tf.custom_gradient
    def run(*differentiable):
        given = dict(known)
        for source, value in zip(joint.sources, differentiable, strict=True):
            given[source.ref()] = value
        made = dict(zip([x.ref() for x in forward.fetches], forward(given), strict=True))

        def gradient(*upstream):
            of_outputs = dict(zip([x.ref() for x in joint.all_outputs], upstream, strict=True))
            feeds = {**given, graph.inputs[0].ref(): tf.constant(1)}
            # Not before the gradient is here, or all blocks would be computed again at once.
            with tf.control_dependencies([dy for dy in upstream if dy is not None]):
                feeds |= {x.ref(): tf.identity(made[x.ref()]) for x in kept}
                feeds |= {x.ref(): tf.identity(given[x.ref()]) for x in joint.sources}
            for placeholder, output in zip(joint.upstream, joint.outputs, strict=True):
                dy = of_outputs[output.ref()]
                if dy is None:
                    dy = tf.zeros_like(made[output.ref()])
                feeds[placeholder.ref()] = tf.convert_to_tensor(dy)
            found = dict(zip([x.ref() for x in backward.fetches], backward(feeds), strict=True))
            return [None if g is None else found[g.ref()] for g in joint.gradients]

        return [made[x.ref()] for x in joint.all_outputs], gradient

    return list(run(*[values[i] for i in sources]))


def _separate(graph: tf.Graph) -> None:
    """Has ops take what went into an `IdentityN` in place of what comes out of it.

    A custom gradient puts its results and its arguments through one: who needs a sum over ranks
    would need each rank's part as well.
    """
    for op in graph.get_operations():
        if op.type == "IdentityN":
            for before, after in zip(op.inputs, op.outputs, strict=True):
                for user in after.consumers():
                    _internal.replace_input(user, after, before)


def _is_differentiable(x: tf.Tensor) -> bool:
    return x.dtype.is_floating or x.dtype.is_complex


def _is_no_larger(op: tf.Operation) -> bool:
    """Whether the result is no larger than what it is made of."""
    return sum(map(bytes_of, op.outputs)) <= max(map(bytes_of, op.inputs))


def _draws(op: tf.Operation) -> bool:
    """Whether an op would draw other numbers the second time."""
    return op.op_def.is_stateful and op.type.startswith(_RANDOM) and op.type not in _CALLS


def _root(x: tf.Tensor) -> tf.Tensor:
    """The tensor whose memory it is."""
    while x.op.type in SAME_MEMORY and x.op.inputs:
        x = x.op.inputs[0]
    return x


def _unique(tensors: Iterable[tf.Tensor]) -> list[tf.Tensor]:
    return list({x.ref(): x for x in tensors}.values())
