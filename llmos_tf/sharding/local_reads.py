"""What parallel layers ask of a variable."""

from typing import Any

import tensorflow as tf

from llmos_tf.sharding.layout import Layout
from llmos_tf.sharding.variables import ShardedVariable
from llmos_tf.spmd.program import current_program


def layout_of(variable: Any) -> Layout | None:
    """Returns the layout of a variable inside a program, or None where it is simply whole.

    Args:
        variable: a `keras.Variable` or `tf.Variable`.

    Returns:
        The layout without axes of size 1, or None outside a program, for a variable that is not a
        mesh's, and for a replicated one.
    """
    inner = _unwrapped(variable)
    if current_program() is None or not isinstance(inner, ShardedVariable):
        return None
    return None if inner.layout.is_whole else inner.layout


def local_slice(variable: Any, for_lookups: bool = False) -> tf.Tensor:
    """Returns the slice of a variable that this rank computes with.

    Flat cuts (fsdp) are gathered, cuts of dimensions (tensor) are kept. Outside a program it is
    the whole value. Under a mixed-precision policy it has the layer's compute dtype.

    Args:
        variable: a `keras.Variable` or `tf.Variable`.
        for_lookups: whether rows of it are looked up, and their gradient is noted as rows.

    Returns:
        Tensor of the layout's `slice_shape`.
    """
    inner = _unwrapped(variable)
    if current_program() is None or not isinstance(inner, ShardedVariable):
        return tf.convert_to_tensor(variable)
    return tf.cast(inner.slice(for_lookups), variable.dtype)


def mark_partial_gradient(variable: Any, axis: str) -> None:
    """Says that each rank of `axis` computes only a part of a variable's gradient in this program.

    So of a replicated weight in a region whose activations are split along `axis`, as layer
    normalization under sequence parallelism. The step then sums its gradient over `axis` too.

    Args:
        variable: a `keras.Variable` or `tf.Variable` that is not cut along `axis`.
        axis: mesh axis name.
    """
    program = current_program()
    if program is None or program.mesh.axis_size(axis) == 1:
        return
    key = id(_unwrapped(variable))
    axes = (*program.partial_gradients.get(key, ()), axis)
    program.partial_gradients[key] = program.mesh.canonical_axes(axes)


def read_for_all(variable: Any) -> tf.Tensor:
    """Returns the value of a variable, for what every rank computes alike of it.

    The step sums gradients over the axes of `mark_partial_gradient`. Of the gradient by what is
    returned here each of their ranks takes its share, so that a regularizer counts once.

    Args:
        variable: a `keras.Variable` or `tf.Variable`.

    Returns:
        Tensor of the variable's shape.
    """
    value = tf.convert_to_tensor(variable)
    program = current_program()
    if program is None:
        return value
    key = id(_unwrapped(variable))

    @tf.custom_gradient
    def shared(x):
        def gradient(dy):
            # Asked for here, after the forward pass, when all is marked.
            return dy / program.mesh.axis_size(program.partial_gradients.get(key, ()))

        return tf.identity(x), gradient

    return shared(value)


def _unwrapped(variable: Any) -> Any:
    """The `tf.Variable` inside a `keras.Variable`, not cast by its dtype policy."""
    return getattr(variable, "_value", variable)
