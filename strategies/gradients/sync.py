"""Gradients of a step, summed over the mesh in buckets.

Every rank starts with the gradient of its own rows' share of the global loss, for the part of each
variable that it stores. Summed over the axes on which the work was split and the variable was not,
they are the gradient of one device. What comes out is cut as the optimizer wants it: where ZeRO
cuts optimizer state along `data`, the sum is a reduce-scatter.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.collectives import batch
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.planning.buckets import Bucket, default_bucket_bytes, plan_buckets
from llmos_tf.sharding import ShardedVariable
from llmos_tf.sharding.embedding_lookups import are_positions
from llmos_tf.spmd.program import ReplicaProgram
from llmos_tf.strategies.gradients.compression import compressed_scatter, compressed_sum
from llmos_tf.strategies.gradients.packing import (
    creation_order,
    packed,
    packed_rows,
    row_lengths,
    split_columns,
    unpacked,
    unpacked_rows,
)
from llmos_tf.strategies.gradients.powersgd import is_compressible, low_rank_sum


class Reduction(NamedTuple):
    """How a gradient is reduced: summed over `sum_axes`, reduce-scattered over `scatter_axes`.

    `compression` names what makes it smaller on the way, None for nothing.
    """

    dtype: tf.DType
    sum_axes: tuple[str, ...]
    scatter_axes: tuple[str, ...]
    compression: str | None = None


def sync_gradients(
    program: ReplicaProgram, gradients: Sequence[Any], variables: Sequence[ShardedVariable]
) -> list[tf.Tensor]:
    """Sums gradients over the mesh, in the order in which the backward pass makes them.

    Collectives that sum gradients run one after the other, as they are traced. So what is there
    first has to be reduced first, or all would wait for the gradient that is made last. They do not
    wait for what the backward pass itself sends.

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
    made = creation_order({i: getattr(g, "values", g) for i, g in enumerate(gradients)})
    results: list[Any] = [None] * len(plans)
    dense, rows = {}, {}
    for i, (gradient, variable) in enumerate(zip(gradients, variables, strict=True)):
        found = _lookup_gradient(gradient, variable)
        if found is None:
            dense[i] = _of_part(program, gradient, variable)
        else:
            rows[i] = found
    buckets = _buckets(program, {i: plans[i] for i in dense}, dense, made)
    buckets += [Bucket(None, (i,), made[i]) for i in rows]
    with program.having(reduces_gradients=True):
        for bucket in sorted(buckets, key=lambda bucket: bucket.ready):
            if bucket.key is None:
                (i,) = bucket.members
                results[i] = _gather_rows(program, rows[i], variables[i])
                continue
            owners = [variables[i] for i in bucket.members]
            reduced = _reduce(program, bucket.key, [dense[i] for i in bucket.members], owners)
            for i, gradient in zip(bucket.members, reduced, strict=True):
                results[i] = gradient
    return results


def _of_part(program: ReplicaProgram, gradient: tf.Tensor, variable: ShardedVariable) -> tf.Tensor:
    """The gradient of what a rank stores, of its own rows.

    A tape returns that. Who makes a gradient otherwise makes it for the whole variable.
    """
    gradient = tf.convert_to_tensor(gradient)
    stored, full = variable.component.shape, variable.shape
    if gradient.shape.is_compatible_with(stored) or not gradient.shape.is_compatible_with(full):
        # Its shape is known, whatever TensorFlow could infer.
        return tf.ensure_shape(gradient, stored)
    layout = variable.layout
    cut = [axis for axis in BATCH_AXES if axis in (*layout.dims, *layout.flat)]
    total = collectives.all_reduce(batch.counted(gradient), cut)
    return layout.part_from_full(total, program.mesh)


