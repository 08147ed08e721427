"""Ops on the handles of variables, and ops that no rank can run."""

from llmos_tf.partition.graph.choice import Choice
from llmos_tf.partition.graph.flat_graph import Node
from llmos_tf.partition.manual import Storage

# By what method of a storage an op writes.
ASSIGNMENTS = {
    "AssignAddVariableOp": "assign_add",
    "AssignSubVariableOp": "assign_sub",
    "AssignVariableOp": "assign",
}
# What calls Python, by the start of its name.
PYTHON = ("EagerPyFunc", "PyFunc")


def of_variable(node: Node, storage: Storage) -> Choice:
    """Returns how an op uses a variable of the mesh.

    Args:
        node: the op, whose first input is the handle.
        storage: of the variable.

    Returns:
        The choice.

    Raises:
        ValueError: an op that neither reads nor assigns.
    """
    if node.type == "ReadVariableOp":
        return Choice((None,), (storage.placement,), lambda e, n, x: [e.read(storage)])
    if node.type not in ASSIGNMENTS:
        raise ValueError(refusal_of_use(node))
    method = ASSIGNMENTS[node.type]

    def emit(emission, node, inputs):
        storage.write(emission, method, inputs[1])
        return []

    return Choice((None, storage.placement), (), emit)


def refusal_of_use(node: Node) -> str:
    """Returns why an op that takes the handle of a variable is refused."""
    return (
        f"The step uses a variable in {node.name} by {node.type}, which is not known for a "
        "variable of a mesh. Read it, compute the new value, and assign it by assign, assign_add "
        "or assign_sub."
    )


def refusal_of_python(node: Node) -> str:
    """Returns why an op that calls Python is refused."""
    return (
        f"The step calls Python in {node.name} by {node.type} (tf.py_function or "
        "tf.numpy_function), which every rank of the mesh would call, each with rows of its own. "
        "Call it in the input pipeline, in tf.data.Dataset.map, or write it with TensorFlow ops."
    )
