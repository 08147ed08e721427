"""The train step: the two algorithms that the project stands on, as one program.

*Data-parallel algorithm*, over the axes `data` and `fsdp`:

1. split the batch: `split_batch`;
2. local gradients, by each rank's rows: `local_gradients`;
3. all-reduce y = Σ_j x_j of the gradients: `strategies.gradients.sync.sync_gradients`;
4. update θ ← θ - η∇J(θ), the same on every rank: `strategies.optimizer.apply.apply_gradients`;
5. repeat: call the step again.

*Model-parallel algorithm*, over the axis `tensor`:

1. split the model: layouts cut its variables (`sharding.Layout`, `models.layouts`);
2. each rank computes its part, forward and backward: the same `local_gradients`;
3. exchange intermediate results where a part ends: `layers.tensor_region.TensorRegion`;
4. update: each rank its own part, the same `apply_gradients`.

On a mesh of both, both happen. On an axis `pipe` a rank has the gradients of its stage's layers, by
all microbatches (`strategies.pipeline`). `model.fit` under a strategy's scope runs Keras's own
`train_step` through the same steps 1, 3 and 4 (`strategies.keras_patches.while_tracing`).
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.collectives.batch import weigh_rows
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models.language_model import LanguageModel
from llmos_tf.spmd.program import current_program
from llmos_tf.strategies.engine.input import split_batch
from llmos_tf.strategies.pipeline.keras_steps import is_pipelined, run_loss
from llmos_tf.strategies.pipeline.pipeline import Pipeline

Batch = tuple[Any, Any, Any]


def make_train_step(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, loss: Any
) -> tf.types.experimental.PolymorphicFunction:
    """Makes a step for a custom loop: it updates the model and returns the loss.

    Model and optimizer are made under the strategy's scope, or without one for one device.

    Args:
        model: a built Keras model.
        optimizer: any Keras optimizer; `GradientDescent` is the plain one.
        loss: a `keras.losses.Loss`, its name, or a function of (y_true, y_pred).

    Returns:
        A `tf.function` of ``(x, y)`` or ``(x, y, sample_weight)``, one by one or as a tuple: global
        batches, or the per-replica ones that a dataset yields after
        ``strategy.experimental_distribute_dataset``. It returns the loss of the global batch before
        the update, a scalar.

    Raises:
        ValueError: the model has no weights yet, or the optimizer belongs to another strategy.

    Example:
        >>> with strategy.scope():
        ...     model = GPT.from_preset("gpt_tiny")
        ...     optimizer = keras.optimizers.AdamW(3e-4)
        >>> step = make_train_step(model, optimizer, TokenCrossEntropy())
        >>> for x, y in dataset:
        ...     loss = step(x, y)
    """
    loss = as_loss(loss)
    strategy = _strategy_of(model)
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} has no weights yet, so there is nothing to train. Build it "
            "first, under the strategy's scope: give its input shape, or call it on a batch."
        )
    if not optimizer.built:
        with strategy.scope():
            optimizer.build(model.trainable_variables)

    @weigh_rows
    def replica_step(*batch):
        return train_step(model, optimizer, loss, batch)

    # By it a pipeline knows which model to cut.
    replica_step.model = model

    # Three arguments always: to reduce retracing, TensorFlow compares them one by one.
    @tf.function(reduce_retracing=True, autograph=False)
    def step(x, y=None, sample_weight=None, *more):
        return _run(replica_step, as_batch(x, y, sample_weight, *more), strategy)

    return step


def make_loss_step(model: keras.Model, loss: Any) -> tf.types.experimental.PolymorphicFunction:
    """Makes a step that returns the loss of a batch and changes nothing.

    Args:
        model: a built Keras model.
        loss: as for `make_train_step`.

    Returns:
        A `tf.function` like that of `make_train_step`.
    """
    loss = as_loss(loss)
    strategy = _strategy_of(model)

    @weigh_rows
    def replica_step(*batch):
        if is_pipelined():
            return _pipeline(model, None, loss, batch, training=False).loss()
        return batch_loss(model, loss, batch, training=False)

    replica_step.model = model

    @tf.function(reduce_retracing=True, autograph=False)
    def step(x, y=None, sample_weight=None, *more):
        return _run(replica_step, as_batch(x, y, sample_weight, *more), strategy)

    return step


def _run(replica_step: Callable, batch: Batch, strategy: tf.distribute.Strategy) -> tf.Tensor:
    """Runs a replica function on the ranks' rows of a global batch, while a step is traced."""
    result = strategy.run(replica_step, args=split_batch(batch, strategy))
    _internal.keep_gradients_with(tf.compat.v1.get_default_graph())
    return _first(result, strategy)


