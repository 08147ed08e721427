"""Private parts of TensorFlow's graphs and traced functions, each with its reason."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

# The options of a function call are set on the context only.
from tensorflow.python.eager import context as eager_context

# The lists of attributes that `tf.function` lets through; see `unspecialized`.
from tensorflow.python.eager.polymorphic_function import attributes as function_attributes

# Which captured resources a function only reads: what it writes orders the calls of it.
from tensorflow.python.framework.auto_control_deps_utils import (
    get_read_only_resource_input_indices_graph,
    register_read_only_resource_op,
)

# Functions of an imported graph exist as definitions only; see `graph_of_function`.
from tensorflow.python.framework.function_def_to_graph import function_def_to_graph

# There is no public way to unregister what `tf.custom_gradient` has registered.
from tensorflow.python.framework.ops import gradient_registry

# The runtime folds what a tensor is computed by; `tf.get_static_value` knows a few ops only.
from tensorflow.python.framework.tensor_util import try_evaluate_constant

# The shape of a variable, and that of a list's elements, belong to their handles.
from tensorflow.python.ops.handle_data_util import copy_handle_data, get_resource_handle_data

from llmos_tf._internal.patching import patched

__all__ = [
    "add_functions",
    "attributes_of_function",
    "call_with_captures",
    "captured_container",
    "copy_handle_data",
    "copy_of_op",
    "evaluated_constant",
    "graph_of_function",
    "graphs_of_functions",
    "keep_gradients_with",
    "op_attribute",
    "python_where_called",
    "replace_input",
    "shape_of_variable",
    "shared_rendezvous",
    "specs_of_traces",
    "traced_functions",
    "unspecialized",
    "untraced",
    "written_captures",
]

# A look-up changes no table, so the devices need not take turns in it.
register_read_only_resource_op("LookupTableFindV2")


def traced_functions(function: Any) -> list[Any]:
    """Returns the concrete functions of a `tf.function`, in the order in which they were traced."""
    return list(function._list_all_concrete_functions())


def untraced(function: Any) -> Any:
    """Returns a `tf.function` of the same Python function and options that was not traced yet.

    One that has seen several shapes gives the trace for all of them to whoever asks for one.
    """
    return function._clone(None)


def specs_of_traces(function: Any) -> list[tuple]:
    """Returns the arguments for which a `tf.function` was traced, as specs, oldest first."""
    if not isinstance(function, tf.types.experimental.PolymorphicFunction):
        return []
    return [trace.structured_input_signature[0] for trace in traced_functions(function)]


def captured_container(tensor: Any) -> Any:
    """Returns the distributed variable whose component's handle `tensor` is, or None."""
    reference = getattr(tensor, "_distributed_container", None)
    return None if reference is None else reference()


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


def graphs_of_functions(graph: Any) -> list[Any]:
    """Returns the graphs of all functions of `graph`, nested ones included."""
    return [graph_of_function(graph, name) for name in graph._functions]


def shared_rendezvous(function: Any) -> Any:
    """Adds the attribute ``shared_rendezvous`` to a `tf.function`, which has no public option.

    Args:
        function: a function that is not traced yet.

    Returns:
        The attribute, False. TensorFlow reads its field ``b`` at the end of the trace.
    """
    function._shared_rendezvous = tf.compat.v1.AttrValue(b=False)
    return function._shared_rendezvous


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


def python_where_called() -> contextlib.AbstractContextManager:
    """Places `tf.py_function` on the calling device in functions traced in this context.

    TensorFlow specifies only the process, and its placer then picks the first device.
    """
    return patched({(eager_context.Context, "host_address_space"): lambda _: lambda _: ""})


@contextlib.contextmanager
def op_attribute(graph: Any, name: str, value: bytes | int) -> Iterator[None]:
    """Gives an attribute to the ops that are made in a graph while this is entered.

    TensorFlow keeps attributes that begin with "_" wherever it copies an op, and no op says in a
    public way along which axes it communicates.

    Args:
        graph: where the ops are made.
        name: of the attribute, with the underscore.
        value: its value.
    """
    kind = "i" if isinstance(value, int) else "s"
    with graph._attr_scope({name: tf.compat.v1.AttrValue(**{kind: value})}):
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


def evaluated_constant(tensor: Any) -> Any:
    """Returns the value of a tensor of a graph as a numpy array, where it follows from constants.

    Shapes that were inferred take part. None where it does not follow.
    """
    return try_evaluate_constant(tensor)


def shape_of_variable(handle: Any) -> tf.TensorShape:
    """Returns the shape of the variable of a handle in a graph, which is not public."""
    data = get_resource_handle_data(handle)
    if data is None or not data.is_set or len(data.shape_and_type) != 1:
        return tf.TensorShape(None)
    return tf.TensorShape(data.shape_and_type[0].shape)


def copy_of_op(op: Any, name: str, inputs: list[Any], attributes: dict[str, Any]) -> list[Any]:
    """Makes an op of the same definition in the graph that is being traced, which is not public.

    Args:
        op: of any graph.
        name: of the new op; a number is added where there is one of that name.
        inputs: what the new op takes.
        attributes: name to AttrValue.

    Returns:
        Its outputs.
    """
    graph = tf.compat.v1.get_default_graph()
    dtypes = [x.dtype for x in op.outputs]
    made = graph._create_op_internal(op.type, inputs, dtypes, attrs=attributes, op_def=op.op_def)
    return made.outputs
