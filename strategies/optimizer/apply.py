"""The update of a step: any Keras optimizer, in the order that gives one device's weights.

    sum over the mesh → overwrite → unscale and check finite → accumulate → clip → update → EMA

Keras clips and checks what each replica computed, before the sum; this owns the order. It runs in
place of `Optimizer.apply` while a program is traced (`strategies.keras_patches.while_tracing`), so
`model.fit`, a user's own `train_step` and `llmos_tf.training.make_train_step` all update this way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from llmos_tf import _internal
from llmos_tf.sharding import ShardedVariable
from llmos_tf.spmd.program import ReplicaProgram, current_program
from llmos_tf.spmd.replacements import replaced_in_program
from llmos_tf.strategies.gradients.clipping import clip_gradients
from llmos_tf.strategies.gradients.sync import (
    gather_updated_parts,
    largest_values,
    sync_gradients,
    update_part,
)
from llmos_tf.strategies.optimizer.fused_update import (
    decay_weights,
    fused_update,
    is_elementwise,
    is_known,
)


def apply_gradients(
    optimizer: Any,
    gradients: Sequence[Any],
    variables: Any = None,
    are_summed: Sequence[bool] | None = None,
) -> None:
    """Updates variables by the gradients of this rank's rows; stands in for `Optimizer.apply`.

    Args:
        optimizer: a Keras optimizer.
        gradients: one for each variable; None where a variable had no part in the loss.
        variables: `keras.Variable`s; None takes those the optimizer was built with.
        are_summed: which gradients are of the whole batch; None for none.

    Raises:
        ValueError: the optimizer was made outside the strategy's scope.
    """
    program = current_program()
    variables = list(optimizer._trainable_variables if variables is None else variables)
    _build(optimizer, variables)
    if not isinstance(_stored(optimizer._iterations), ShardedVariable):
        raise ValueError(
            f"The optimizer {optimizer.name!r} was made outside the strategy's scope, so its state "
            "lives on one device only. Make it inside `with strategy.scope():`."
        )
    optimizer._check_variables_are_known(variables)
    summed = _summed(gradients, are_summed)
    gradients, variables = _of_this_stage(program, optimizer, gradients, variables)
    if not program.gradients_synced:
        gradients = _sync(program, optimizer, gradients, variables, summed)
    with program.having(in_update=True):
        gradients, variables = optimizer._overwrite_variables_directly_with_gradients(
            gradients, variables
        )
    scale = optimizer.loss_scale_factor
    if scale is not None:
        with tf.device(program.update_device):
            gradients = [ops.divide(gradient, scale) for gradient in gradients]
    _accumulate_and_update(program, optimizer, gradients, variables)
    if optimizer.use_ema:
        _update_averages(program, optimizer)
    with program.having(in_update=True):
        for variable in variables:
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))
        optimizer._iterations.assign_add(1)


def apply_scaled_gradients(
    original: Callable,
    optimizer: Any,
    gradients: Sequence[Any],
    variables: Any = None,
    are_summed: Sequence[bool] | None = None,
) -> None:
    """Stands in for `LossScaleOptimizer.apply`: sums before the check for finite gradients.

    Args:
        original: Keras's own method, which unscales, checks, and calls the inner optimizer.
        optimizer: the `keras.optimizers.LossScaleOptimizer`.
        gradients: one for each variable, of the scaled loss; None as in `apply_gradients`.
        variables: `keras.Variable`s; None takes those the optimizer was built with.
        are_summed: which gradients are of the whole batch; None for none.
    """
    program = current_program()
    inner = optimizer.inner_optimizer
    variables = list(inner._trainable_variables if variables is None else variables)
    _build(optimizer, variables)
    summed = _summed(gradients, are_summed)
    gradients, variables = _of_this_stage(program, inner, gradients, variables)
    synced = _sync(program, inner, gradients, variables, summed)
    with program.having(gradients_synced=True, in_update=True):
        original(optimizer, synced, variables)


def _of_this_stage(
    program: ReplicaProgram, optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]
) -> tuple[list, list]:
    """Gradients that there are, and their variables, of those that this stage holds."""
    pairs = [
        (gradient, variable)
        for gradient, variable in zip(gradients, variables, strict=True)
        if not isinstance(_stored(variable), ShardedVariable)
        or _stored(variable).layout.is_on(program.stage)
    ]
    if not pairs:
        return [], []
    return optimizer._filter_empty_gradients(*map(list, zip(*pairs, strict=True)))


def _summed(gradients: Sequence[Any], are_summed: Sequence[bool] | None) -> dict[int, Any]:
    """Gradients that are of the whole batch, by their `id`."""
    if are_summed is None:
        return {}
    return {id(g): g for g, is_summed in zip(gradients, are_summed, strict=True) if is_summed}


def _sync(
    program: ReplicaProgram,
    optimizer: Any,
    gradients: Sequence[Any],
    variables: Sequence[Any],
    summed: dict[int, Any],
) -> list[Any]:
    """Gradients of the whole batch; of what is overwritten, as float8 scales, the largest value."""
    results: list[Any] = [None] * len(gradients)
    to_sum: dict[int, tuple[Any, Any]] = {}
    to_compare: dict[int, Any] = {}
    for i, (gradient, variable) in enumerate(zip(gradients, variables, strict=True)):
        if id(gradient) in summed:
            results[i] = _own_part(program, gradient, _stored(variable))
        elif optimizer._overwrite_variable_with_gradient(variable):
            to_compare[i] = gradient
        else:
            to_sum[i] = gradient, _stored(variable)
    sums = sync_gradients(program, *zip(*to_sum.values(), strict=True)) if to_sum else []
    results = dict(enumerate(results)) | dict(zip(to_sum, sums, strict=True))
    results |= zip(to_compare, largest_values(program, list(to_compare.values())), strict=True)
    return [results[i] for i in range(len(gradients))]


def _own_part(program: ReplicaProgram, gradient: Any, variable: ShardedVariable) -> Any:
    """Of a gradient of the whole batch what this rank updates by."""
    if isinstance(gradient, tf.IndexedSlices):
        return gradient
    full = tf.ensure_shape(tf.convert_to_tensor(gradient), variable.shape)
    return variable.update_layout.part_from_full(full, program.mesh)


def _build(optimizer: Any, variables: list) -> None:
    """Makes the state of an optimizer that is used for the first time."""
    if optimizer.built:
        return
    with keras.name_scope(optimizer.name), tf.init_scope():
        optimizer.build(variables)
        optimizer.built = True


def _accumulate_and_update(program, optimizer, gradients, variables) -> None:
    steps = optimizer.gradient_accumulation_steps
    if not steps:
        _update(program, optimizer, gradients, variables)
        return
    where = program.update_device
    gradients = [
        update_part(program, g, _stored(v)) for g, v in zip(gradients, variables, strict=True)
    ]
    sums = [
        _stored(optimizer._accumulated_gradients[optimizer._get_variable_index(v)])
        for v in variables
    ]

    def update():
        with tf.device(where), program.having(in_update=True, update_parts=True):
            means = [(g + s) / steps for g, s in zip(gradients, sums, strict=True)]
        _update(program, optimizer, means, variables)
        with tf.device(where), program.having(in_update=True, update_parts=True):
            for total in sums:
                total.assign(tf.zeros(total.component.shape, total.dtype))

    def add():
        with tf.device(where), program.having(in_update=True, update_parts=True):
            for gradient, total in zip(gradients, sums, strict=True):
                total.assign_add(gradient)

    due = tf.equal((optimizer._iterations + 1) % steps, 0)
    tf.cond(due, lambda: _done(update), lambda: _done(add))


def _update(program: ReplicaProgram, optimizer: Any, gradients, variables) -> None:
    """Clip, decay, and the optimizer's own update rule, where the optimizer's state is."""
    with tf.device(program.update_device):
        _change_weights(program, optimizer, gradients, variables)
    gather_updated_parts(program)


def _change_weights(program: ReplicaProgram, optimizer: Any, gradients, variables) -> None:
    stored = [_stored(variable) for variable in variables]
    gradients = clip_gradients(program, optimizer, gradients, stored)
    if not variables:
        # A stage of a pipeline without weights that are trained.
        return
    parts = is_elementwise(optimizer)
    if not parts:
        gradients = [
            g
            if isinstance(g, tf.IndexedSlices)
            else v.update_layout.full_from_part(g, tuple(v.shape), program.mesh)
            for g, v in zip(gradients, stored, strict=True)
        ]
    with program.having(in_update=True, update_parts=parts):
        if is_known(optimizer):
            decay_weights(optimizer, gradients, stored)
        else:
            optimizer._apply_weight_decay(variables)
        if any(isinstance(gradient, tf.IndexedSlices) for gradient in gradients):
            # The update by rows reads the whole variable, decayed.
            with tf.device(None):
                gather_updated_parts(program)
        step = (_internal.TFOptimizer, "_distributed_tf_update_step")
        shape = (_internal.keras_core.Variable, "shape")
        with replaced_in_program({step: fused_update}), _internal.patched({shape: _shape_as_read}):
            optimizer._backend_update_step(gradients, variables, optimizer.learning_rate)


def _update_averages(program: ReplicaProgram, optimizer: Any) -> None:
    """Exponential moving averages of the weights, on each rank's part."""
    pairs = [
        (_stored(variable), _stored(average))
        for variable, average in zip(
            optimizer._trainable_variables, optimizer._model_variables_moving_average, strict=True
        )
        if average is not None and _stored(variable).layout.is_on(program.stage)
    ]

    def overwrite():
        with program.having(in_update=True, update_parts=True):
            for variable, average in pairs:
                variable.assign(average.read())
        gather_updated_parts(program)

    with program.having(in_update=True, update_parts=True):
        for variable, average in pairs:
            started = tf.cast(tf.not_equal(optimizer.iterations, 0), variable.dtype)
            momentum = started * tf.constant(optimizer.ema_momentum, variable.dtype)
            with tf.device(average.host):
                average.assign(momentum * average.read() + (1 - momentum) * variable.read())
    if optimizer.ema_overwrite_frequency:
        due = tf.equal((optimizer.iterations + 1) % optimizer.ema_overwrite_frequency, 0)
        tf.cond(due, lambda: _done(overwrite), lambda: tf.constant(True))


def _done(action: Callable[[], None]) -> tf.Tensor:
    """Runs a branch of `tf.cond` that is there for what it does."""
    action()
    return tf.constant(True)


def _shape_as_read(original: property) -> property:
    """`keras.Variable.shape` of a part: Keras's ops choose a kernel by the shape they are told."""

    def shape(variable):
        stored = _stored(variable)
        return stored.shape if isinstance(stored, ShardedVariable) else original.fget(variable)

    return property(shape)


def _stored(variable: Any) -> ShardedVariable:
    """The mesh's variable inside a `keras.Variable`."""
    return getattr(variable, "_value", variable)
