"""What a program looks up in a table: tokens of its own rows, or positions, the same everywhere.

The gradient of a lookup has a row for each index, and Keras's adaptive optimizers square each row
by itself. On one device a batch of tokens has all ranks' rows, one after the other. Positions,
looked up once for all rows of the batch, have one row each, which is a sum over the batch; so there
the ranks' rows are added up.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from llmos_tf.spmd.program import current_program

# Ops that keep numbers apart which are: other forms of the same, or shifted by one number for all,
# as where Keras lets negative indices count from the end.
_FORMS = ("Reshape", "ExpandDims", "Squeeze", "Identity", "Cast")
_SHIFTS = ("AddV2", "Sub", "SelectV2", "Less")


def note_lookup(variable: Any, indices: tf.Tensor) -> None:
    """Tells the program what is looked up in a table, before it is.

    Args:
        variable: a variable of the mesh.
        indices: row numbers.
    """
    if are_positions(indices):
        current_program().looked_up_by_position.add(id(variable))


def are_positions(indices: Any) -> bool:
    """Returns whether indices follow from no row of the batch, and each is there once.

    Args:
        indices: a tensor of the program.

    Returns:
        False also where the graph does not tell.
    """
    return _kind(tf.convert_to_tensor(indices)) == "distinct"


def _kind(x: tf.Tensor) -> str | None:
    """Returns "distinct", "scalar", or None for what may repeat or differ between ranks."""
    value = tf.get_static_value(x)
    if value is not None:
        if value.ndim == 0:
            return "scalar"
        return "distinct" if len(np.unique(value)) == value.size else None
    if not tf.is_symbolic_tensor(x):
        return None
    if x.shape.rank == 0:
        return "scalar" if _is_of_shapes(x) else None
    if x.op.type == "Range":
        return "distinct"
    if x.op.type in _FORMS:
        return _kind(x.op.inputs[0])
    if x.op.type == "StridedSlice" and all(_is_of_shapes(end) for end in x.op.inputs[1:]):
        return _kind(x.op.inputs[0])
    if x.op.type in _SHIFTS:
        kinds = [_kind(source) for source in x.op.inputs]
        if None not in kinds and "distinct" in kinds:
            return "distinct"
    return None


def _is_of_shapes(x: tf.Tensor) -> bool:
    """Whether a number follows from constants and shapes, and from no row of the batch."""
    if tf.get_static_value(x) is not None or x.op.type in ("Shape", "Size", "Rank"):
        return True
    if not x.op.inputs or x.op.op_def.is_stateful:
        return False
    return all(_is_of_shapes(source) for source in x.op.inputs)
