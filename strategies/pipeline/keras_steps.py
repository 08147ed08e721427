"""The steps of `fit`, `evaluate` and `predict`, and of a custom loop, as a pipeline.

They stand in for Keras's own steps in programs of a mesh with a `pipe` axis. A `train_step` of the
user's own that does not call Keras's is no pipeline: then every stage computes the whole model,
with weights that are sent to it.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.collectives import batch
from llmos_tf.graph.outlined_function import attributes_of
from llmos_tf.spmd.program import current_program
from llmos_tf.strategies.engine.replica_functions import inputs_of, model_of
from llmos_tf.strategies.pipeline.pipeline import Pipeline
from llmos_tf.strategies.pipeline.placement import call_of, place_everywhere, place_model


def place_model_of(extended: Any, fn: Callable, args: tuple) -> None:
    """Places the model that a replica function runs, before a program is traced.

    Args:
        extended: the strategy's `MeshExtended`.
        fn: a step of a Keras model, or a function with an attribute `model`.
        args: its arguments: first the batch, ``(x, y, sample_weight)`` or as Keras has it.
    """
    model = model_of(fn)
    if model is None:
        place_everywhere(extended)
    else:
        place_model(extended, model, inputs_of(args))


def warn_if_not_pipelined(extended: Any, fn: Callable, num_traces: int, num_pipelines: int) -> None:
    """Warns of a model's own step that was traced and is no pipeline.

    Args:
        extended: the strategy's `MeshExtended`.
        fn: the replica function that was run.
        num_traces: the engine's before that.
        num_pipelines: those of `extended` before that.
    """
    model = model_of(fn)
    was_traced = extended.engine.num_traces > num_traces
    if model is None or not was_traced or extended.num_pipelines > num_pipelines:
        return
    warnings.warn(
        f"The {getattr(fn, '__name__', 'step')} of {type(model).__name__} does not call that of "
        "keras.Model, so it is no pipeline: every stage computes the whole model, with weights "
        "that are sent to it at each step. Call super().train_step(data) in it and change what "
        "compute_loss returns, or use a mesh without a pipe axis.",
        stacklevel=2,
    )


@functools.cache
def hook_steps() -> None:
    """Has Keras's own steps be pipelines in programs of a mesh with a `pipe` axis, from now on."""
    for name, step in (
        ("train_step", train_step),
        ("test_step", test_step),
        ("predict_step", predict_step),
    ):
        original = getattr(_internal.TensorFlowTrainer, name)
        setattr(_internal.TensorFlowTrainer, name, _instead_of(original, step))
    _internal.TensorFlowTrainer.fit = _checking_batch(_internal.TensorFlowTrainer.fit)


def _instead_of(original: Callable, step: Callable) -> Callable:
    @functools.wraps(original)
    def either(model, data):
        return step(model, data) if is_pipelined() else original(model, data)

    # What is around a model's own step is looked through to find the method of the model.
    del either.__wrapped__
    return either


def _checking_batch(original: Callable) -> Callable:
    """`fit`, which checks the size of the batch before anything is traced."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def fit(model, *args, **kwargs):
        extended = model.distribute_strategy.extended
        if getattr(extended, "schedule", None) is not None:
            arguments = signature.bind(model, *args, **kwargs).arguments
            _check_batch(extended, arguments.get("x"), arguments.get("batch_size"))
        return original(model, *args, **kwargs)

    return fit


def _check_batch(extended: Any, x: Any, batch_size: int | None) -> None:
    if isinstance(x, tf.data.Dataset):
        shapes = [getattr(spec, "shape", None) for spec in tf.nest.flatten(x.element_spec)]
        rows = next((shape[0] for shape in shapes if shape is not None and shape.rank), None)
    elif all(hasattr(leaf, "shape") for leaf in tf.nest.flatten(x)):
        # Arrays, in batches of Keras's own size where none is given.
        rows = batch_size or 32
    else:
        return
    count, ways = extended.options.num_microbatches, extended.mesh.batch_ways
    if rows is not None and rows % (count * ways):
        replicas = f" for each of {ways} replicas" if ways > 1 else ""
        raise ValueError(
            f"A batch of {rows} rows cannot be cut into num_microbatches={count} equal "
            f"microbatches{replicas}. Take batches of a multiple of {count * ways} rows, or "
            "another number of microbatches. (The last batch of an epoch may be smaller.)"
        )


def is_pipelined() -> bool:
    """Returns whether a program of a mesh with a `pipe` axis is being traced."""
    program = current_program()
    return program is not None and program.trace is None and program.mesh.axis_size("pipe") > 1


def train_step(model: keras.Model, data: Any) -> dict[str, Any]:
    """Stands in for Keras's `train_step`.

    Args:
        model: a compiled model.
        data: this replica's rows.

    Returns:
        Metric results.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    optimizer = model.optimizer
    seed = _seed_of(optimizer)
    pipeline = _run(model, (x, y, sample_weight), training=True, seed=seed)
    logs = _finish(model, pipeline, x, y, sample_weight)
    weights = model.trainable_weights
    if weights:
        optimizer.apply_gradients(zip(pipeline.gradients(weights), weights, strict=True))
    else:
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
    return logs()


