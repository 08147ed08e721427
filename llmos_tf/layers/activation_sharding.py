"""The stream of a language model: what of a batch a rank carries through the layers.

On the way from its tokens to its logits a model computes position by position, attention and
mixture layers apart. So ranks that are given the same rows can each take a part of them, and only
those two kinds of layers communicate. Words:

- *stream*: all activations of shape ``[B, T, ...]`` between the tokens and the logits, residual
  stream included. A rank's own part of it is ``[B/r, T/p, ...]``.
- *row axes*, of size r together: their ranks split the rows of their common batch.
- *position axes*, of size p together: their ranks split the positions of each row. In what order
  is the *placement*:
    - contiguous: rank i holds the i-th of p equal pieces;
    - zigzag: the sequence is cut into 2p pieces, and rank i holds pieces i and 2p-1-i, in this
      order. A late position sees more keys than an early one; so every rank has as many to compute.
- *entering*: taking the own part of what every rank has. *Leaving*: gathering all parts, so that
  every rank has them in natural order.

The axis `context` splits positions. The axis `expert` splits rows where it divides their number,
and else positions together with `context`; so what is no mixture layer is not computed once for
each expert rank. Under sequence parallelism a rank's positions are split once more over `tensor`,
between the tensor-parallel regions of a block (`layers.tensor_region`).

Of every variable that is used in the stream a rank has only the gradient by its own part. They are
all noted as partial (`sharding.mark_partial_gradient`), and the step sums them over the axes.
"""

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.mesh import Mesh
from llmos_tf.sharding import mark_partial_gradient
from llmos_tf.spmd.program import ReplicaProgram, current_program


class Stream:
    """How the stream is split in a program; without axes it is whole.

    Args:
        row_axes: mesh axes that split rows.
        position_axes: mesh axes that split positions.
        zigzag: whether positions are placed in zigzag, else contiguously.

    Example:
        >>> stream = open_stream(model, tokens.shape)
        >>> with entered(stream):
        ...     x = layers(stream.enter(tokens))
        >>> logits = stream.leave(x)
    """

    def __init__(
        self,
        row_axes: tuple[str, ...] = (),
        position_axes: tuple[str, ...] = (),
        zigzag: bool = False,
    ):
        self.row_axes = row_axes
        self.position_axes = position_axes
        self.zigzag = zigzag

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes that split the stream. What is a sum over it is a sum over them too."""
        return (*self.row_axes, *self.position_axes)

    def enter(self, x: tf.Tensor) -> tf.Tensor:
        """Takes this rank's part of a tensor; backward gathers the parts' cotangents.

        Args:
            x: ``[B, T, ...]``, the same on every rank of the axes.

        Returns:
            ``[B/r, T/p, ...]``.

        Raises:
            ValueError: the axes do not divide the dimensions.
        """  # noqa: DOC502
        if self.row_axes:
            x = collectives.split_to_axis(x, self.row_axes, dim=0)
        return self._own_positions(x, dim=1) if self.position_axes else x

    def leave(self, x: tf.Tensor) -> tf.Tensor:
        """Gathers the ranks' parts; of the cotangent each rank keeps its part.

        Args:
            x: ``[B/r, T/p, ...]``.

        Returns:
            ``[B, T, ...]`` in natural order, the same on every rank of the axes.
        """
        if self.position_axes:
            x = collectives.gather_from_axis(x, self.position_axes, dim=1)
            if self.zigzag:
                x = _reordered(x, np.argsort(self._pieces()), dim=1)
        if self.row_axes:
            x = collectives.gather_from_axis(x, self.row_axes, dim=0)
        return x

    def positions(self, length: int | tf.Tensor) -> tf.Tensor:
        """Returns the positions in the sequence that this rank's entries stand for.

        Args:
            length: T/p, entries of this rank along the positions.

        Returns:
            int32 ``[T/p]``.
        """
        if not self.position_axes:
            return tf.range(length)
        total = length * collectives.axis_size(self.position_axes)
        return self._own_positions(tf.range(total), dim=0)

    def _own_positions(self, x: tf.Tensor, dim: int) -> tf.Tensor:
        if self.zigzag:
            x = _reordered(x, self._pieces(), dim)
        return collectives.split_to_axis(x, self.position_axes, dim)

    def _pieces(self) -> list[int]:
        """The zigzag's pieces of the sequence, in the order of the ranks that hold them."""
        ways = collectives.axis_size(self.position_axes)
        return [piece for rank in range(ways) for piece in (rank, 2 * ways - 1 - rank)]