def train_step(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, loss: Any, batch: Batch
) -> tf.Tensor:
    """One step of a rank: local gradients, then all-reduce and update.

    Args:
        model: the model.
        optimizer: its optimizer.
        loss: a `keras.losses.Loss`.
        batch: this replica's rows ``(x, y, sample_weight or None)``.

    Returns:
        The loss of the global batch, a scalar, the same on every rank.
    """
    if is_pipelined():
        pipeline = _pipeline(model, optimizer, loss, batch, training=True)
        gradients = pipeline.gradients(model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return pipeline.loss()
    value, gradients = local_gradients(model, optimizer, loss, batch)
    optimizer.apply(gradients, model.trainable_variables)
    return value


def local_gradients(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, loss: Any, batch: Batch
) -> tuple[tf.Tensor, list[Any]]:
    """Gradients of the loss by this rank's rows, for the parts of the variables that it stores.

    Args:
        model: the model.
        optimizer: scales the loss where it works with loss scaling.
        loss: a `keras.losses.Loss`.
        batch: this replica's rows ``(x, y, sample_weight or None)``.

    Returns:
        The loss of the global batch, a scalar, the same on every rank; and a gradient for each
        trainable variable, None where it had no part in the loss. The sum of the ranks' gradients
        is the gradient of the loss.
    """
    with tf.GradientTape() as tape:
        value = batch_loss(model, loss, batch, training=True)
        scaled = optimizer.scale_loss(value)
    return value, tape.gradient(scaled, model.trainable_variables)


def batch_loss(model: keras.Model, loss: Any, batch: Batch, training: bool) -> tf.Tensor:
    """The loss of the global batch: a sum over all ranks' rows, divided by the global weight.

    What is differentiated is this rank's share of it (`strategies.keras_patches.while_tracing`).

    Args:
        model: the model.
        loss: a `keras.losses.Loss`.
        batch: this replica's rows ``(x, y, sample_weight or None)``.
        training: whether layers such as dropout are on.

    Returns:
        A scalar, the same on every rank.
    """
    x, y, sample_weight = batch
    program = current_program()
    if program is None:
        return _total_loss(model, loss, x, y, sample_weight, training)
    sharded = isinstance(loss, TokenCrossEntropy) and isinstance(model, LanguageModel)
    with program.having(sharded_logits=sharded, logits_axis=None, logits_stream=None):
        return _total_loss(model, loss, x, y, sample_weight, training)


def _pipeline(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer | None,
    loss: Any,
    batch: Batch,
    training: bool,
) -> Pipeline:
    """Runs the model as a pipeline; without an optimizer forward only."""
    return run_loss(model, lambda rows: batch_loss(model, loss, rows, training), batch, optimizer)


def as_loss(loss: Any) -> keras.losses.Loss:
    """Returns a loss by name, function or object as a `keras.losses.Loss`.

    Args:
        loss: what `model.compile` takes for one output.

    Returns:
        The loss object.
    """
    loss = keras.losses.get(loss)
    return loss if isinstance(loss, keras.losses.Loss) else _FunctionLoss(loss)


def as_batch(x: Any, y: Any = None, sample_weight: Any = None, *more: Any) -> Batch:
    """Returns ``(x, y, sample_weight or None)`` from what a step was called with.

    Args:
        x: inputs, or a tuple ``(x, y)`` or ``(x, y, sample_weight)`` by itself.
        y: labels.
        sample_weight: weights, or None.
        *more: nothing.

    Returns:
        Three values.

    Raises:
        ValueError: inputs without labels, or another number of values.
    """
    values = (x, y, sample_weight, *more)
    if y is None:
        values = x if isinstance(x, tuple | list) else (x,)
    if not 2 <= len(values) <= 3:
        raise ValueError(
            "A train step takes (x, y) or (x, y, sample_weight), one by one or as a tuple. "
            f"Received: {len(values)} value(s), the first of {type(values[0]).__name__}."
        )
    return values[0], values[1], values[2] if len(values) == 3 else None


class _FunctionLoss(keras.losses.Loss):
    """A function of (y_true, y_pred) that returns a loss for each row, or their mean."""

    def __init__(self, function: Callable[[Any, Any], tf.Tensor]):
        name = getattr(function, "__name__", "")
        # A lambda's is none that TensorFlow takes.
        super().__init__(name=name if name.isidentifier() else "loss")
        self._function = function

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        return self._function(y_true, y_pred)


def _total_loss(model, loss, x, y, sample_weight, training) -> tf.Tensor:
    value = loss(y, model(x, training=training), sample_weight=sample_weight)
    if value.shape == [0]:
        # On one device Keras leaves the losses of no rows as they are.
        value = tf.reduce_sum(value)
    # Regularizers and the like.
    return tf.add_n([value, *(tf.cast(tf.reduce_sum(term), value.dtype) for term in model.losses)])


def _strategy_of(model: keras.Model) -> tf.distribute.Strategy:
    """The strategy under whose scope the model was made; the default one without."""
    return model.distribute_strategy


def _first(value: Any, strategy: tf.distribute.Strategy) -> tf.Tensor:
    return strategy.experimental_local_results(value)[0]
