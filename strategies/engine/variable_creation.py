"""How variables are made under a mesh strategy's scope: which kind, cut how, and where.

`extended` is the strategy's `MeshExtended`; `next_creator` makes a plain variable of the keyword
arguments that TensorFlow has collected.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.sharding import Layout, MetricVariable, SeedVariable, ShardedVariable

# A keyword by which whoever makes a variable says that its gradient is its next value.
OVERWRITTEN = "overwritten"

# With the slash it is whole: no name scope comes before it.
_ANY_NAME = "component/"


def make_variable(extended: Any, next_creator: Callable, kwargs: dict[str, Any]) -> Any:
    """Makes a variable of the mesh.

    Args:
        extended: the strategy's `MeshExtended`.
        next_creator: makes a plain variable.
        kwargs: what it is to be told.

    Returns:
        A `MetricVariable`, `SeedVariable` or `ShardedVariable`.
    """
    kwargs = dict(kwargs)
    beside = kwargs.pop("colocate_with", None)
    is_overwritten = kwargs.pop(OVERWRITTEN, False)
    name = kwargs.get("name") or "variable"
    path = "/".join(filter(None, (_internal.current_path(), name)))
    is_loaded = kwargs["initial_value"] is None
    if is_loaded:
        next_creator, kwargs = _restored_later(next_creator, kwargs)
    initial = _initial_value(kwargs)
    if extended.agreement is not None and not tf.is_symbolic_tensor(initial):
        # What was drawn before, or read from a file, may differ between processes.
        initial = extended.agreement.value_of_chief(initial, path)
    strategy = extended.container_strategy()

    host = _host_of(extended, kwargs, beside)
    shape = tuple(initial.shape)
    is_metric = kwargs.get("synchronization") == tf.VariableSynchronization.ON_READ
    # The functions of a loaded model read the resource itself.
    if is_metric or is_overwritten or is_loaded:
        layout = update_layout = Layout((None,) * len(shape))
    else:
        layout, update_layout = _layouts(extended, path, shape, kwargs, beside)
    # What ZeRO cuts further for its update is not written into: it is gathered anew.
    own_memory = layout == update_layout

    def make(value, layout):
        return _components(extended, next_creator, name, kwargs, value, layout, host, own_memory)

    if is_metric:
        return MetricVariable(strategy, make(initial, layout), kwargs["aggregation"])
    kind = SeedVariable if name == "seed_generator_state" else ShardedVariable
    # Which stages hold a weight is known when its model is cut. The rest is on all of them.
    waits = extended.mesh.axis_size("pipe") > 1 and kind is ShardedVariable and shape != ()
    waits = waits and layout.stages is None
    variable = kind(
        strategy,
        _on_host(extended, next_creator, name, kwargs, initial) if waits else make(initial, layout),
        kwargs.get("aggregation") or tf.VariableAggregation.NONE,
        layout,
        update_layout,
        shape,
        path,
        host,
    )
    variable.is_overwritten = is_overwritten
    if waits:
        variable.wait(make)
        is_state = isinstance(beside, ShardedVariable) and beside.waits
        (beside.companions if is_state else extended.waiting).append(variable)
    if kind is SeedVariable:
        with tf.init_scope():
            variable.assign(initial)
    return variable


def _layouts(
    extended: Any, path: str, shape: tuple[int, ...], kwargs: dict, beside: Any
) -> tuple[Layout, Layout]:
    """Layout in storage and layout for the optimizer."""
    if isinstance(beside, ShardedVariable) and tuple(beside.shape) == shape:
        # Optimizer state is created beside its variable and cut as the optimizer sees it.
        return beside.update_layout, beside.update_layout
    if _is_optimizer_state():
        # Named after a weight, but of another shape, as Adafactor's factors: rules are for weights.
        whole = Layout((None,) * len(shape))
        return whole, whole
    trainable = kwargs.get("trainable") is not False
    dtype = tf.as_dtype(kwargs.get("dtype") or tf.float32)
    layout = extended.layout_rules.find(path, shape, trainable)
    # A scalar is not worth cutting, and an optimizer's own counters look like weights.
    if not (trainable and dtype.is_floating and shape):
        return layout, layout
    flat = ("fsdp",) if "fsdp" not in layout.dims else ()
    layout = dataclasses.replace(layout, flat=flat).effective(extended.mesh)
    more = ("data",) if extended.options.zero_stage in (1, 2) else ()
    update_layout = dataclasses.replace(layout, flat=layout.flat + more)
    return layout, update_layout.effective(extended.mesh)


def _host_of(extended: Any, kwargs: dict, beside: Any) -> str | None:
    """The host's device for what is offloaded to it, else None."""
    if _is_optimizer_state() or isinstance(beside, ShardedVariable):
        return extended.host_of_state
    # What is not trained, as statistics, counters and metrics, is written in every pass.
    dtype = tf.as_dtype(kwargs.get("dtype") or tf.float32)
    is_weight = kwargs.get("trainable") is not False and dtype.is_floating
    return extended.host_of_parameters if is_weight else None


