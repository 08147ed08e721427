"""Which stage has which part of a model, and with it which weights."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.sharding import ShardedVariable
from llmos_tf.strategies.pipeline.microbatch_trace import ModelTrace, trace_program
from llmos_tf.strategies.pipeline.model_parts import free_ops, part_of_unit
from llmos_tf.strategies.pipeline.partition import count_costs, cut_by_cost

# On a model: how it is cut.
_ATTRIBUTE = "_llmos_placement"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How a model is cut into parts.

    Args:
        units: names of the layers that it calls, in order.
        begins: for each part its first unit.
    """

    units: tuple[str, ...]
    begins: tuple[int, ...]

    def begins_in(self, trace: ModelTrace) -> Sequence[int]:
        """Returns for each part its first unit in a trace of the model.

        Args:
            trace: of a step.

        Returns:
            Indices into its units.

        Raises:
            ValueError: the model calls other layers than when it was cut.
        """
        units = tuple(unit.name for unit in trace.units)
        if units != self.units:
            raise ValueError(
                "The model was cut into stages by the layers that it calls, and now it calls "
                f"others: {', '.join(units)} instead of {', '.join(self.units)}. A pipeline needs "
                "the same in each step, in training and in inference."
            )
        return self.begins


def placement_of(model: keras.Model) -> Placement:
    """Returns how a model was cut.

    Args:
        model: a model that `place_model` has placed.

    Returns:
        Its placement.
    """
    return getattr(model, _ATTRIBUTE)


def place_model(extended: Any, model: keras.Model, inputs: Any) -> None:
    """Cuts a model into parts, once, and moves its weights to the stages that use them.

    Args:
        extended: the strategy's `MeshExtended`.
        model: a built model.
        inputs: nested tensors or specs as the model takes them; the first dimension is rows.

    Raises:
        ValueError: the model cannot be cut into as many parts, or has a layer that needs the whole
            batch, or an input is ragged or sparse.
    """  # noqa: DOC502
    if getattr(model, _ATTRIBUTE, None) is not None:
        return
    _check_dense(inputs)
    _check_blocks(model, extended.schedule)
    _check_normalization(model, extended.options.num_microbatches)
    trace, free = _trace_one_row(extended, model, inputs)
    costs = count_costs(trace.graph, trace.units, free)
    begins = cut_by_cost(trace.units, costs, extended.schedule, extended.options.stage_of)
    users: dict[int, set[int]] = {}
    for read in trace.reads:
        stage = extended.schedule.stage_of_part(part_of_unit(begins, read.unit))
        users.setdefault(id(read.variable), set()).add(stage)
    # What is not read in inference, such as what a layer counts, is where its layer is.
    owners: dict[int, set[int]] = {}
    for index, unit in enumerate(trace.units):
        stage = extended.schedule.stage_of_part(part_of_unit(begins, index + 1))
        for variable in unit.weights:
            owners.setdefault(id(variable), set()).add(stage)
    for variable in model.variables:
        stored = getattr(variable, "_value", variable)
        if isinstance(stored, ShardedVariable) and stored.waits:
            stages = users.get(id(stored)) or owners.get(id(stored), ())
            stored.place(tuple(sorted(stages)) or None)
    extended.waiting = [variable for variable in extended.waiting if variable.waits]
    setattr(model, _ATTRIBUTE, Placement(units=tuple(u.name for u in trace.units), begins=begins))


def place_before_a_step(extended: Any, model: keras.Model) -> None:
    """Places a model by the inputs that it was built for, where no step has done it yet.

    Args:
        extended: the strategy's `MeshExtended`.
        model: a built model.

    Raises:
        ValueError: its inputs are not known.
    """
    if getattr(model, _ATTRIBUTE, None) is not None:
        return
    positions = getattr(getattr(model, "config", None), "max_positions", None)
    if getattr(model, "inputs", None):
        # Of a `Sequential`, the only one.
        inputs = tf.nest.map_structure(_spec, getattr(model, "_inputs_struct", model.inputs[0]))
    elif isinstance(positions, int):
        inputs = tf.TensorSpec([None, positions], tf.int32)
    else:
        raise ValueError(
            f"Where the weights of the model {model.name!r} lie is not known yet: a pipeline is "
            "cut by its first step, or by its inputs if they are declared. Run a step first, such "
            "as model.predict on a batch, or begin the model with keras.Input."
        )
    place_model(extended, model, inputs)