def test_step(model: keras.Model, data: Any) -> dict[str, Any]:
    """Stands in for Keras's `test_step`.

    Args:
        model: a compiled model.
        data: this replica's rows.

    Returns:
        Metric results.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    pipeline = _run(model, (x, y, sample_weight), training=False, seed=None)
    return _finish(model, pipeline, x, y, sample_weight)()


def predict_step(model: keras.Model, data: Any) -> Any:
    """Stands in for Keras's `predict_step`.

    Args:
        model: a model.
        data: this replica's rows.

    Returns:
        The model's outputs; in a process that has its last part zeros on other stages.
    """
    x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    call = call_of(model, training=False)
    outputs = Pipeline(model, lambda x: (None, call(x)), x, None).outputs()
    return tf.nest.map_structure(batch.of_last_stage, outputs)


def run_loss(
    model: keras.Model,
    loss: Callable[[Any], tf.Tensor],
    data: Any,
    optimizer: keras.Optimizer | None = None,
) -> Pipeline:
    """Runs a model and a loss of a custom loop.

    Args:
        model: a built model.
        loss: of the data of a microbatch, without regularizers.
        data: this replica's rows.
        optimizer: says how the loss is scaled; None for the forward pass alone.

    Returns:
        The pipeline, which has loss and gradients.
    """
    seed = None if optimizer is None else _seed_of(optimizer)
    return Pipeline(model, lambda data: (loss(data), ()), data, seed)


def _run(model: keras.Model, data: Any, training: bool, seed: Any) -> Pipeline:
    keeps = _needs_outputs(model)
    call = call_of(model, training)

    def step(data):
        x, y, sample_weight = data
        y_pred = call(x)
        loss = model._compute_loss(
            x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
        )
        if not keeps:
            return loss, ()
        return loss, (y_pred, [dict(attributes_of(x)) for x in tf.nest.flatten(y_pred)])

    return Pipeline(model, step, data, seed)


def _with_attributes(y_pred: Any, attributes: list[dict[str, tf.Tensor]]) -> Any:
    """Outputs of all microbatches with the masks and logits that losses and metrics look for."""
    for x, values in zip(tf.nest.flatten(y_pred), attributes, strict=True):
        for name, value in values.items():
            setattr(x, name, value)
    return y_pred


def _finish(model: keras.Model, pipeline: Pipeline, x, y, sample_weight) -> Callable[[], dict]:
    """Updates metrics; returns what reads them."""
    pipeline.update_loss_metrics()
    loss = pipeline.loss()
    if pipeline.is_last:
        first = next(leaf for leaf in tf.nest.flatten(x) if leaf is not None)
        model._loss_tracker.update_state(loss, sample_weight=tf.shape(first)[0])
    y_pred = _with_attributes(*pipeline.outputs()) if _needs_outputs(model) else None
    own = type(model).compute_metrics is not keras.Model.compute_metrics
    if own or (pipeline.is_last and y_pred is not None):
        # On other stages what it counts is never read, but it may communicate.
        return lambda: model.compute_metrics(x, y, y_pred, sample_weight)
    return model.get_metrics_result


def _needs_outputs(model: keras.Model) -> bool:
    """Whether metrics are computed of the model's outputs."""
    own = type(model).compute_metrics is not keras.Model.compute_metrics
    return own or model._compile_metrics is not None


def _seed_of(optimizer: keras.Optimizer) -> Callable[[], tf.Tensor]:
    """The gradient of what an optimizer minimizes, by the loss."""

    def seed():
        one = tf.ones([], keras.config.floatx())
        return optimizer.scale_loss(one)

    return seed
