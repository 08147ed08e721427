"""Counts what a model and a step of it hold on each device."""

from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from llmos_tf.graph.inlining import ProgramOps
from llmos_tf.memory.device_programs import DeviceProgram, device_programs, trace_step
from llmos_tf.memory.liveness import fullest_moment
from llmos_tf.memory.value_kinds import OTHER, kinds_of_values

HOST = "host"
_IN_A_STEP = ("gradients", "activations", "communication")


def report(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer | None = None,
    *,
    step: Any = None,
    batch: Any = None,
) -> list[dict[str, Any]]:
    """Counts what a model holds on each device of this process at the fullest moment of a step.

    Variables are counted as they are, to the byte and padding included: what ZeRO's formulas
    (arXiv 1910.02054) predict. Gradients, activations and communication live within a step only;
    they are counted in the traced program of each device (`llmos_tf.memory.liveness`), at the
    moment at which all together are most. A kind that is done with by then counts as 0, so that the
    sum of a row is what the device needs. Kernels' scratch space, an allocator's own table and what
    it loses between blocks are not in it: on CPU devices 7 to 14% of what the process takes.

    Args:
        model: a built Keras model, made under any strategy or none.
        optimizer: for a custom loop around a model that is not compiled; None takes that of
            `model.compile`. One without state yet counts as nothing.
        step: for a custom loop its step, as `make_train_step` returns it; None takes that of
            `model.fit`.
        batch: a global batch as the step or `fit` takes it, such as ``(x, y)``: arrays or
            `tf.TensorSpec`s, of which the shapes count. None takes what the step, or `fit`, was
            traced with. Where `fit` has taken batches of any size, that is the mean size in the
            last epoch; after validation, give the batch.

    Returns:
        A dict for each device, in rank order: `device`, and the bytes of `parameters` (trainable
        weights), `gradients` (and what an optimizer makes of them on the way), `optimizer` (its
        state, its copies of weights, accumulated gradients, and what compressed gradients leave for
        the next step), `activations`, `communication`
        (what collectives pack, gathered weights, and sums of gradients) and `other` (statistics of
        layers, states of random generators, metrics; within the step copies of weights, such as
        those in another type, and of those that are offloaded), and `host` (weights and optimizer
        state that are offloaded: they are in no other column; gradients come and go beside them,
        at most as many bytes as the weights that they are of). Where no batch is known,
        `gradients`, `activations` and `communication` are None.

    Raises:
        ValueError: the model has no weights yet, or is to be a pipeline and its inputs are not
            known, so that its weights have no place yet.

    Example:
        >>> with ZeroStrategy(stage=3).scope():
        ...     model = keras.Sequential([keras.Input([64]), keras.layers.Dense(64)])
        ...     model.compile("adam", "mse")
        >>> x = tf.TensorSpec([32, 64])
        >>> [row["parameters"] for row in report(model, batch=(x, x))]  # on 4 devices
        [4160, 4160, 4160, 4160]
    """
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} has no weights yet, so there is nothing to count. Build it "
            "first: give its input shape, or call it on a batch."
        )
    place = getattr(model.distribute_strategy.extended, "place", None)
    if place is not None:
        place(model)
    optimizer = getattr(model, "optimizer", None) if optimizer is None else optimizer
    concrete = trace_step(model, step, batch)
    trainable = list(model.trainable_variables)
    state = [] if optimizer is None else list(optimizer.variables)
    known = {id(variable) for variable in (*trainable, *state)}
    metrics = [variable for metric in model.metrics for variable in metric.variables]
    others = [v for v in (*model.variables, *metrics) if id(v) not in known]
    # What compressed gradients leave for the next step belongs to how weights are updated.
    for variable in trainable:
        stored = getattr(variable, "_value", variable)
        state += getattr(stored, "reduction_state", {}).values()
    # A variable's parts are in rank order, and every rank holds a part of every variable.
    rows: dict[str, dict[str, Any]] = {}
    for kind, variables in (("parameters", trainable), ("optimizer", state), ("other", others)):
        for device, host, part in _parts(variables):
            row = rows.setdefault(device, _empty_row(device, concrete is not None))
            row[kind if host is None else HOST] += part.shape.num_elements() * part.dtype.size
    if concrete is not None:
        parts = list(_parts([*trainable, *state]))
        host = next((host for _, host, _ in parts if host is not None), None)
        for program in device_programs(concrete, [part for *_, part in parts]):
            counted = _count(program, host)
            for device in program.devices or tuple(rows):
                for kind, size in counted.items():
                    rows[_canonical(device)][kind] += size
    return list(rows.values())


def _empty_row(device: str, has_step: bool) -> dict[str, Any]:
    within = 0 if has_step else None
    return {
        "device": device,
        "parameters": 0,
        "gradients": within,
        "optimizer": 0,
        "activations": within,
        "communication": within,
        "other": 0,
        HOST: 0,
    }


def _count(program: DeviceProgram, host: str | None) -> dict[str, int]:
    """Bytes of each kind at the fullest moment of a program, but for those on a host."""
    ops = ProgramOps(program.graph, host)
    data = [ops.inputs[i] for i in program.data]
    kinds = kinds_of_values(ops, data, {ops.inputs[i] for i in program.trained})
    moment = fullest_moment(ops)
    counted = dict.fromkeys((*_IN_A_STEP, OTHER), 0)
    for value, size in moment.held.items():
        counted[kinds.get(value, "activations")] += size
    counted["activations"] += moment.inside + sum(ops.sizes[i] for i in data)
    return counted


def _canonical(device: str) -> str:
    return tf.DeviceSpec.from_string(device).to_string()


def _parts(
    variables: Iterable[keras.Variable],
) -> Iterable[tuple[str, str | None, tf.Variable]]:
    """Every `tf.Variable` that holds a part of one of `variables`, once, with whose part it is.

    Yields:
        The device of the rank, the host's if the part lies there, and the part.
    """
    for variable in {id(v): v for v in variables}.values():
        inner = getattr(variable, "_value", variable)
        host = getattr(inner, "host", None)
        parts = inner.values if isinstance(inner, tf.distribute.DistributedValues) else [inner]
        owners = [part.device for part in parts]
        if host is not None:
            owners = inner.distribute_strategy.extended.worker_devices
        yield from ((owner, host, part) for owner, part in zip(owners, parts, strict=True))
