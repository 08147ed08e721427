"""Every private TensorFlow and Keras name that the project uses, with its reason.

Nothing else in the project imports ``tensorflow.python`` or ``keras.src`` (a test checks it), so an
upgrade of either library is read off this page. Each name says which public feature it stands in
for, or why there is none.
"""

import contextlib
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

# Which object makes a variable: what an optimizer keeps has no other sign in common.
from keras.src.backend.common.global_state import get_global_attribute

# Base classes of the loss, trainer and optimizer that `fit` runs. Keras has no public hook between
# "local gradients" and "update", nor one for the divisor of a loss, so the step wraps these.
from keras.src.backend.common.name_scope import current_path

# `keras.remat` and `keras.RematScope` call its `remat`, for which there is no public hook.
# Keras's ops ask its `Variable` for a shape, which is a part's where a rank updates one.
from keras.src.backend.tensorflow import core as keras_core
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

# What `Model.save`, `save_weights` and the functions of `keras.saving` all end in.
from keras.src.legacy.saving import legacy_h5_format
from keras.src.losses import loss as keras_loss
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.optimizers.loss_scale_optimizer import LossScaleOptimizer
from keras.src.saving import saving_lib
from keras.src.trainers.trainer import Trainer

# The seed of `keras.utils.set_random_seed` cannot be asked for publicly.
from keras.src.utils.rng_utils import get_random_seed as keras_random_seed

# The coordination service, by which processes notice that another has died, and agree on things.
from tensorflow.compiler.xla.tsl.protobuf.coordination_config_pb2 import CoordinatedJob

# The message that describes a process of a cluster; `tf.distribute.Server` starts a server of its
# own instead of joining the eager runtime to the cluster.
from tensorflow.core.protobuf.tensorflow_server_pb2 import ServerDef

# `tf.distribute` has no public base for a strategy that creates its own kind of variable or runs a
# program its own way: MirroredExtended is what MirroredStrategy keeps behind `.extended`.
# The type of per-replica values, which an iterator shows as its `element_spec`, has no public name.
from tensorflow.python.distribute import (
    distribute_lib,
    distribute_utils,
)
from tensorflow.python.distribute.mirrored_strategy import MirroredExtended
from tensorflow.python.distribute.values import (
    MirroredVariable,
    PerReplica,
    PerReplicaSpec,
    SyncOnReadVariable,
)

# `tf.config` can list and split devices, but only the context can join a cluster of processes for
# collectives (MultiWorkerMirroredStrategy does the same) or canonicalize a device's name.
from tensorflow.python.eager import context as eager_context

# The lists of attributes that `tf.function` lets through; see `unspecialized`.
from tensorflow.python.eager.polymorphic_function import attributes as function_attributes

# `tf.GradientTape.stop_recording` needs the tape at hand; creating a variable inside a user's tape
# must not be recorded by it. And whether there is a tape at all, no public function tells.
from tensorflow.python.eager.record import could_possibly_record, stop_recording

# Which captured resources a function only reads: what it writes orders the calls of it.
from tensorflow.python.framework.auto_control_deps_utils import (
    get_read_only_resource_input_indices_graph,
    register_read_only_resource_op,
)

# `tf.type_spec_from_value` is public; the base class of a user-defined CompositeTensor is not.
from tensorflow.python.framework.composite_tensor import CompositeTensor

# Functions of a graph that was imported are definitions alone; see `graph_of_function`.
from tensorflow.python.framework.function_def_to_graph import function_def_to_graph

# There is no public way to take back what `tf.custom_gradient` has registered.
from tensorflow.python.framework.ops import gradient_registry

# `tf.Variable` goes through the creators of the scope that is entered, and makes a variable of the
# mesh there; an exported model has plain ones.
from tensorflow.python.ops.resource_variable_ops import ResourceVariable
from tensorflow.python.types.distribute import (
    DistributedDatasetInterface,
    DistributedIteratorInterface,
)

__all__ = [
    "BaseOptimizer",
    "CompositeTensor",
    "CoordinatedJob",
    "DistributedDataset",
    "DistributedIteratorInterface",
    "LossScaleOptimizer",
    "MirroredExtended",
    "MirroredVariable",
    "PerReplica",
    "PerReplicaSpec",
    "ReplicaContext",
    "ResourceVariable",
    "ServerDef",
    "SyncOnReadVariable",
    "TFOptimizer",
    "TensorFlowTrainer",
    "Trainer",
    "add_functions",
    "attributes_of_function",
    "call_with_captures",
    "captured_container",
    "connected_cluster",
    "could_possibly_record",
    "current_owner",
    "current_path",
    "eager_context",
    "functions_of_keras_step",
    "graph_of_function",
    "in_synced_reads",
    "is_keras_predict_step",
    "is_keras_step",
    "keras_core",
    "keras_loss",
    "keras_random_seed",
    "legacy_h5_format",
    "lost_workers",
    "model_of_predict_step",
    "op_attribute",
    "op_seeds",
    "patched",
    "regroup",
    "replace_input",
    "reserve_collective_keys",
    "saving_lib",
    "select_replica",
    "specs_of_traces",
    "specs_of_train_function",
    "stop_recording",
    "synced_reads",
    "traced_functions",
    "unspecialized",
    "untraced",
    "written_captures",
]

