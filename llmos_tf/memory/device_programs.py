"""The program of each device in the train step of a model, traced."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.collectives.annotations import sending


@dataclass(frozen=True, kw_only=True)
class DeviceProgram:
    """What one device, or several alike, run in a step.

    Args:
        graph: of the program.
        devices: those that run it.
        data: numbers of the graph's inputs that hold the batch.
        trained: numbers of those that are handles of weights or of an optimizer's state.
    """

    graph: tf.Graph
    devices: tuple[str, ...]
    data: tuple[int, ...]
    trained: tuple[int, ...]


def trace_step(model: keras.Model, step: Any, batch: Any) -> Any:
    """Traces a train step for a batch of known size.

    Args:
        model: the model.
        step: a `tf.function` of the batch, such as `make_train_step` returns; None for the step of
            `model.fit`.
        batch: arrays or specs as `fit` or the step takes them; None for what either has last been
            traced with.

    Returns:
        A concrete function, or None where the size of a batch is not known.
    """
    if step is None and getattr(model, "optimizer", None) is None:
        return None
    specs = _specs(batch) if batch is not None else _known_specs(model, step)
    known = [spec for spec in tf.nest.flatten(specs) if spec is not None]
    if not known or not all(spec.shape.is_fully_defined() for spec in known):
        return None
    strategy = model.distribute_strategy
    with sending(strategy) as left_out:
        if step is not None:
            arguments = specs if isinstance(specs, tuple | list) else (specs,)
            step = _internal.untraced(step) if left_out else step
            return step.get_concrete_function(*arguments)
        return _step_of_fit(model).get_concrete_function(specs)


def _step_of_fit(model: keras.Model) -> tf.types.experimental.PolymorphicFunction:
    strategy = model.distribute_strategy
    if not model.optimizer.built:
        with strategy.scope():
            model.optimizer.build(model.trainable_variables)

    @tf.function(autograph=False)
    def step_of_fit(data):
        return strategy.run(model.train_step, args=(data,))

    return step_of_fit


def device_programs(concrete: Any, trained: Iterable[tf.Variable]) -> list[DeviceProgram]:
    """Finds the programs of the devices in a traced step.

    Args:
        concrete: a concrete function that runs a replica function on a mesh, or a step of one
            device.
        trained: variables as TensorFlow has them: each device's parts of the weights and of the
            optimizer's state.

    Returns:
        The programs that differ, each with its devices.
    """
    graph = concrete.graph
    handles = {id(variable.handle) for variable in trained}
    inside = {x.ref() for outer, x in graph.captures if id(outer) in handles}
    captured = {x.ref() for _, x in graph.captures}
    data = [x for x in graph.inputs if x.ref() not in captured]
    calls: dict[str, list[tf.Operation]] = {}
    for op in graph.get_operations():
        if op.type in ("PartitionedCall", "StatefulPartitionedCall") and op.device:
            name = op.get_attr("f").name
            if _internal.attributes_of_function(graph, name)["_noinline"].b:
                calls.setdefault(name, []).append(op)
    if not calls:
        return [
            DeviceProgram(
                graph=graph,
                devices=(),
                data=_places(graph.inputs, {x.ref() for x in data}),
                trained=_places(graph.inputs, inside),
            )
        ]
    of_batch = _computed_of(graph, data)
    return [
        DeviceProgram(
            graph=_internal.graph_of_function(graph, name),
            devices=tuple(op.device for op in ops),
            data=_places(ops[0].inputs, of_batch),
            trained=_places(ops[0].inputs, inside),
        )
        for name, ops in calls.items()
    ]


def _places(tensors: Iterable[tf.Tensor], wanted: set) -> tuple[int, ...]:
    return tuple(i for i, x in enumerate(tensors) if x.ref() in wanted)


def _computed_of(graph: tf.Graph, first: Iterable[tf.Tensor]) -> set:
    found = {x.ref() for x in first}
    for op in graph.get_operations():
        if any(x.ref() in found for x in op.inputs):
            found.update(x.ref() for x in op.outputs)
    return found


def _specs(batch: Any) -> Any:
    def spec(x):
        if isinstance(x, tf.TypeSpec):
            return x
        dtype = tf.as_dtype(x.dtype)
        # As `fit` takes NumPy's arrays.
        is_float = dtype.is_floating and isinstance(x, np.ndarray)
        return tf.TensorSpec(x.shape, keras.config.floatx() if is_float else dtype)

    return tf.nest.map_structure(lambda x: None if x is None else spec(x), batch)


def _known_specs(model: keras.Model, step: Any) -> Any:
    """Specs of the batch that the step was last traced with."""
    if step is not None:
        traces = _internal.specs_of_traces(step)
        return tuple(traces[-1]) if traces else None
    specs = _internal.specs_of_train_function(model)
    if specs is None:
        return None
    rows = _rows_of_last_fit(model)

    def whole(spec):
        """The spec of the global batch."""
        parts = getattr(spec, "_value_specs", None)
        one = spec if parts is None else parts[0]
        if one.shape.rank and one.shape[0] is not None and parts is not None:
            return tf.TensorSpec([one.shape[0] * len(parts), *one.shape[1:]], one.dtype)
        if one.shape.rank and one.shape[0] is None:
            return tf.TensorSpec([rows, *one.shape[1:]], one.dtype)
        return one

    return tf.nest.map_structure(lambda x: None if x is None else whole(x), specs)


def _rows_of_last_fit(model: keras.Model) -> int | None:
    """Rows of a step, on average, of the last epoch: its loss was averaged over all rows."""
    history = getattr(model, "history", None)
    steps = None if history is None else history.params.get("steps")
    if not steps or any(name.startswith("val_") for name in history.history):
        return None
    count = float(tf.convert_to_tensor(model._loss_tracker.count.value))
    return -(-int(count) // steps) or None
