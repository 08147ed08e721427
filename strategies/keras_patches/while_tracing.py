"""What Keras does differently while a program is traced.

Keras averages a loss over the rows that a replica has, divides by the number of replicas, clips and
checks each replica's gradients, and only then sums them. Every difference from one device comes
from that. Inside a program these few functions of Keras are replaced, and put back after it:

- a loss is a sum over all ranks, and its divisor is the global one (`reduce_values`, `apply_mask`):
  it has the value of one device on every rank, never a mean of means, and the gradient of the
  rank's own rows;
- so have the terms of `Model.losses`: a regularizer is the same on every rank, which takes its
  share of the gradient, and what `add_loss` was given is averaged over the rows;
- an optimizer's `apply` is `strategies.optimizer.apply.apply_gradients`;
- the result of a metric, when it is read in a step, is that of all ranks; a mean or sum of scalars
  counts a loss once, and what a rank has computed of its own rows as those rows; a loss that a
  metric of another kind computes is that of the rank's rows, as the metrics of all ranks are added.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from llmos_tf import _internal, collectives
from llmos_tf.collectives import batch
from llmos_tf.sharding import MetricVariable, ShardedVariable, read_for_all
from llmos_tf.sharding.replication_analysis import varying_axes
from llmos_tf.spmd.global_trace import current_trace
from llmos_tf.spmd.program import current_program
from llmos_tf.spmd.replacements import replaced_in_program
from llmos_tf.strategies.keras_layers import layer_replacements
from llmos_tf.strategies.keras_patches.layer_calls import compiled_call, compiles_blocks
from llmos_tf.strategies.optimizer.apply import apply_gradients, apply_scaled_gradients
from llmos_tf.strategies.optimizer.update_region import scaled_update_in_region, update_in_region

_loss = _internal.keras_loss


@contextlib.contextmanager
def replica_hooks() -> Iterator[None]:
    """Enters the replacements for the time a program is traced."""
    base, scaled = _internal.BaseOptimizer, _internal.LossScaleOptimizer
    with replaced_in_program(
        {
            (_loss, "reduce_values"): _outside_metrics(reduce_values),
            (_loss, "apply_mask"): _outside_metrics(apply_mask),
            (_loss, "scale_loss_for_distribution"): lambda original: _as_it_is,
            (_loss, "unscale_loss_for_distribution"): lambda original: _as_it_is,
            (keras.layers.Layer, "__call__"): compiled_call,
            (keras.layers.Layer, "_get_own_losses"): _added_losses,
            (keras.layers.Layer, "_get_regularization_losses"): _regularization_losses,
            (base, "apply"): lambda original: _apply,
            (_internal.TFOptimizer, "_all_reduce_sum_gradients"): lambda original: _keep,
            (scaled, "apply"): lambda original: _scaled_apply(original),
            (scaled, "check_finite"): lambda original: check_finite,
            **{(kind, "update_state"): _local_losses for kind in _metrics_with("update_state")},
            (keras.metrics.Mean, "update_state"): _mean_update,
            (keras.metrics.Sum, "update_state"): _sum_update,
            **layer_replacements(),
            **{(kind, "result"): _synced_result for kind in _metrics_with("result")},
        }
    ):
        yield


@contextlib.contextmanager
def global_hooks() -> Iterator[None]:
    """Enters the replacement for the time a step is traced as for one device: of the update.

    It is written for a rank (`strategies.optimizer.update_region`). All else is as Keras has it.
    """
    base, scaled = _internal.BaseOptimizer, _internal.LossScaleOptimizer
    with _internal.patched(
        {
            (base, "apply"): lambda original: _in_global_trace(original, update_in_region),
            (scaled, "apply"): lambda original: _in_global_trace(
                original, functools.partial(scaled_update_in_region, original)
            ),
        }
    ):
        yield


def _in_global_trace(original: Callable, replacement: Callable) -> Callable:
    @functools.wraps(original)
    def apply(optimizer, grads, trainable_variables=None):
        function = original if current_trace() is None else replacement
        return function(optimizer, grads, trainable_variables)

    return apply


@functools.cache
def hook_compile() -> None:
    """Has `compile` do what is right for models made under a mesh strategy's scope, from now on.

    It need not be called under the scope: variables of the optimizer and the metrics that were made
    outside are made again as the mesh's. And `jit_compile=True` compiles the model's blocks: XLA
    compiles a function for one device, and a step is the work of all.
    """
    original = _internal.Trainer.compile
    signature = inspect.signature(original)

    @functools.wraps(original)
    def compile(model, *args, **kwargs):
        strategy = model.distribute_strategy
        if getattr(strategy.extended, "mesh", None) is None:
            return original(model, *args, **kwargs)
        arguments = signature.bind(model, *args, **kwargs).arguments
        made = tf.nest.flatten([arguments.get(name) for name in _WITH_VARIABLES])
        with strategy.scope():
            for thing in made:
                _adopt(thing, strategy)
            original(**arguments)
        compiles_blocks(model)

    _internal.Trainer.compile = compile
    for name in ("make_train_function", "make_test_function", "make_predict_function"):
        made = getattr(_internal.TensorFlowTrainer, name)
        setattr(_internal.TensorFlowTrainer, name, _with_compiled_blocks(made))


def _with_compiled_blocks(make: Callable) -> Callable:
    """What makes a step's function, also of a model whose `jit_compile` was set by hand."""

    @functools.wraps(make)
    def make_function(model, *args, **kwargs):
        is_on_mesh = getattr(model.distribute_strategy.extended, "mesh", None) is not None
        if is_on_mesh and model.jit_compile:
            compiles_blocks(model)
        return make(model, *args, **kwargs)

    return make_function


