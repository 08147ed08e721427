"""Gradients of a step: summed over the mesh in buckets, then clipped by what all ranks hold.

Every rank starts with the gradient of its own rows' share of the global loss, for the part of each
variable that it stores. Summed over the axes on which the work was split and the variable was not,
they are the gradient of one device. What comes out is cut as the optimizer wants it: where ZeRO
cuts optimizer state along `data`, the sum is a reduce-scatter.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from llmos_tf import batch, collectives
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.program import ReplicaProgram
from llmos_tf.sharding import Layout, ShardedVariable
from llmos_tf.sharding.layout import pad_to
from llmos_tf.sharding.lookups import are_positions

# Large enough that a ring is busy with bytes and not with turns.
BUCKET_BYTES = 32 * 2**20


class Reduction(NamedTuple):
    """How a gradient is reduced: summed over `sum_axes`, reduce-scattered over `scatter_axes`."""

    dtype: tf.DType
    sum_axes: tuple[str, ...]
    scatter_axes: tuple[str, ...]


def sync_gradients(
    program: ReplicaProgram, gradients: Sequence[Any], variables: Sequence[ShardedVariable]
) -> list[tf.Tensor]:
    """Sums gradients over the mesh.

    Args:
        program: the program of this rank.
        gradients: for each variable, its gradient by this rank's rows: a tensor or IndexedSlices
            with the shape of the part that this rank stores.
        variables: the variables.

    Returns:
        Gradients of the global loss, each with the shape of the part that this rank updates; for a
        variable that was only looked up, `tf.IndexedSlices` of all ranks' rows.
    """
    plans = [_reduction(program, g, v) for g, v in zip(gradients, variables, strict=True)]
    results: list[Any] = [None] * len(plans)
    dense = {}
    for i, (gradient, variable) in enumerate(zip(gradients, variables, strict=True)):
        rows = _lookup_gradient(gradient, variable)
        if rows is None:
            # Its shape is known, whatever TensorFlow could infer.
            dense[i] = tf.ensure_shape(gradient, variable.component.shape)
        else:
            results[i] = _gather_rows(program, rows, variable)
    for reduction, members in _buckets(program, {i: plans[i] for i in dense}, dense):
        reduce = _scatter_bucket if reduction.scatter_axes else _sum_bucket
        with program.having(reduces_gradients=True):
            reduced = reduce(program, reduction, [dense[i] for i in members])
        for i, gradient in zip(members, reduced, strict=True):
            results[i] = gradient
    return results


def update_part(program: ReplicaProgram, gradient: Any, variable: ShardedVariable) -> tf.Tensor:
    """Returns a summed gradient as the part that this rank updates.

    Args:
        program: the program of this rank.
        gradient: as `sync_gradients` returns it.
        variable: its variable.

    Returns:
        Dense tensor, of the part's shape.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    full = tf.ensure_shape(tf.convert_to_tensor(gradient), variable.shape)
    return variable.update_layout.part_from_full(full, program.mesh)


def _lookup_gradient(gradient: Any, variable: ShardedVariable) -> tf.IndexedSlices | None:
    """The sparse gradient of a variable that was only looked up, or None."""
    if isinstance(gradient, tf.IndexedSlices):
        return gradient
    return variable.sparse_gradient(gradient)


def _gather_rows(
    program: ReplicaProgram, rows: tf.IndexedSlices, variable: ShardedVariable
) -> tf.IndexedSlices:
    """All ranks' rows of a sparse gradient, in the order of the batch.

    They are gathered and not summed, because Keras's adaptive optimizers square each row by
    itself: only the rows that one device has give the weights of one device.
    """
    values = batch.counted(tf.convert_to_tensor(rows.values))
    indices = tf.convert_to_tensor(rows.indices)
    axes = [axis for axis in BATCH_AXES if program.mesh.axis_size(axis) > 1]
    by_position = id(variable) in program.looked_up_by_position or are_positions(indices)
    if by_position:
        values = collectives.all_reduce(values, axes)
    elif axes:
        if values.shape[0] is None:
            # An uneven batch: fill up with rows of zeros, which change nothing.
            longest = collectives.all_reduce(tf.shape(values)[0], axes, op="max")
            missing = longest - tf.shape(values)[0]
            values = tf.pad(values, [[0, missing], *[[0, 0]] * (values.shape.rank - 1)])
            indices = tf.pad(indices, [[0, missing]])
        values = collectives.all_gather(values, axes)
        indices = collectives.all_gather(indices, axes)
    return tf.IndexedSlices(values, indices, rows.dense_shape)