def largest_values(program: ReplicaProgram, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Returns the elementwise maximum over the mesh of values that each rank found in its rows.

    Args:
        program: the program of this rank.
        values: floating-point tensors of static shape.

    Returns:
        As many tensors of the same shapes, the same on every rank.
    """
    results = list(values)
    axes = [axis for axis, size in program.mesh.sizes.items() if size > 1 and axis != "pipe"]
    for dtype in sorted({value.dtype for value in values}, key=str):
        members = [i for i, value in enumerate(values) if value.dtype == dtype]
        mine = [values[i] for i in members]
        flat = packed(mine)
        if program.rows is not None:
            # A row that was lent does not count.
            flat = tf.where(program.rows > 0, flat, tf.fill(tf.shape(flat), dtype.min))
        flat = collectives.all_reduce(flat, axes, op="max")
        for i, value in zip(members, unpacked(flat, mine), strict=True):
            results[i] = value
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


def gather_updated_parts(program: ReplicaProgram) -> None:
    """Gathers the parts that the optimizer has updated into the variables stored whole (ZeRO).

    Args:
        program: the program of this rank; its pending parts are emptied.
    """
    pending = list(program.pending_parts.values())
    program.pending_parts.clear()
    plans = {}
    for i, (variable, part) in enumerate(pending):
        axes = variable.update_layout.flat[len(variable.layout.flat) :]
        plans[i] = Reduction(part.dtype, (), axes)
    parts = {i: part for i, (_, part) in enumerate(pending)}
    # As large as what is gathered.
    gathered = {i: variable.component for i, (variable, _) in enumerate(pending)}
    by_edges = program.strategy.extended.shares_memory
    previous: list[tf.Operation] = []
    for bucket in _buckets(program, plans, gathered, creation_order(parts)):
        (axis,) = bucket.key.scatter_axes
        owners = [pending[i][0] for i in bucket.members]
        components = [variable.component for variable in owners]
        # One after another: updates are through at about the same time, and all of the new weights
        # would be there twice, as they are gathered and by themselves. Edges copy nothing.
        with tf.control_dependencies([] if by_edges else previous):
            mine = packed([parts[i] for i in bucket.members])
        rows = tf.reshape(collectives.all_gather(mine, axis), [program.mesh.axis_size(axis), -1])
        wholes = unpacked_rows(rows, components)
        previous = []
        for variable, whole in zip(owners, wholes, strict=True):
            with tf.device(variable.host):
                previous.append(variable.component.assign(whole, read_value=False))


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


def _reduction(program: ReplicaProgram, gradient: tf.Tensor, variable: Any) -> Reduction:
    if not isinstance(variable, ShardedVariable):
        name = getattr(variable, "name", variable)
        raise ValueError(
            f"The variable {name} was made outside the strategy's scope, so it lives on one device "
            "only. Make the model inside `with strategy.scope():`."
        )
    cut = variable.layout.axes
    scatter = variable.update_layout.flat[len(variable.layout.flat) :]
    partial = program.partial_gradients.get(id(variable), ())
    axes = program.mesh.canonical_axes((*BATCH_AXES, *partial))
    # The gather of an fsdp part has reduce-scattered its gradient in the backward pass.
    sum_axes = tuple(
        axis
        for axis in axes
        if axis not in cut and axis not in scatter and program.mesh.axis_size(axis) > 1
    )
    options = program.strategy.extended.options
    compression = options.gradient_compression if sum_axes or scatter else None
    if compression == "powersgd" and not is_compressible(
        variable.shape_of("part"), options.powersgd_rank
    ):
        compression = None
    return Reduction(gradient.dtype, sum_axes, scatter, compression)


def _buckets(
    program: ReplicaProgram,
    plans: Mapping[int, Reduction],
    tensors: Mapping[int, tf.Tensor | tf.Variable],
    made: Mapping[int, int],
) -> list[Bucket]:
    """Buckets of tensors that are reduced alike, of the size that suits the mesh."""
    sizes = {i: x.shape.num_elements() * x.dtype.size for i, x in tensors.items()}
    extended, limits = program.strategy.extended, {}
    for plan in set(plans.values()):
        total = sum(sizes[i] for i in plans if plans[i] == plan)
        ranks = program.mesh.axis_size((*plan.sum_axes, *plan.scatter_axes))
        limits[plan] = extended.options.bucket_bytes
        if limits[plan] is None:
            # Packing is a copy, which edges of the graph are not.
            by_edges = extended.shares_memory and plan.compression is None
            limits[plan] = 0 if by_edges else default_bucket_bytes(ranks, total)
    return plan_buckets(plans, sizes, made, limits)


def _reduce(
    program: ReplicaProgram,
    reduction: Reduction,
    tensors: Sequence[tf.Tensor],
    variables: Sequence[ShardedVariable],
) -> list[tf.Tensor]:
    """Reduces the gradients of a bucket."""
    if reduction.scatter_axes:
        return _scatter_bucket(program, reduction, tensors, variables)
    if not reduction.sum_axes:
        return list(tensors)
    tensors = _of_own_rows(program, reduction, tensors)
    axes = reduction.sum_axes
    if reduction.compression == "powersgd":
        return low_rank_sum(program, tensors, axes, variables)
    if reduction.compression is not None:
        return compressed_sum(program, reduction.compression, tensors, axes, variables)
    if len(axes) == 1:
        return unpacked(collectives.all_reduce(packed(tensors), axes), tensors)
    # Each rank of the inner axis takes its part of every tensor to the outer ones.
    rows = packed_rows(tensors, program.mesh.axis_size(axes[-1]))
    return unpacked_rows(collectives.all_reduce(rows, axes, hierarchical=True), tensors)


def _scatter_bucket(
    program: ReplicaProgram,
    reduction: Reduction,
    tensors: Sequence[tf.Tensor],
    variables: Sequence[ShardedVariable],
) -> list[tf.Tensor]:
    """Reduce-scatters flat gradients; each rank gets its part of every one of them."""
    (axis,) = reduction.scatter_axes
    ways = program.mesh.axis_size(axis)
    tensors = _of_own_rows(program, reduction, tensors)
    if reduction.compression is not None:
        mine = compressed_scatter(program, reduction.compression, tensors, axis, variables)
    else:
        mine = tf.reshape(collectives.reduce_scatter(packed_rows(tensors, ways), axis), [-1])
    if reduction.sum_axes:
        mine = collectives.all_reduce(mine, reduction.sum_axes)
    return split_columns(mine, row_lengths(tensors, ways))


def _of_own_rows(
    program: ReplicaProgram, reduction: Reduction, tensors: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """Gradients, or zeros on a rank without rows of its own."""
    # What an fsdp gather has reduce-scattered is of other ranks' rows too; it was counted there.
    is_mine = program.mesh.axis_size("fsdp") == 1 or "fsdp" in reduction.sum_axes
    if program.rows is None or not is_mine:
        return list(tensors)
    # Not `tf.where`, which would copy them.
    return tf.cond(
        program.rows > 0, lambda: list(tensors), lambda: [tf.zeros_like(x) for x in tensors]
    )