def call_of(model: keras.Model, training: bool) -> Callable:
    """Returns how a model is called.

    Args:
        model: a model.
        training: whether to call it as in training; not every model cares.

    Returns:
        A function of its inputs.
    """
    return functools.partial(model, training=training) if model._call_has_training_arg else model


def place_everywhere(extended: Any) -> None:
    """Places what still waits on all stages: what belongs to no model that was cut.

    Args:
        extended: the strategy's `MeshExtended`.
    """
    for variable in extended.waiting:
        variable.place(None)
    extended.waiting = []


def _check_blocks(model: keras.Model, schedule: Any) -> None:
    """Checks that there are as many blocks as parts, of a model that is made of blocks."""
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, list) and len(blocks) < schedule.num_parts:
        raise ValueError(
            f"A pipeline of {schedule.num_stages} stages with {schedule.num_chunks} chunk(s) each "
            f"cuts a model into {schedule.num_parts} parts, and {model.name!r} has "
            f"{len(blocks)} blocks. Take a smaller pipe axis, or a model of more blocks."
        )


def _check_dense(inputs: Any) -> None:
    for x in tf.nest.flatten(inputs):
        if isinstance(x, tf.RaggedTensor | tf.SparseTensor):
            raise ValueError(
                "A pipeline sends the rows of dense tensors through its stages by microbatch. "
                f"Received: a {type(x).__name__} of shape {x.shape}. Make it dense by its method "
                "to_tensor, or by tf.sparse.to_dense, or take a mesh without a pipe axis."
            )


def _check_normalization(model: keras.Model, num_microbatches: int) -> None:
    """Checks that no layer has to see the whole batch at once."""
    for layer in model._flatten_layers():
        synchronized = isinstance(layer, keras.layers.BatchNormalization) and layer.synchronized
        if synchronized and num_microbatches > 1:
            raise ValueError(
                f"BatchNormalization(synchronized=True) normalizes by the whole batch, and a "
                f"pipeline has one of num_microbatches={num_microbatches} at a time. Received: the "
                f"layer {layer.name!r}. Leave out synchronized=True, which normalizes each "
                "microbatch by itself, or use a layer such as LayerNormalization."
            )


def _trace_one_row(extended: Any, model: keras.Model, inputs: Any) -> tuple[ModelTrace, set[str]]:
    """Traces the forward pass of one row, in which all lengths are known."""
    specs = tf.nest.map_structure(_one_row, inputs)
    made = []

    def body(coordinate, token, microbatch, values):
        trace = ModelTrace(microbatch, extended.options.num_microbatches)
        with trace_program(extended, trace, coordinate, token), extended.replica_hooks():
            call_of(model, training=False)(values)
        known = [x for x in tf.nest.flatten(values) if x is not None]
        known += [coordinate, microbatch]
        known += [read.value for read in trace.reads if read.is_seed]
        made.append((trace, free_ops(trace.graph, known)))

    scalar = tf.TensorSpec([], tf.int32)
    coordinate = tf.TensorSpec([extended.mesh.coordinates().shape[1]], tf.int32)
    with tf.init_scope():
        tf.function(body, autograph=False).get_concrete_function(
            coordinate, tf.TensorSpec([], tf.resource), scalar, specs
        )
    _internal.keep_gradients_with(made[0][0].graph)
    return made[0]


def _spec(x: keras.KerasTensor) -> tf.TensorSpec:
    return tf.TensorSpec(x.shape, x.dtype)


def _one_row(x: Any) -> Any:
    """The spec of one row of a tensor."""
    if x is None or not x.shape.rank:
        return x if x is None else tf.TensorSpec(x.shape, x.dtype)
    return tf.TensorSpec([1, *x.shape[1:]], x.dtype)