def gather_updated_parts(program: ReplicaProgram) -> None:
    """Gathers the parts that the optimizer has updated into the variables stored whole (ZeRO).

    Args:
        program: the program of this rank; its pending parts are emptied.
    """
    pending = list(program.pending_parts.values())
    program.pending_parts.clear()
    plans = []
    for variable, part in pending:
        axes = variable.update_layout.flat[len(variable.layout.flat) :]
        plans.append(Reduction(part.dtype, (), axes))
    parts = [part for _, part in pending]
    for reduction, members in _buckets(program, dict(enumerate(plans)), dict(enumerate(parts))):
        (axis,) = reduction.scatter_axes
        flat = tf.concat([parts[i] for i in members], 0)
        rows = tf.reshape(collectives.all_gather(flat, axis), [program.mesh.axis_size(axis), -1])
        lengths = [parts[i].shape[0] for i in members]
        for i, row in zip(members, tf.split(rows, lengths, axis=1), strict=True):
            component = pending[i][0].component
            whole = tf.reshape(row, [-1])[: component.shape.num_elements()]
            component.assign(tf.reshape(whole, component.shape))


def clip_gradients(
    program: ReplicaProgram,
    optimizer: Any,
    gradients: Sequence[tf.Tensor],
    variables: Sequence[ShardedVariable],
) -> list[tf.Tensor]:
    """Clips summed gradients as the optimizer asks: by norm, by global norm or by value.

    Norms are those of one device: each part counts once, whoever holds it.

    Args:
        program: the program of this rank.
        optimizer: a Keras optimizer with clipnorm, global_clipnorm or clipvalue.
        gradients: summed gradients, as `sync_gradients` returns them.
        variables: their variables.

    Returns:
        Clipped gradients.
    """
    if optimizer.clipnorm and optimizer.clipnorm > 0:
        norms = [tf.sqrt(s) for s in squared_norms(program, gradients, variables)]
        return [_scaled(g, n, optimizer.clipnorm) for g, n in zip(gradients, norms, strict=True)]
    if optimizer.global_clipnorm and optimizer.global_clipnorm > 0:
        norm = tf.sqrt(_squared_global_norm(program, gradients, variables))
        # Dense from here on, as Keras has it.
        parts = [update_part(program, g, v) for g, v in zip(gradients, variables, strict=True)]
        return [_scaled(part, norm, optimizer.global_clipnorm) for part in parts]
    if optimizer.clipvalue and optimizer.clipvalue > 0:
        limit = optimizer.clipvalue
        return [_on_values(g, lambda v: tf.clip_by_value(v, -limit, limit)) for g in gradients]
    return list(gradients)


def _squared_global_norm(
    program: ReplicaProgram, gradients: Sequence[Any], variables: Sequence[ShardedVariable]
) -> tf.Tensor:
    """The squared norm of all gradients together, over all stages."""
    squares = squared_norms(program, gradients, variables)
    dtype = squares[0].dtype if squares else tf.as_dtype(keras.config.floatx())
    # A weight that several stages hold counts at the first.
    once = [
        tf.cast(square, dtype)
        for square, variable in zip(squares, variables, strict=True)
        if (variable.layout.stages or (0,))[0] == program.stage
    ]
    return collectives.all_reduce(tf.add_n([tf.zeros([], dtype), *once]), "pipe")


def squared_norms(
    program: ReplicaProgram,
    gradients: Sequence[tf.Tensor],
    variables: Sequence[ShardedVariable],
) -> list[tf.Tensor]:
    """Returns the squared norm of each variable's whole gradient.

    Args:
        program: the program of this rank.
        gradients: summed gradients, as `sync_gradients` returns them.
        variables: their variables.

    Returns:
        A scalar for each variable, the same on every rank.
    """
    # Every rank has all rows of a sparse gradient.
    local = [tf.reduce_sum(tf.square(getattr(g, "values", g))) for g in gradients]
    axes_of = [
        ()
        if isinstance(g, tf.IndexedSlices)
        else program.mesh.canonical_axes(_cut_axes(v.update_layout))
        for g, v in zip(gradients, variables, strict=True)
    ]
    result = list(local)
    groups = {(axes, s.dtype) for axes, s in zip(axes_of, local, strict=True) if axes}
    for axes, dtype in sorted(groups, key=str):
        members = [i for i, s in enumerate(local) if axes_of[i] == axes and s.dtype == dtype]
        # One collective for all variables that are cut alike.
        summed = collectives.all_reduce(tf.stack([local[i] for i in members]), axes)
        for i, square in zip(members, tf.unstack(summed, len(members)), strict=True):
            result[i] = square
    return result