# Arguments of `compile` that may be, or hold, objects with variables.
_WITH_VARIABLES = ("optimizer", "metrics", "weighted_metrics")


def _adopt(thing: Any, strategy: tf.distribute.Strategy) -> None:
    """Makes the variables of a new optimizer or metric again, in the scope that is entered."""
    is_new_optimizer = isinstance(thing, keras.Optimizer) and not thing.built
    if not is_new_optimizer and not isinstance(thing, keras.Metric):
        return
    for variable in thing.variables:
        if not isinstance(variable.value, ShardedVariable | MetricVariable):
            variable._initialize(variable.numpy())
    for optimizer in (thing, getattr(thing, "inner_optimizer", None)):
        if isinstance(optimizer, keras.Optimizer):
            optimizer._distribution_strategy = strategy


def reduce_values(
    values: tf.Tensor,
    sample_weight: tf.Tensor | None = None,
    reduction: str | None = "sum_over_batch_size",
) -> tf.Tensor:
    """Reduces this rank's losses to the loss of all ranks.

    Args:
        values: weighted losses of this rank's rows.
        sample_weight: their weights.
        reduction: as in `keras.losses.Loss`.

    Returns:
        The loss of one device, a scalar whose gradient is that of this rank's rows; `values` as
        they are for reduction None.
    """
    if reduction is None or reduction == "none":
        return values
    if values.shape.rank == 0:
        # A loss function that has averaged by itself.
        return batch.mean(values)
    mine = ops.sum(values)
    if reduction == "sum":
        return batch.total(mine)
    if reduction == "mean_with_sample_weight" and sample_weight is not None:
        count = batch.everywhere(ops.cast(ops.sum(sample_weight), mine.dtype))
    else:
        count = _global_size(values, mine.dtype)
    return batch.total(ops.divide_no_nan(mine, count))


def apply_mask(
    sample_weight: tf.Tensor | None, mask: tf.Tensor | None, dtype: Any, reduction: str | None
) -> tf.Tensor | None:
    """Merges a mask into sample weights, such that valid entries are averaged over all ranks.

    Args:
        sample_weight: weights, or None.
        mask: which entries count, or None.
        dtype: of the result.
        reduction: as in `keras.losses.Loss`.

    Returns:
        Weights, or None where there is neither.
    """
    if mask is None:
        return sample_weight
    weight = ops.cast(mask, dtype)
    if reduction in ("mean", "sum_over_batch_size"):
        valid = batch.everywhere(ops.sum(weight))
        weight = weight * ops.divide_no_nan(_global_size(mask, dtype), valid)
    if sample_weight is not None:
        sample_weight = ops.cast(sample_weight, dtype)
        weight, sample_weight = _loss.squeeze_or_expand_to_same_rank(weight, sample_weight)
        weight = weight * sample_weight
    return weight


def check_finite(optimizer: Any, gradients: list) -> tf.Tensor:
    """Returns one verdict for all ranks: whether all summed gradients are finite.

    Args:
        optimizer: the loss-scale optimizer.
        gradients: summed gradients of this rank's parts.

    Returns:
        Boolean scalar.
    """
    del optimizer
    program = current_program()
    values = [getattr(g, "values", g) for g in gradients if g is not None]
    # A stage of a pipeline may have none.
    finite = [True, *(tf.reduce_all(tf.math.is_finite(value)) for value in values)]
    mine = tf.cast(tf.reduce_all(tf.stack(finite)), tf.int32)
    split = [axis for axis, size in program.mesh.sizes.items() if size > 1]
    return tf.equal(collectives.all_reduce(mine, split, op="min"), 1)


