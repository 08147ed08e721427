"""What is made of weights alone, made once more of the same weights.

The backward pass of a block uses its weights as they are, or what the forward pass has made of them
alone: cast, transposed or in another shape. All of that has to be there again where the weights
were let go.
"""

from collections.abc import Iterable
from typing import NamedTuple

import tensorflow as tf

from llmos_tf import _internal

# A tensor of the forward pass, and the same once more.
Pair = tuple[tf.Tensor, tf.Tensor]

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_VIEWS = ("Identity", "Reshape", "Cast")


class CallViews(NamedTuple):
    """What a function that is called makes of its inputs by another shape or type alone.

    A function hands what its gradient function needs to that one as results, its inputs too.
    TensorFlow adds such results to a call when it is differentiated.

    Args:
        op: the call.
        again: the same made once more, by the name of the tensor in the function's graph.
    """

    op: tf.Operation
    again: dict[str, tf.Tensor]

    def returned(self) -> list[Pair]:
        """Returns the results of the call that are one of these, each with the same once more."""
        results = _graph_of(self.op).outputs
        return [
            (output, self.again[result.name])
            for output, result in zip(self.op.outputs, results, strict=False)
            if result.name in self.again
        ]


def views_in_calls(again: list[Pair]) -> list[CallViews]:
    """Makes once more what called functions make of tensors by another shape or type alone.

    Args:
        again: tensors that may be arguments of calls, and the same once more.

    Returns:
        For each call what it may return.
    """
    found: dict[str, CallViews] = {}
    for before, now in again:
        for op in before.consumers():
            if op.type not in _CALLS:
                continue
            views = found.setdefault(op.name, CallViews(op, {}))
            for x, inside in zip(op.inputs, _graph_of(op).inputs, strict=True):
                if x is before:
                    views.again.update(_views(inside, now))
    return list(found.values())


def _views(inside: tf.Tensor, now: tf.Tensor, is_cast: bool = False) -> dict[str, tf.Tensor]:
    """An input of a function, and what it is in other shapes and one other type."""
    found = {inside.name: now}
    for op in inside.consumers():
        casts = op.type == "Cast"
        # Cast twice it would have lost bits in between.
        if op.type not in _VIEWS or op.inputs[0] is not inside or (casts and is_cast):
            continue
        (y,) = op.outputs
        if y.shape.is_fully_defined():
            found.update(_views(y, tf.reshape(tf.cast(now, y.dtype), y.shape), is_cast or casts))
    return found


def _graph_of(op: tf.Operation) -> tf.Graph:
    return _internal.graph_of_function(op.graph, op.get_attr("f").name)


def made_again(gathered: list[Pair]) -> list[Pair]:
    """Computes again what the forward pass has made of gathered weights alone.

    Args:
        gathered: each weight, and the same one gathered again.

    Returns:
        What was made, and the same once more.
    """
    again = {value.ref(): now for value, now in gathered}
    ops = _used_elsewhere(_made_of([value for value, _ in gathered]))
    if not ops:
        return []
    names = {op.name for op in ops}
    definition = tf.compat.v1.GraphDef()
    definition.versions.CopyFrom(ops[0].graph.graph_def_versions)
    for op in ops:
        node = definition.node.add()
        node.CopyFrom(op.node_def)
        node.attr.pop("_class", None)
        inputs = [x for x in node.input if not x.startswith("^")]
        del node.input[:]
        node.input.extend(inputs)
    outside = {
        x.name: again.get(x.ref(), x) for op in ops for x in op.inputs if x.op.name not in names
    }
    made = [x for op in ops for x in op.outputs]
    with _internal.stop_recording():
        copies = tf.import_graph_def(
            definition,
            input_map=outside,
            return_elements=[x.name for x in made],
            name="of_gathered_again",
        )
    return list(zip(made, copies, strict=True))


def _made_of(weights: Iterable[tf.Tensor]) -> list[tf.Operation]:
    """The ops that compute of some tensors and constants alone, in an order to compute them in."""
    known = {x.ref() for x in weights}
    found: dict[str, tf.Operation] = {}
    unfinished = list(weights)
    while unfinished:
        for op in unfinished.pop().consumers():
            if op.name in found or op.op_def.is_stateful or _calls_functions(op):
                continue
            if all(x.ref() in known or x.op.type == "Const" for x in op.inputs):
                found[op.name] = op
                known.update(x.ref() for x in op.outputs)
                unfinished += op.outputs
    return list(found.values())


def _used_elsewhere(ops: list[tf.Operation]) -> list[tf.Operation]:
    """Those of some ops that others than these depend on."""
    names = {op.name for op in ops}
    needed: set[str] = set()
    for op in reversed(ops):
        users = {user.name for x in op.outputs for user in x.consumers()}
        if users - names or users & needed:
            needed.add(op.name)
    return [op for op in ops if op.name in needed]


def _calls_functions(op: tf.Operation) -> bool:
    return any(attribute.type in ("func", "list(func)") for attribute in op.op_def.attr)