def _reduction(program: ReplicaProgram, gradient: tf.Tensor, variable: Any) -> Reduction:
    if not isinstance(variable, ShardedVariable):
        name = getattr(variable, "name", variable)
        raise ValueError(
            f"The variable {name} was made outside the strategy's scope, so it lives on one device "
            "only. Make the model inside `with strategy.scope():`."
        )
    cut = _cut_axes(variable.layout)
    scatter = variable.update_layout.flat[len(variable.layout.flat) :]
    partial = program.partial_gradients.get(id(variable), ())
    axes = program.mesh.canonical_axes((*BATCH_AXES, *partial))
    # The gather of an fsdp part has reduce-scattered its gradient in the backward pass.
    sum_axes = tuple(
        axis
        for axis in axes
        if axis not in cut and axis not in scatter and program.mesh.axis_size(axis) > 1
    )
    return Reduction(gradient.dtype, sum_axes, scatter)


def _cut_axes(layout: Layout) -> tuple[str, ...]:
    return tuple(axis for axis in (*layout.dims, *layout.flat) if axis is not None)


def _buckets(
    program: ReplicaProgram, plans: Mapping[int, Reduction], tensors: Mapping[int, tf.Tensor]
) -> list[tuple[Reduction, list[int]]]:
    """Groups tensors that are reduced alike, up to `BUCKET_BYTES`, later variables first.

    Backward makes the gradients of the last layers first, so their bucket can leave first.
    """
    # Packing is a copy, which edges of the graph are not.
    limit = 0 if program.strategy.extended.shares_memory else BUCKET_BYTES
    open_buckets: dict[Reduction, tuple[list[int], int]] = {}
    closed = []
    for i in reversed(plans):
        size = tensors[i].shape.num_elements() * tensors[i].dtype.size
        members, total = open_buckets.get(plans[i], ([], 0))
        if members and total + size > limit:
            closed.append((plans[i], members))
            members, total = [], 0
        open_buckets[plans[i]] = ([*members, i], total + size)
    return closed + [(plan, members) for plan, (members, _) in open_buckets.items()]


def _sum_bucket(
    program: ReplicaProgram, reduction: Reduction, tensors: list[tf.Tensor]
) -> list[tf.Tensor]:
    if not reduction.sum_axes:
        return tensors

    def reduce(flat):
        flat = _of_own_rows(program, reduction, flat)
        return collectives.all_reduce(flat, reduction.sum_axes)

    return _packed(tensors, reduce)


def _scatter_bucket(
    program: ReplicaProgram, reduction: Reduction, tensors: list[tf.Tensor]
) -> list[tf.Tensor]:
    """Reduce-scatters flat gradients; each rank gets its part of every one of them."""
    (axis,) = reduction.scatter_axes
    ways = program.mesh.axis_size(axis)
    rows, lengths = [], []
    for tensor in tensors:
        flat = tf.reshape(tensor, [-1])
        lengths.append(-(-flat.shape[0] // ways))
        rows.append(tf.reshape(pad_to(flat, lengths[-1] * ways), [ways, lengths[-1]]))
    flat = _of_own_rows(program, reduction, tf.reshape(tf.concat(rows, 1), [-1]))
    mine = collectives.reduce_scatter(flat, axis)
    if reduction.sum_axes:
        mine = collectives.all_reduce(mine, reduction.sum_axes)
    return tf.split(mine, lengths)


def _of_own_rows(program: ReplicaProgram, reduction: Reduction, flat: tf.Tensor) -> tf.Tensor:
    """Gradients, or zeros on a rank without rows of its own."""
    # What an fsdp gather has reduce-scattered is of other ranks' rows too; it was counted there.
    is_mine = program.mesh.axis_size("fsdp") == 1 or "fsdp" in reduction.sum_axes
    if program.rows is None or not is_mine:
        return flat
    # Not `tf.where`, which would copy them.
    return tf.cond(program.rows > 0, lambda: flat, lambda: tf.zeros_like(flat))


def _packed(
    tensors: list[tf.Tensor], function: Callable[[tf.Tensor], tf.Tensor]
) -> list[tf.Tensor]:
    """Applies `function` to all tensors laid end to end."""
    if len(tensors) == 1:
        return [function(tensors[0])]
    flat = function(tf.concat([tf.reshape(t, [-1]) for t in tensors], 0))
    parts = tf.split(flat, [t.shape.num_elements() for t in tensors])
    return [tf.reshape(p, t.shape) for p, t in zip(parts, tensors, strict=True)]


def _scaled(gradient: Any, norm: tf.Tensor, limit: float) -> Any:
    norm = tf.cast(norm, gradient.dtype)
    limit = tf.constant(limit, gradient.dtype)
    return _on_values(gradient, lambda v: v * (limit / tf.maximum(norm, limit)))


def _on_values(gradient: Any, function: Callable[[tf.Tensor], tf.Tensor]) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)
    return function(gradient)