def _global_size(values: tf.Tensor, dtype: Any) -> tf.Tensor:
    """Number of elements over all parts of the batch."""
    program = current_program()
    if values.shape.is_fully_defined() and program.rows is None:
        # One program: static here is static, and the same, on every rank.
        return ops.cast(values.shape.num_elements() * batch.num_parts(), dtype)
    size = ops.cast(tf.size(values), dtype)
    if program.trace is None or program.rows is None or program.trace.selects:
        return batch.everywhere(size)
    # The other microbatches' losses are not there yet. Theirs have as many elements in each row.
    each = size / ops.cast(tf.maximum(program.rows, 1), dtype)
    return batch.everywhere(ops.cast(program.rows, dtype)) * each


def _as_it_is(value: tf.Tensor) -> tf.Tensor:
    return value


def _added_losses(original: Any) -> Any:
    def _get_own_losses(layer):
        return [batch.mean(_as_float(loss)) for loss in original(layer)]

    return _get_own_losses


def _regularization_losses(original: Any) -> Any:
    del original

    def _get_regularization_losses(layer):
        trace = current_program().trace
        if trace is not None:
            # Each stage adds those of the weights that it holds.
            trace.regularizes = True
            return []
        return [
            batch.same(variable.regularizer(read_for_all(variable)))
            for variable in layer.trainable_weights
            if variable.regularizer is not None
        ]

    return _get_regularization_losses


def _as_float(value: Any) -> tf.Tensor:
    value = tf.convert_to_tensor(value)
    return value if value.dtype.is_floating else tf.cast(value, keras.config.floatx())


def _keep(optimizer: Any, grads_and_vars: Any) -> Any:
    """`_all_reduce_sum_gradients` of gradients that are summed already."""
    del optimizer
    return grads_and_vars


def _apply(optimizer: Any, grads: Any, trainable_variables: Any = None) -> None:
    """`Optimizer.apply`, by the names of its arguments."""
    apply_gradients(optimizer, grads, trainable_variables)


def _scaled_apply(original: Any) -> Any:
    def apply(optimizer, grads, trainable_variables=None):
        apply_scaled_gradients(original, optimizer, grads, trainable_variables)

    return apply


def _mean_update(original: Any) -> Any:
    """`Mean.update_state`: a scalar is the mean over the rank's rows, or the same on every rank."""

    @functools.wraps(original)
    def update_state(metric, values, sample_weight=None):
        program = current_program()
        if program is not None and program.trace is not None:
            # A loss by one microbatch: the metric gets that of all of them.
            program.trace.loss_metrics.append((metric, tf.convert_to_tensor(values), sample_weight))
            return None
        if program is None or sample_weight is not None or not _is_scalar(values):
            return original(metric, values, sample_weight)
        return original(metric, values, batch.share(tf.as_dtype(metric.dtype)))

    return update_state


def _sum_update(original: Any) -> Any:
    """`Sum.update_state`: a scalar that is the same on every rank, as a loss is, counts once."""

    @functools.wraps(original)
    def update_state(metric, values, sample_weight=None):
        program = current_program()
        weight = 1.0 if sample_weight is None else sample_weight
        if program is None or not _is_scalar(values) or not _is_scalar(weight):
            return original(metric, values, sample_weight)
        value = ops.cast(values, metric.dtype) * ops.cast(weight, metric.dtype)
        if not varying_axes(program, value):
            value *= batch.share(value.dtype)
        return original(metric, value)

    return update_state


def _is_scalar(values: Any) -> bool:
    return tf.TensorShape(getattr(values, "shape", ())).rank == 0


def _metrics_with(method: str, kind: type = keras.Metric) -> Iterator[type]:
    """The classes of metrics that have a method of their own."""
    if method in vars(kind):
        yield kind
    for subclass in kind.__subclasses__():
        yield from _metrics_with(method, subclass)


# Metrics that hand values to others, and those that weigh a scalar by themselves (`_mean_update`).
_SCALARS_ARE_GLOBAL = (
    keras.metrics.Mean,
    keras.metrics.Sum,
    _internal.CompileMetrics,
    _internal.MetricsList,
)


def _local_losses(original: Any) -> Any:
    """`update_state` of a metric, in which a loss is that of the rank's rows: ranks are summed."""

    @functools.wraps(original)
    def update_state(metric, *args, **kwargs):
        program = current_program()
        if program is None:
            return original(metric, *args, **kwargs)
        with program.having(in_metric=not isinstance(metric, _SCALARS_ARE_GLOBAL)):
            return original(metric, *args, **kwargs)

    return update_state


def _outside_metrics(replacement: Callable) -> Callable:
    """What replaces a function of Keras's losses, except while a metric counts its rows."""

    def make(original):
        @functools.wraps(original)
        def either(*args, **kwargs):
            function = original if current_program().in_metric else replacement
            return function(*args, **kwargs)

        return either

    return make


def _synced_result(original: Any) -> Any:
    @functools.wraps(original)
    def result(metric):
        if current_program() is None or _internal.in_synced_reads():
            return original(metric)
        with _internal.synced_reads():
            return original(metric)

    return result
