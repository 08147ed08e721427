"""Products with a kernel that is cut over `tensor`: Keras's `Dense` and `EinsumDense`.

Which letter of the kernel is cut decides (Megatron-LM, arXiv 1909.08053, section 3):

| the letter is in | enter | a rank computes | leave |
|---|---|---|---|
| the output (columns) | f: copy, backward all-reduce | its part of Y, bias, activation | gather |
| the input (rows), summed | take the own part | a partial sum of Y | all-reduce, then the bias |
| both | take the own part | its part of Y, bias, activation | gather |

Gathering Y keeps, of its gradient, the rank's own part: what follows is computed alike on every
rank. An activation that mixes entries, such as softmax, is computed after the gather.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import activations, ops

from llmos_tf import collectives
from llmos_tf.sharding import layout_of, local_slice
from llmos_tf.spmd.program import current_program

AXIS = "tensor"

# Activations that can be computed on a slice. Any other, such as a function of the user's own, gets
# the whole.
_ELEMENTWISE = (
    activations.celu,
    activations.elu,
    activations.exponential,
    activations.gelu,
    activations.hard_sigmoid,
    activations.hard_silu,
    activations.leaky_relu,
    activations.linear,
    activations.mish,
    activations.relu,
    activations.relu6,
    activations.selu,
    activations.sigmoid,
    activations.silu,
    activations.softplus,
    activations.softsign,
    activations.tanh,
)

_EQUATION = re.compile(
    r"(?:\.\.\.)?([a-zA-Z]+)(\.\.\.)?,([a-zA-Z]+)->(?:\.\.\.)?([a-zA-Z]+)(?:\.\.\.)?"
)


class Cut(NamedTuple):
    """Where the cut letter of a kernel lies in the product.

    Attributes:
        input_dim: its dim of the input, or None where the input has none: columns.
        output_dim: its dim of the output, or None where it is summed over: rows.
    """

    input_dim: int | None
    output_dim: int | None


# Of x A.
_COLUMNS, _ROWS = Cut(None, -1), Cut(-1, None)


def cut_of(equation: str, kernel_dim: int) -> Cut | None:
    """Finds a dim of the kernel in the input and output of an einsum product.

    Args:
        equation: of `keras.layers.EinsumDense`, such as "...x,xy->...y".
        kernel_dim: the kernel's dim that is cut.

    Returns:
        Dims counted from the end, or from the start where an ellipsis is at the end; None where
        the letter occurs twice in one of them.
    """
    match = _EQUATION.fullmatch(equation)
    if match is None:
        return None
    inputs, ends_in_ellipsis, kernel, outputs = match.groups()
    letter = kernel[kernel_dim]
    if any(spec.count(letter) > 1 for spec in (inputs, kernel, outputs)):
        return None

    def place(spec):
        if letter not in spec:
            return None
        return spec.index(letter) - (0 if ends_in_ellipsis else len(spec))

    return Cut(place(inputs), place(outputs))


def cut_dim(variable: Any) -> int | None:
    """Returns the dim of a variable that is cut over `tensor`, if that is all that is cut.

    Args:
        variable: a `keras.Variable`, or None.

    Returns:
        The dim; None also where the slices are padded.
    """
    layout = None if variable is None else layout_of(variable)
    if layout is None or [axis for axis in layout.dims if axis is not None] != [AXIS]:
        return None
    dim = layout.dims.index(AXIS)
    return None if variable.shape[dim] % collectives.axis_size(AXIS) else dim


def product_cut(layer: keras.layers.Layer, x: Any) -> Cut | None:
    """Returns how a `Dense` or `EinsumDense` can compute on a slice of its kernel.

    Args:
        layer: the layer.
        x: its input.

    Returns:
        The cut, or None where it has to read the whole kernel.
    """
    is_dense = isinstance(layer, keras.layers.Dense)
    kind = keras.layers.Dense if is_dense else keras.layers.EinsumDense
    dim = cut_dim(getattr(layer, "_kernel", None))
    if dim is None or not is_usual(layer, x) or type(layer).kernel is not kind.kernel:
        return None
    if is_dense:
        return _COLUMNS if dim == 1 else _ROWS
    return cut_of(layer.equation, dim)


def is_usual(layer: keras.layers.Layer, x: Any) -> bool:
    """Returns whether a layer computes with its weights as they are, on a dense input.

    Args:
        layer: the layer.
        x: its input.

    Returns:
        False with LoRA, quantized, or for a sparse or ragged input.
    """
    is_plain = not layer.lora_enabled and layer.quantization_mode is None
    return is_plain and isinstance(x, tf.Tensor)


def is_elementwise(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer's activation can be computed on a slice.

    Args:
        layer: a `Dense` or `EinsumDense`.

    Returns:
        False for what mixes entries, or may.
    """
    return layer.activation is None or layer.activation in _ELEMENTWISE