def _is_optimizer_state() -> bool:
    return isinstance(_internal.current_owner(), _internal.BaseOptimizer)


def _on_host(
    extended: Any, next_creator: Callable, name: str, kwargs: dict, initial: tf.Tensor
) -> list[tf.Variable]:
    """One variable in place of all components."""
    with tf.init_scope(), _internal.stop_recording(), tf.device("CPU:0"):
        variable = _component(next_creator, kwargs, name, initial)
    return [variable] * len(extended.local_ranks)


def _components(
    extended: Any,
    next_creator: Callable,
    name: str,
    kwargs: dict,
    value: tf.Tensor,
    layout: Layout,
    host: str | None,
    own_memory: bool,
) -> list[tf.Variable]:
    """One variable for each local rank, on its device or the host, with its part of a value.

    Args:
        extended: the strategy's `MeshExtended`.
        next_creator: makes a plain variable.
        name: of the variable.
        kwargs: what the maker is to be told.
        value: of one device.
        layout: how it is cut.
        host: the device of all of them, or None for each rank's own.
        own_memory: whether each has memory of its own, to be written into.
    """
    components = []
    is_taken = False
    for position, rank in enumerate(extended.local_ranks):
        with tf.init_scope(), _internal.stop_recording():
            with tf.device("CPU:0"):
                part = layout.part_of(value, extended.mesh, rank)
                if part is value and own_memory:
                    # CPU devices of one process share what is handed from one to another. The first
                    # update would have to find other memory, in between what a step needs.
                    part = tf.raw_ops.DeepCopy(x=part) if is_taken else part
                    is_taken = True
            with tf.device(host or extended.mesh.devices[rank]):
                own_name = name if position == 0 else f"{name}/rank_{rank}/"
                components.append(_component(next_creator, kwargs, own_name, part))
    return components


def _restored_later(next_creator: Callable, kwargs: dict) -> tuple[Callable, dict]:
    """The maker and its arguments of a variable that `tf.saved_model.load` gives a value later."""
    with tf.init_scope(), tf.device("CPU:0"):
        # For others, TensorFlow says here that they need a value.
        like = next_creator(**kwargs)

    def make(initial_value, name, **others):
        trainable, dtype = others["trainable"], others["dtype"]
        return _internal.ResourceVariable(initial_value, trainable, name=name, dtype=dtype)

    return make, {**kwargs, "initial_value": tf.zeros(like.shape, like.dtype)}


def _initial_value(kwargs: dict) -> tf.Tensor:
    """The full initial value, computed once, on the host: what one device would start with."""
    initial = kwargs["initial_value"]
    with tf.init_scope(), _internal.stop_recording(), tf.device("CPU:0"):
        value = initial() if callable(initial) else initial
        return tf.convert_to_tensor(value, dtype=kwargs.get("dtype"))


def _component(next_creator: Callable, kwargs: dict, name: str, value: tf.Tensor) -> tf.Variable:
    """Makes the variable of one rank.

    TensorFlow keeps a function, of 38 KB, for each name that it ever made a variable by, and takes
    0.5 ms to make it; 12 blocks with Adam's state on 8 devices are 3,568 variables. So all are made
    by one name and named afterwards. In a graph of TensorFlow 1 the name is what tells them apart.
    """
    if not tf.executing_eagerly():
        return next_creator(**_component_arguments(kwargs, name, value))
    variable = next_creator(**_component_arguments(kwargs, _ANY_NAME, value))
    path = (tf.get_current_name_scope(), name.removesuffix("/"))
    _internal.rename(variable, "/".join(filter(None, path)))
    return variable


def _component_arguments(kwargs: dict, name: str, value: tf.Tensor) -> dict:
    """What the maker of a plain variable is told, for one component."""
    return {
        **kwargs,
        "shape": None,
        "aggregation": tf.VariableAggregation.NONE,
        "synchronization": tf.VariableSynchronization.AUTO,
        # An optimizer may be built while a program is traced. TensorFlow would put an initializer
        # for each rank's variable into the one program.
        "experimental_enable_variable_lifting": False,
        "name": name,
        "initial_value": value,
    }
