"""What is known of a replica function before it is traced: its model and its inputs."""

from collections.abc import Callable
from typing import Any

import keras

from llmos_tf import _internal


def model_of(fn: Any) -> keras.Model | None:
    """Returns the model whose step a replica function is.

    Args:
        fn: a step of a Keras model, whatever is around it, or a function with an attribute `model`.

    Returns:
        The model, or None where it is not known.
    """
    while fn is not None:
        if getattr(fn, "model", None) is not None:
            return fn.model
        owner = getattr(fn, "__self__", None)
        if isinstance(owner, keras.Model):
            return owner
        if _internal.is_keras_predict_step(fn):
            return _internal.model_of_predict_step(fn)
        fn = getattr(fn, "__wrapped__", None)
    return None


def inputs_of(args: tuple) -> Any:
    """Returns what the model of a step is called with, as one replica has it.

    Args:
        args: of the replica function: a batch as Keras has it, or x, y and sample weight.

    Returns:
        Nested tensors.
    """
    data = args[0] if len(args) == 1 else args
    return keras.utils.unpack_x_y_sample_weight(_internal.select_replica(0, data))[0]


def check_inputs(extended: Any, fn: Callable, args: tuple) -> None:
    """Checks that the mesh can split the inputs of a step's model, before it is traced.

    Args:
        extended: the strategy's `MeshExtended`.
        fn: a replica function.
        args: its arguments.

    Raises:
        ValueError: by the model's `check_inputs_on_mesh`, if it has one, or a recurrent layer keeps
            a state for each row of the batch.
    """  # noqa: DOC502
    model = model_of(fn)
    if model is None:
        return
    _check_recurrent_layers(extended, model)
    check = getattr(model, "check_inputs_on_mesh", None)
    if check is not None:
        check(inputs_of(args), extended.mesh, extended.options)


def _check_recurrent_layers(extended: Any, model: keras.Model) -> None:
    microbatches = 1 if extended.schedule is None else extended.options.num_microbatches
    parts = extended.mesh.batch_ways * microbatches
    if parts == 1:
        return
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.RNN) and layer.stateful:
            raise ValueError(
                f"The layer {layer.name!r} is stateful: it keeps a state for each row of the "
                f"batch, which is split into {parts} parts here. Take a mesh without the axes "
                "data, fsdp and pipe, or leave out stateful=True and hand the states from batch to "
                "batch yourself, with return_state=True and initial_state."
            )