def dense_call(original: Callable) -> Callable:
    """Returns what stands in for `keras.layers.Dense.call`.

    Args:
        original: Keras's own.

    Returns:
        A function of the layer and its arguments.
    """

    @functools.wraps(original)
    def call(layer, inputs, *args, **kwargs):
        cut = product_cut(layer, inputs)
        if cut is None:
            return original(layer, inputs, *args, **kwargs)
        return leave(layer, multiply(layer, enter(inputs, cut), cut), cut)

    return call


def enter(x: tf.Tensor, cut: Cut) -> tf.Tensor:
    """Brings a whole activation to where the ranks share the work.

    Args:
        x: the same on every rank.
        cut: of the product.

    Returns:
        What a rank multiplies.
    """
    if cut.input_dim is None:
        return collectives.copy_to_axis(x, AXIS)
    return collectives.split_to_axis(x, AXIS, cut.input_dim)


def multiply(layer: keras.layers.Layer, x: tf.Tensor, cut: Cut) -> tf.Tensor:
    """Multiplies with this rank's slice of the kernel, adds the bias and activates.

    Args:
        layer: a `Dense` or `EinsumDense`.
        x: as `enter` returns it.
        cut: of the product.

    Returns:
        This rank's part of the output, where the activation is for `leave` unless it is
        elementwise; the whole output where the cut letter is summed over.
    """
    kernel = slice_of(layer._kernel)
    if isinstance(layer, keras.layers.Dense):
        y = ops.matmul(x, kernel)
    else:
        y = ops.einsum(layer.equation, x, kernel)
    if cut.output_dim is None:
        y = collectives.reduce_from_axis(y, AXIS)
    if layer.bias is not None:
        bias = _bias_of(layer.bias, y.shape.rank, cut.output_dim)
        # Keras takes a bias of shape (n, 1) for one of the last dim where that has the length n,
        # as a slice may have by chance.
        y = ops.add(y, bias) if cut.output_dim is None or len(bias.shape) == 1 else y + bias
    if cut.output_dim is None or is_elementwise(layer):
        y = _activated(layer, y)
    return y


def leave(layer: keras.layers.Layer, y: tf.Tensor, cut: Cut) -> tf.Tensor:
    """Brings a product back to an activation that every rank has whole.

    Args:
        layer: a `Dense` or `EinsumDense`.
        y: as `multiply` returns it.
        cut: of the product.

    Returns:
        The layer's output.
    """
    if cut.output_dim is None:
        return y
    y = collectives.gather_from_axis(y, AXIS, cut.output_dim)
    return y if is_elementwise(layer) else _activated(layer, y)


def slice_of(variable: Any) -> tf.Tensor:
    """Returns this rank's slice of a kernel or table, and notes that its gradient is dense.

    A table's gradient is that of its lookups only where nothing else reads it
    (`ShardedVariable.sparse_gradient`).

    Args:
        variable: a `keras.Variable` of the mesh.

    Returns:
        The slice, in the compute dtype.
    """
    reads = reads_of(variable)

    @tf.custom_gradient
    def noted(x):
        def gradient(upstream):
            reads.append(None)
            return upstream

        return tf.identity(x), gradient

    return noted(local_slice(variable, for_lookups=True))


def reads_of(variable: Any) -> list[tf.IndexedSlices | None]:
    """Returns the program's list of gradients of the reads of a variable.

    Args:
        variable: a `keras.Variable` of the mesh.

    Returns:
        The list, to append to.
    """
    # Not `value`, which is a cast copy under a mixed-precision policy.
    return current_program().read_gradients.setdefault(id(variable._value), [])


def _bias_of(bias: Any, rank: int, output_dim: int | None) -> Any:
    """What a rank adds to its part, of `rank` dims and cut at `output_dim`, of the output."""
    # A bias lies along the last dims of the output.
    dim = -1
    if output_dim is not None:
        dim = len(bias.shape) + (output_dim - rank if output_dim >= 0 else output_dim)
    if dim >= 0 and cut_dim(bias) == dim:
        return local_slice(bias)
    whole = ops.convert_to_tensor(bias)
    if dim < 0 or bias.shape[dim] == 1:
        return whole
    return collectives.split_to_axis(whole, AXIS, dim)


def _activated(layer: keras.layers.Layer, y: tf.Tensor) -> tf.Tensor:
    return y if layer.activation is None else layer.activation(y)
