"""Every private Keras name that the project uses, with its reason."""

import inspect
from typing import Any

import tensorflow as tf

# Identifies the object that creates a variable: optimizer state is recognised by nothing else.
from keras.src.backend.common.global_state import get_global_attribute

# The path of the variable that is being created; the public `Variable.path` exists only afterwards.
from keras.src.backend.common.name_scope import current_path

# `keras.remat` and `keras.RematScope` call its `remat`, for which there is no public hook.
# Keras ops ask its `Variable` for a shape, which is a shard's where a rank updates one.
from keras.src.backend.tensorflow import core as keras_core

# Base classes of the loss, trainer and optimizer that `fit` runs. Keras has no public hook between
# "local gradients" and "update", nor one for the divisor of a loss, so the step wraps these.
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

# `Model.save`, `save_weights` and the functions of `keras.saving` all end in these two.
from keras.src.legacy.saving import legacy_h5_format
from keras.src.losses import loss as keras_loss
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.optimizers.loss_scale_optimizer import LossScaleOptimizer
from keras.src.saving import saving_lib

# What `compile(metrics=...)` makes: metrics that hand what they are given to others.
from keras.src.trainers.compile_utils import CompileMetrics, MetricsList
from keras.src.trainers.trainer import Trainer

# The seed of `keras.utils.set_random_seed` has no public getter.
from keras.src.utils.rng_utils import get_random_seed as keras_random_seed

from llmos_tf._internal.tracing import specs_of_traces

__all__ = [
    "BaseOptimizer",
    "CompileMetrics",
    "LossScaleOptimizer",
    "MetricsList",
    "TFOptimizer",
    "TensorFlowTrainer",
    "Trainer",
    "current_owner",
    "current_path",
    "functions_of_keras_step",
    "is_keras_predict_step",
    "is_keras_step",
    "keras_core",
    "keras_loss",
    "keras_random_seed",
    "legacy_h5_format",
    "model_of_predict_step",
    "name_of_step",
    "save_backup",
    "saving_lib",
    "specs_of_train_function",
]


def is_keras_step(fn: Any) -> bool:
    """Returns whether a function is a model's own step, which `fit` and the like run.

    Keras gives it the rows of a replica, but in `train_on_batch` and the like the global batch.
    """
    while hasattr(fn, "__wrapped__"):
        fn = fn.__wrapped__
    if isinstance(getattr(fn, "__self__", None), Trainer):
        return fn.__name__ in ("train_step", "test_step")
    return is_keras_predict_step(fn)


def is_keras_predict_step(fn: Any) -> bool:
    """Returns whether a function is the step of `predict`."""
    while hasattr(fn, "__wrapped__"):
        fn = fn.__wrapped__
    name = getattr(fn, "__qualname__", "")
    return name == "TensorFlowTrainer.make_predict_function.<locals>.one_step_on_data"


def name_of_step(fn: Any) -> str:
    """Returns the name of a replica function: of a model's step "train_step" and the like."""
    if is_keras_predict_step(fn):
        return "predict_step"
    while hasattr(fn, "__wrapped__"):
        fn = fn.__wrapped__
    return getattr(fn, "__name__", type(fn).__name__)


def model_of_predict_step(fn: Any) -> Any:
    """Returns the model whose `predict` made a step, which nothing but the step itself knows."""
    while hasattr(fn, "__wrapped__"):
        fn = fn.__wrapped__
    return inspect.getclosurevars(fn).nonlocals["self"]


def functions_of_keras_step(step_function: Any) -> list[Any]:
    """Returns the `tf.function`s inside a model's `train_function`; none where it runs eagerly.

    Keras keeps the one for a dataset in a plain function, and another one in it for batches that
    come from no dataset, as those of `train_on_batch`.
    """
    found = inspect.getclosurevars(step_function).nonlocals
    wrapped = inspect.getclosurevars(found["one_step_on_data"]).nonlocals["step_func"]
    functions = [found["multi_step_on_iterator"], wrapped]
    return [f for f in functions if isinstance(f, tf.types.experimental.PolymorphicFunction)]


def specs_of_train_function(model: Any) -> Any:
    """Returns specs of the data of a step that `fit` has traced last, or None if there is none.

    Rows of replicas have a spec for each replica. Keras keeps the traced function inside others.
    """
    function = getattr(model, "train_function", None)
    if not inspect.isfunction(function):
        return None
    one_step = inspect.getclosurevars(function).nonlocals.get("one_step_on_data")
    specs = specs_of_traces(getattr(one_step, "__wrapped__", None))
    return specs[-1][0] if specs else None


def current_owner() -> Any:
    """Returns the Keras object, as an optimizer, that is making a variable, or None."""
    scopes = get_global_attribute("name_scope_stack", default=[])
    return scopes[-1].caller if scopes else None


def save_backup(callback: Any) -> None:
    """Has a `BackupAndRestore` save now; in public it does so after an epoch or so many batches."""
    callback._save_model()