# `fit` knows a distributed dataset by the name and the module of one of its base classes.
DistributedDataset = type(
    "DistributedDataset",
    (DistributedDatasetInterface,),
    {"__module__": "tensorflow.python.distribute.input_lib"},
)

ReplicaContext = distribute_lib.ReplicaContext
regroup = distribute_utils.regroup
select_replica = distribute_utils.select_replica

# Reads of metric variables in a replica are summed over replicas while this is entered.
synced_reads = distribute_lib.variable_sync_on_read_context
in_synced_reads = distribute_lib.in_variable_sync_on_read_context

# TensorFlow identifies a group of collective ops by an integer that is global to the process, and
# a cluster needs the same integers in the same order everywhere. Every strategy takes a block of
# its own, so that two strategies of one process never meet (DESIGN: fact 9).
_COLLECTIVE_KEY_BLOCKS = itertools.count(1 << 18, 1 << 18)


def reserve_collective_keys() -> int:
    """Returns the first of 2**18 collective group keys that no other strategy uses."""
    return next(_COLLECTIVE_KEY_BLOCKS)


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


def traced_functions(function: Any) -> list[Any]:
    """Returns the concrete functions of a `tf.function`, in the order in which they were traced."""
    return list(function._list_all_concrete_functions())


def untraced(function: Any) -> Any:
    """Returns a `tf.function` of the same Python function and options that was not traced yet.

    One that has seen several shapes gives the trace for all of them to whoever asks for one.
    """
    return function._clone(None)


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


def specs_of_traces(function: Any) -> list[tuple]:
    """Returns the arguments for which a `tf.function` was traced, as specs, oldest first."""
    if not isinstance(function, tf.types.experimental.PolymorphicFunction):
        return []
    return [trace.structured_input_signature[0] for trace in traced_functions(function)]


def connected_cluster() -> tuple[list[str], int] | None:
    """Returns the addresses of the processes this one has joined and its index, or None."""
    server = eager_context.context()._collective_ops_server_def
    if server is None:
        return None
    (job,) = server.cluster.job
    return [job.tasks[task] for task in sorted(job.tasks)], server.task_index


def lost_workers(count: int) -> list[int]:
    """Returns which of the processes of a cluster the coordination service has lost."""
    states = eager_context.context().get_task_states([("worker", count)])
    return [task for task, state in enumerate(states) if state is not None]


def op_seeds() -> Any:
    """Returns the generator by which TensorFlow gives eager ops their seeds, a `random.Random`."""
    return eager_context.context()._rng


def captured_container(tensor: Any) -> Any:
    """Returns the distributed variable whose component's handle `tensor` is, or None."""
    reference = getattr(tensor, "_distributed_container", None)
    return None if reference is None else reference()


# A look-up changes no table, so the devices need not take turns in it.
register_read_only_resource_op("LookupTableFindV2")


def current_owner() -> Any:
    """Returns the Keras object, as an optimizer, that is making a variable, or None."""
    scopes = get_global_attribute("name_scope_stack", default=[])
    return scopes[-1].caller if scopes else None


def written_captures(concrete: Any) -> list[Any]:
    """Returns those captured resources of a concrete function that it does not only read."""
    read_only = set(get_read_only_resource_input_indices_graph(concrete.graph))
    first = len(concrete.graph.inputs) - len(concrete.captured_inputs)
    return [
        tensor
        for i, tensor in enumerate(concrete.captured_inputs, first)
        if tensor.dtype.name == "resource" and i not in read_only
    ]


def graph_of_function(graph: Any, name: str) -> Any:
    """Returns the graph of a function that ops of `graph` call, which is not public.

    A graph that was imported has its functions as definitions, of which graphs are made here, once.
    """
    function = graph._get_function(name)
    known = getattr(function, "graph", None)
    if known is None:
        with graph.as_default():
            known = function_def_to_graph(
                function.cached_definition, include_library_functions=True
            )
        function.graph = known
    return known