def open_stream(variables: Iterable[Any], shape: tf.TensorShape) -> Stream:
    """Decides how a batch is split, and notes that the model's gradients are partial.

    Args:
        variables: the model's variables that are trained.
        shape: ``[B, T]`` of the tokens; None where a size is not static.

    Returns:
        The stream, without axes outside a program and where nothing is to be split.

    Raises:
        ValueError: the positions cannot be split over the `context` axis.
    """  # noqa: DOC502
    program = current_program()
    if program is None:
        return Stream()
    stream = _stream_for(program, *shape)
    for variable in variables:
        for axis in stream.axes:
            mark_partial_gradient(variable, axis)
    return stream


def entered(stream: Stream) -> contextlib.AbstractContextManager:
    """Returns the context of a model's call, in which layers find the stream as `program.stream`.

    A weight that is used twice in the call, as a table for tokens and logits, is gathered once.

    Args:
        stream: as `open_stream` returns it.

    Returns:
        The context. There `program.stream` is None where nothing is split.
    """
    program = current_program()
    if program is None:
        return contextlib.nullcontext()
    return program.having(stream=stream if stream.axes else None, reads={})


def current_stream() -> Stream | None:
    """Returns the stream that is split, inside a model's layers in a program; else None."""
    program = current_program()
    return None if program is None else program.stream


def check_positions(mesh: Mesh, options: Any, length: int | None) -> None:
    """Checks that the `context` axis can split the positions of a batch.

    Args:
        mesh: the mesh.
        options: has `context_method` and `sequence_parallel`, as the strategy and a program.
        length: T, number of positions, None where it is not static.

    Raises:
        ValueError: it cannot.
    """
    ways = mesh.axis_size("context")
    unit = _length_unit(mesh, options, ("context",))
    if ways == 1 or (length is not None and length % unit == 0):
        return
    also = " and sequence_parallel=True" if options.sequence_parallel else ""
    if length is None:
        raise ValueError(
            f"The mesh {mesh} splits positions over context={ways}, and the number of positions is "
            f"not known when the step is traced. Give tokens of a static length, a multiple of "
            f"{unit}; rows may vary."
        )
    near = max(unit, round(length / unit) * unit)
    raise ValueError(
        f"With context={ways}, context_method={options.context_method!r}{also}, the number of "
        f"positions is a multiple of {unit}. Received: {length}. {near} would work, or another "
        "context axis."
    )


def _stream_for(program: ReplicaProgram, rows: int | None, length: int | None) -> Stream:
    mesh, zigzag = program.mesh, program.context_method == "ring"
    check_positions(mesh, program, length)
    positions = tuple(axis for axis in ("context",) if mesh.axis_size(axis) > 1)
    expert = mesh.axis_size("expert")
    if expert == 1:
        return Stream((), positions, zigzag)
    if rows is not None and rows % expert == 0:
        return Stream(("expert",), positions, zigzag)
    both = ("expert", *positions)
    if length is not None and length % _length_unit(mesh, program, both) == 0:
        return Stream((), both, zigzag)
    return Stream((), positions, zigzag)


def _length_unit(mesh: Mesh, options: Any, axes: tuple[str, ...]) -> int:
    """What the number of positions is a multiple of, to be split over axes."""
    pieces = 2 if options.context_method == "ring" else 1
    tensor = mesh.axis_size("tensor") if options.sequence_parallel else 1
    return mesh.axis_size(axes) * math.lcm(pieces, tensor)


def _reordered(x: tf.Tensor, pieces: Any, dim: int) -> tf.Tensor:
    """The equal pieces of `x` along a dim in another order."""
    parts = tf.split(x, len(pieces), dim)
    return tf.concat([parts[piece] for piece in pieces], dim)
