"""What is known of an input of a graph, or of an output, in each inference of shapes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.partition.graph.dims import NOMINAL_LENGTHS

_CONSTANT_SIZE = 64
# For a batch of few rows, for one of many, and for other lengths; see `partition.dims`.
NUM_INFERENCES = 3

Shapes = tuple[tf.TensorShape, ...]

NO_SHAPES: Shapes = (tf.TensorShape(None),) * NUM_INFERENCES


@dataclass(frozen=True)
class Elements:
    """What is known of the elements of a tensor list, or of the value of an optional.

    Of a list of lists it is the elements of the inner ones.

    Args:
        shapes: the shape that all elements have, in each inference; None where there is none yet.
        lengths: how many there are, in each inference; None where it is not known.
        dtype: of the elements; None where it is not known.
        constants: the value of all elements in each inference, where they have one that follows
            from the graph, as shapes have.
    """

    shapes: Shapes | None
    lengths: tuple[int | None, ...] = (None,) * NUM_INFERENCES
    dtype: tf.DType | None = None
    constants: tuple[tuple[int, ...] | int, ...] | None = None


@dataclass(frozen=True)
class Known:
    """What is known of a tensor.

    Args:
        shapes: its shape in each inference.
        constants: its value in each, where it follows from the graph.
        elements: those of a tensor list or of an optional.
    """

    shapes: Shapes
    constants: tuple[Any, ...] | None = None
    elements: Elements | None = None

    def __eq__(self, other: object) -> bool:
        # Only what changes in a loop is compared, and that has no constants.
        if not isinstance(other, Known):
            return NotImplemented
        return (self.shapes, self.elements) == (other.shapes, other.elements)

    def __hash__(self) -> int:
        return hash((self.shapes, self.elements))

    @property
    def has_lengths(self) -> bool:
        """Whether the last inference differs from the first."""
        parts = [self.shapes, self.constants]
        if self.elements is not None:
            parts += [self.elements.shapes, self.elements.lengths, self.elements.constants]
        return any(part is not None and part[0] != part[2] for part in parts)

    def without_constants(self) -> "Known":
        """Returns what is known beside its value."""
        return replace(self, constants=None)

    def without_shapes(self) -> "Known":
        """Returns what holds for every call of a function."""
        elements = None if self.elements is None else Elements(NO_SHAPES)
        return Known(NO_SHAPES, None, elements)


def nominal_shapes(
    shape: tf.TensorShape, has_rows: bool, sizes: tuple[int, int], has_lengths: bool
) -> Shapes:
    """Returns the shapes of an input of the batch: of few rows, of many, and of other lengths.

    Args:
        shape: what the trace knows.
        has_rows: whether the first dimension counts rows.
        sizes: the two numbers of rows.
        has_lengths: whether other dimensions that are not known are given a length.

    Returns:
        A shape for each inference.
    """
    if shape.rank is None:
        return NO_SHAPES
    shapes = []
    for rows, which in ((sizes[0], 0), (sizes[1], 0), (sizes[0], 1)):
        lengths = shape.as_list()
        for i, length in enumerate(lengths):
            if i == 0 and has_rows:
                lengths[i] = rows
            elif length is None and has_lengths and i < len(NOMINAL_LENGTHS):
                lengths[i] = NOMINAL_LENGTHS[i][which]
        shapes.append(tf.TensorShape(lengths))
    return tuple(shapes)


def joined_shapes(shapes: Sequence[Shapes]) -> Shapes:
    """Returns what several shapes have in common, in each inference.

    Args:
        shapes: of several tensors.

    Returns:
        The shapes.
    """
    first, *others = shapes
    for other in others:
        first = tuple(
            a.most_specific_compatible_shape(b) for a, b in zip(first, other, strict=True)
        )
    return first


def joined_elements(elements: Sequence[Elements]) -> Elements:
    """Returns what holds for the elements of several lists.

    Args:
        elements: of the lists.

    Returns:
        What they have in common; a list without elements agrees with every other.
    """
    shapes = [x.shapes for x in elements if x.shapes is not None]
    lengths = elements[0].lengths
    for other in elements[1:]:
        lengths = tuple(a if a == b else None for a, b in zip(lengths, other.lengths, strict=True))
    dtypes = {x.dtype for x in elements if x.dtype is not None}
    stored = {x.constants for x in elements if x.shapes is not None}
    return Elements(
        joined_shapes(shapes) if shapes else None,
        lengths,
        dtypes.pop() if dtypes else None,
        stored.pop() if len(stored) == 1 else None,
    )


def joined_known(values: Sequence[Known]) -> Known:
    """Returns what holds for several values, one of which a tensor has.

    Args:
        values: what is known of each.

    Returns:
        What they have in common, without constants.
    """
    elements = [x.elements for x in values if x.elements is not None]
    return Known(
        joined_shapes([x.shapes for x in values]),
        elements=joined_elements(elements) if len(elements) == len(values) else None,
    )


def constants_of(tensors: Sequence[tf.Tensor]) -> tuple[Any, ...] | None:
    """Returns the values of lengths and the like, on which shapes may depend.

    Args:
        tensors: one in the graph of each inference.

    Returns:
        Integers or tuples of them; None where they do not follow from the graph.
    """
    shape = tensors[0].shape
    if tensors[0].dtype not in (tf.int32, tf.int64) or shape.rank not in (0, 1):
        return None
    if (shape.num_elements() or 0) > _CONSTANT_SIZE:
        return None
    values = tuple(map(_internal.evaluated_constant, tensors))
    if any(value is None for value in values):
        return None
    return tuple(tuple(x.tolist()) if x.ndim else int(x) for x in values)
