"""The ops of a traced function, as two processes can compare them.

Names of ops and functions, their order and their devices may differ between processes that have
traced the same Python code; kinds of ops, their attributes and constants do not.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

# Attributes that number objects of a process, or name them.
_OWN = ("container", "shared_name", "token", "cont_name")
# Elements of a constant that are shown.
_SHOWN = 4


def op_counts(concrete: Any) -> dict[str, str]:
    """Counts the ops of a function and of the functions that it calls.

    Args:
        concrete: a concrete function.

    Returns:
        By what an op does, how many there are.
    """
    counts = Counter(map(_described, _nodes(concrete.graph.as_graph_def())))
    return {text: str(count) for text, count in sorted(counts.items())}


def _nodes(definition: Any) -> Iterator[Any]:
    yield from definition.node
    for function in definition.library.function:
        yield from function.node_def


def _described(node: Any) -> str:
    attributes = [
        f"{name}={_value(node.attr[name])}"
        for name in sorted(node.attr)
        if not name.startswith("_") and name not in _OWN
    ]
    return " ".join([node.op, *attributes])


def _value(attribute: Any) -> str:
    if attribute.HasField("func") or attribute.list.func:
        # Its ops are counted too.
        return "function"
    if attribute.HasField("tensor"):
        array = tf.make_ndarray(attribute.tensor)
        if array.size <= _SHOWN:
            return str(array.tolist())
        return hashlib.sha256(array.tobytes()).hexdigest()[:12]
    if attribute.HasField("type"):
        return tf.as_dtype(attribute.type).name
    if attribute.HasField("shape"):
        return str([d.size for d in attribute.shape.dim])
    return " ".join(str(attribute).split())