def add_functions(source: Any, target: Any) -> None:
    """Adds the functions that ops of one graph call to another one, which is not public.

    `tf.import_graph_def` would add copies that are known by their definition alone, without a
    graph.
    """
    for function in list(source._functions.values()):
        target._add_function_recursive(function)


def keep_gradients_with(graph: Any) -> None:
    """Has the custom gradients of a graph's ops live as long as the graph.

    `tf.custom_gradient` puts a function into TensorFlow's register of gradients, for ever. It
    refers to tensors of the graph in which it was called, and so keeps that graph for ever too.
    """
    names = {
        op.get_attr("_gradient_op_type").decode()
        for op in graph.get_operations()
        if op.type == "IdentityN" and "_gradient_op_type" in op.node_def.attr
    }
    register = gradient_registry._registry
    # A graph that is given twice, as a step's may be, has some of them already.
    known = getattr(graph, "custom_gradients", {})
    kept = {n: register[n]["type"] for n in names if n in register and n not in known}
    graph.custom_gradients = known | kept
    of_graph = weakref.ref(graph)
    for name in kept:
        register[name]["type"] = lambda op, *upstream, name=name: of_graph().custom_gradients[name](
            op, *upstream
        )
        weakref.finalize(graph, register.pop, name, None)


def attributes_of_function(graph: Any, name: str) -> Any:
    """Returns the attributes of a function that ops of `graph` call, name to AttrValue."""
    return graph._get_function(name).cached_definition.attr


def call_with_captures(concrete: Any, inputs: list[Any], captures: list[Any]) -> Any:
    """Calls a concrete function with other captured inputs than those it was traced with.

    ``ConcreteFunction.__call__`` always passes the tensors that were captured while tracing; one
    program for many devices needs each device's own variable handles in their place.
    """
    with _less_optimized():
        return concrete._call_flat(inputs, captured_inputs=captures)


@contextlib.contextmanager
def _less_optimized() -> Iterator[None]:
    """Has the functions that are called meanwhile optimized without TensorFlow's MLIR passes.

    A program is optimized again for each device, and they find nothing to do in it.
    `tf.config.optimizer` has no such option, and is for all functions of a process.
    """
    context = eager_context.context()
    options = context.function_call_options
    config = tf.compat.v1.ConfigProto.FromString(options.config_proto_serialized)
    config.graph_options.rewrite_options.disable_tfg_optimizer = True
    context.function_call_options = type(options)(options.executor_type, config)
    try:
        yield
    finally:
        context.function_call_options = options


def unspecialized() -> contextlib.AbstractContextManager:
    """Has `tf.function` take the attribute ``_nospecialize`` while the context is entered.

    Without it the graph optimizer makes a copy of a function for each call whose arguments are
    constants, as coordinates are, or whose results are not all used. No public list has it.
    """
    lists = [name for name in vars(function_attributes) if name.endswith("_ALLOWLIST")]
    return patched(
        {(function_attributes, name): lambda known: known | {"_nospecialize"} for name in lists}
    )


def rename(variable: tf.Variable, name: str) -> None:
    """Gives another name to a variable that is made; in public it has the one it was made by."""
    variable._handle_name = f"{name}:0"


@contextlib.contextmanager
def op_attribute(graph: Any, name: str, value: bytes) -> Iterator[None]:
    """Gives an attribute to the ops that are made in a graph while this is entered.

    TensorFlow keeps attributes that begin with "_" wherever it copies an op, and no op says in a
    public way along which axes it communicates.

    Args:
        graph: where the ops are made.
        name: of the attribute, with the underscore.
        value: its value.
    """
    with graph._attr_scope({name: tf.compat.v1.AttrValue(s=value)}):
        yield


def replace_input(op: Any, before: Any, now: Any) -> None:
    """Has an op take one tensor in place of another, which is not public.

    The ops of a backward pass are made by TensorFlow, of the tensors of the forward pass.

    Args:
        op: of a graph that is being traced.
        before: tensor that it takes.
        now: tensor like it, made before the op.
    """
    for i, x in enumerate(op.inputs):
        if x is before or x.ref() == before.ref():
            op._update_input(i, now)


@contextlib.contextmanager
def patched(replacements: dict[tuple[Any, str], Callable]) -> Iterator[None]:
    """Replaces attributes for the time of the context.

    Args:
        replacements: maps (object, attribute name) to a function of the original attribute that
            returns its replacement.
    """
    originals = {key: getattr(*key) for key in replacements}
    try:
        for (target, name), make in replacements.items():
            setattr(target, name, make(originals[target, name]))
        yield
    finally:
        for (target, name), original in originals.items():
            setattr(target, name, original)
