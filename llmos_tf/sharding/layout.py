"""How one variable lies on a mesh, and the arithmetic of its parts."""

import math
from dataclasses import dataclass

import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.mesh import Mesh


@dataclass(frozen=True)
class Layout:
    """How a tensor is cut over a mesh.

    First each dimension is cut into equal slices along its axis (`dims`, used sharded by parallel
    layers). What a rank then has is flattened and cut along the `flat` axes in turn, padded with
    zeros at the end where they do not divide it (fsdp parameters and ZeRO optimizer state). Flat
    buffers shard a bias of 3 elements as well as a matrix, so memory follows the formulas.

    Args:
        dims: an axis name or None per dimension, as in `keras.distribution.TensorLayout`.
        flat: axes along which the flattened slice is cut, outermost first.
        uneven: whether an axis may leave the last slices of a dimension shorter; they are padded
            with zeros to the length of the others. Only for layers that know it, such as the
            vocabulary-parallel embedding of 50,257 tokens over 2 ranks.
        stages: the positions on `pipe` whose ranks hold it, in order; None for all. Ranks of the
            others store nothing, a part of shape ``(0,)``.

    Example:
        >>> Layout((None, "tensor")).part_shape((4, 8), Mesh(tensor=2))
        (4, 4)
        >>> Layout((None, "tensor"), ("fsdp",)).part_shape((4, 8), Mesh(tensor=2, fsdp=3))
        (6,)
    """

    dims: tuple[str | None, ...]
    flat: tuple[str, ...] = ()
    uneven: bool = False
    stages: tuple[int, ...] | None = None

    def effective(self, mesh: Mesh) -> "Layout":
        """Returns the layout without the axes that have size 1 on `mesh`.

        Args:
            mesh: the mesh.

        Returns:
            A layout that cuts the same parts.
        """
        return Layout(
            tuple(a if a is not None and mesh.axis_size(a) > 1 else None for a in self.dims),
            tuple(a for a in self.flat if mesh.axis_size(a) > 1),
            self.uneven,
            self.stages,
        )

    def check(self, path: str, shape: tuple[int, ...], mesh: Mesh) -> None:
        """Checks that the layout fits a variable.

        Args:
            path: the variable's path, for the error.
            shape: its full shape.
            mesh: the mesh.

        Raises:
            ValueError: wrong rank, an axis used twice, or one that does not divide its dimension.
        """
        if len(self.dims) != len(shape):
            raise ValueError(
                f"The layout {self.dims} of the variable {path} names {len(self.dims)} dimensions; "
                f"its shape is {shape}. Give one axis name or None for each dimension."
            )
        used = [axis for axis in (*self.dims, *self.flat) if axis is not None]
        if len(set(used)) != len(used):
            raise ValueError(f"The layout {self.dims} of the variable {path} uses an axis twice.")
        for dim, axis in enumerate(self.dims):
            if axis is not None and not self.uneven and shape[dim] % mesh.axis_size(axis):
                raise ValueError(
                    f"The variable {path} of shape {shape} is laid out as {self.dims}, but the "
                    f"axis {axis} of size {mesh.axis_size(axis)} does not divide its dimension "
                    f"{dim} of {shape[dim]}. Choose a size of {axis} that divides {shape[dim]}, "
                    "or another layout."
                )

    @property
    def is_whole(self) -> bool:
        """Whether every rank that holds it holds the full tensor."""
        return not self.flat and all(axis is None for axis in self.dims)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes along which it is cut, `pipe` aside."""
        return tuple(axis for axis in (*self.dims, *self.flat) if axis is not None)

    def is_on(self, stage: int) -> bool:
        """Returns whether ranks at a position on `pipe` hold it.

        Args:
            stage: the position.

        Returns:
            Whether it is one of `stages`.
        """
        return self.stages is None or stage in self.stages

    def slice_shape(self, shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...]:
        """Returns the shape after the dimensions were cut, before flattening.

        Args:
            shape: full shape.
            mesh: the mesh.

        Returns:
            The shape that parallel layers compute with.
        """
        return tuple(
            length if axis is None else -(-length // mesh.axis_size(axis))
            for length, axis in zip(shape, self.dims, strict=True)
        )

    def flat_lengths(self, shape: tuple[int, ...], mesh: Mesh) -> list[int]:
        """Returns lengths of the flat buffer before each flat cut and after the last.

        Args:
            shape: full shape.
            mesh: the mesh.

        Returns:
            ``1 + len(flat)`` lengths; each is the one before, divided by an axis and rounded up.
        """
        lengths = [math.prod(self.slice_shape(shape, mesh))]
        for axis in self.flat:
            lengths.append(-(-lengths[-1] // mesh.axis_size(axis)))
        return lengths

    def part_shape(self, shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...]:
        """Returns the shape that one rank stores.

        Args:
            shape: full shape.
            mesh: the mesh.

        Returns:
            The slice's shape, or the length of its flat part.
        """
        if not self.flat:
            return self.slice_shape(shape, mesh)
        return (self.flat_lengths(shape, mesh)[-1],)

    # --- parts of a full tensor outside a program: one process sees every rank ------------------

    def part_of(self, full: tf.Tensor, mesh: Mesh, rank: int) -> tf.Tensor:
        """Cuts from the full tensor what `rank` stores.

        Args:
            full: the whole value.
            mesh: the mesh.
            rank: whose part.

        Returns:
            Tensor of `part_shape`; of shape ``(0,)`` where the rank's stage does not hold it.
        """
        where = mesh.coordinate(rank)
        if not self.is_on(where["pipe"]):
            return tf.zeros([0], full.dtype)
        shape = tuple(full.shape)
        slices = self.slice_shape(shape, mesh)
        begin = [
            0 if axis is None else where[axis] * length
            for axis, length in zip(self.dims, slices, strict=True)
        ]
        # Not `slices == shape`: one row over two ranks leaves slices of one row, the second empty.
        if any(axis is not None for axis in self.dims):
            part = tf.slice(self._padded(full, mesh), begin, slices)
        elif not self.flat:
            return full
        else:
            part = full
        if self.flat:
            part = tf.reshape(part, [-1])
        for axis, length in zip(self.flat, self.flat_lengths(shape, mesh)[1:], strict=True):
            part = pad_to(part, length * mesh.axis_size(axis))
            part = part[where[axis] * length : (where[axis] + 1) * length]
        # A slice along dimension 0 is a view, and whoever stores it keeps all of the full tensor.
        return tf.raw_ops.DeepCopy(x=part)

    def join(self, parts: dict[int, tf.Tensor], shape: tuple[int, ...], mesh: Mesh) -> tf.Tensor:
        """Puts the full tensor together.

        Args:
            parts: rank to what it stores; ranks that hold the same part may be left out.
            shape: full shape.
            mesh: the mesh.

        Returns:
            The whole value.
        """
        where = {"pipe": 0 if self.stages is None else self.stages[0]}
        return self._join_dims(0, where, parts, shape, mesh)

    def _join_dims(self, dim, where, parts, shape, mesh):
        if dim == len(self.dims):
            if not self.flat:
                return parts[mesh.rank(**where)]
            flat = self._join_flat(0, where, parts, self.flat_lengths(shape, mesh), mesh)
            return tf.reshape(flat, self.slice_shape(shape, mesh))
        axis = self.dims[dim]
        if axis is None:
            return self._join_dims(dim + 1, where, parts, shape, mesh)
        slices = [
            self._join_dims(dim + 1, {**where, axis: index}, parts, shape, mesh)
            for index in range(mesh.axis_size(axis))
        ]
        return _cut_to(tf.concat(slices, dim), dim, shape[dim])

    def _padded(self, full: tf.Tensor, mesh: Mesh) -> tf.Tensor:
        """`full` with the zeros that make uneven slices equal."""
        missing = [
            0 if axis is None else -full.shape[dim] % mesh.axis_size(axis)
            for dim, axis in enumerate(self.dims)
        ]
        return tf.pad(full, [[0, count] for count in missing]) if any(missing) else full

    def _join_flat(self, level, where, parts, lengths, mesh):
        if level == len(self.flat):
            return parts[mesh.rank(**where)]
        axis = self.flat[level]
        pieces = [
            self._join_flat(level + 1, {**where, axis: index}, parts, lengths, mesh)
            for index in range(mesh.axis_size(axis))
        ]
        return tf.concat(pieces, 0)[: lengths[level]]

    # --- the same inside a program: this rank's part, the rest by collectives -------------------

    def slice_from_part(self, part: tf.Tensor, shape: tuple[int, ...], mesh: Mesh) -> tf.Tensor:
        """Gathers the flat cuts of this rank's slice; the gradient is reduce-scattered.

        Args:
            part: what this rank stores.
            shape: full shape.
            mesh: the mesh.

        Returns:
            Tensor of `slice_shape`: what a parallel layer computes with.
        """
        lengths = self.flat_lengths(shape, mesh)
        for level in reversed(range(len(self.flat))):
            part = collectives.all_gather(part, self.flat[level])[: lengths[level]]
        return tf.reshape(part, self.slice_shape(shape, mesh)) if self.flat else part

    def full_from_part(self, part: tf.Tensor, shape: tuple[int, ...], mesh: Mesh) -> tf.Tensor:
        """Gathers the full tensor, for a layer that knows nothing of layouts.

        Such a layer computes the same on every rank of the dimensions' axes, so of the gradient
        each rank keeps its slice.

        Args:
            part: what this rank stores.
            shape: full shape.
            mesh: the mesh.

        Returns:
            The whole value.
        """
        full = self.slice_from_part(part, shape, mesh)
        for dim, axis in enumerate(self.dims):
            if axis is not None:
                full = _cut_to(collectives.gather_from_axis(full, axis, dim), dim, shape[dim])
        return full

    def part_from_full(self, full: tf.Tensor, mesh: Mesh) -> tf.Tensor:
        """Cuts this rank's part from a tensor that every rank has in full.

        Args:
            full: the whole value, of static shape.
            mesh: the mesh.

        Returns:
            Tensor of `part_shape`.
        """
        shape = tuple(full.shape)
        part = self._padded(full, mesh)
        for dim, axis in enumerate(self.dims):
            if axis is not None:
                part = collectives.split_to_axis(part, axis, dim)
        if self.flat:
            part = self.cut_flat(tf.reshape(part, [-1]), self.flat, mesh)
            part.set_shape(self.part_shape(shape, mesh))
        return part

    def part_of_sum(self, full: tf.Tensor, mesh: Mesh) -> tf.Tensor:
        """Adds up what the ranks have of a whole tensor along the flat axes, for this rank's part.

        Args:
            full: the rank's part of the sum, of static shape; of a layout that cuts no dimension.
            mesh: the mesh.

        Returns:
            Tensor of `part_shape`; `full` where nothing is cut.
        """
        part = tf.reshape(full, [-1]) if self.flat else full
        lengths = self.flat_lengths(tuple(full.shape), mesh)[1:]
        for axis, length in zip(self.flat, lengths, strict=True):
            part = pad_to(part, length * mesh.axis_size(axis))
            part = collectives.reduce_scatter(part, axis)
        return part

    @staticmethod
    def cut_flat(flat: tf.Tensor, axes: tuple[str, ...], mesh: Mesh) -> tf.Tensor:
        """Cuts a flat buffer along `axes` in turn and keeps this rank's part.

        Args:
            flat: rank-1 tensor of static length.
            axes: axes, outermost first.
            mesh: the mesh.

        Returns:
            Rank-1 tensor.
        """
        for axis in axes:
            size = mesh.axis_size(axis)
            length = -(-flat.shape[0] // size)
            flat = collectives.split_to_axis(pad_to(flat, length * size), axis, 0)
        return flat


def _cut_to(x: tf.Tensor, dim: int, length: int) -> tf.Tensor:
    """The first `length` entries along `dim`."""
    if x.shape[dim] == length:
        return x
    return x[(slice(None),) * dim + (slice(length),)]


def pad_to(flat: tf.Tensor, length: int) -> tf.Tensor:
    """Pads a flat buffer with zeros at the end.

    Args:
        flat: rank-1 tensor of static length.
        length: at least that length.

    Returns:
        Rank-1 tensor of `length`.
    """
    missing = length - flat.shape[0]
    return tf.pad(flat, [[0, missing]]) if missing else flat
