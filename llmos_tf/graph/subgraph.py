"""Functions cut out of a graph that was traced once.

A pipeline needs the forward and the backward pass of each part of a model as functions of their
own, with what one keeps for the other as outputs and inputs. They are stretches of one graph, which
is traced once for all of them. PyTorch's AOTAutograd cuts its joint graph likewise.
"""

from collections.abc import Iterable, Mapping, Sequence

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.graph.errors import trace_for_devices

Ops = frozenset[str]


class GraphCuts:
    """Cuts functions out of a graph.

    Args:
        graph: of a traced function.
    """

    def __init__(self, graph: tf.Graph):
        self._graph = graph
        self._definition = graph.as_graph_def(add_shapes=True)

    def ancestors(
        self,
        tensors: Iterable[tf.Tensor],
        given: Iterable[tf.Tensor] = (),
        without: Ops = frozenset(),
    ) -> Ops:
        """Returns the names of the ops by which tensors are computed.

        Args:
            tensors: of the graph.
            given: tensors that are known; nothing is computed for them.
            without: names of ops whose results are known.

        Returns:
            Names of ops. Placeholders are none of them.
        """
        known = {tensor.ref() for tensor in given}
        wanted = [tensor.op for tensor in tensors if tensor.ref() not in known]
        return self._before(wanted, known, without)

    def needed(self) -> Ops:
        """Returns the names of the ops that a call of the traced function is there for.

        A trace has others, such as what a gradient would be computed by that nobody asks for.

        Returns:
            Names of the ops that make what is returned, or change something, and of what these
            need.
        """
        returned = [tensor.op for tensor in self._graph.outputs]
        return self._before([*returned, *self._graph.control_outputs], set(), frozenset())

    def _before(self, wanted: Iterable[tf.Operation], known: set, without: Ops) -> Ops:
        found: set[str] = set()
        unfinished = list(wanted)
        while unfinished:
            op = unfinished.pop()
            if op.name in found or op.name in without or op.type == "Placeholder":
                continue
            found.add(op.name)
            unfinished += [x.op for x in op.inputs if x.ref() not in known]
            # Ops with state are only put in order after each other, others wait for a reason.
            in_order = op.op_def.is_stateful
            unfinished += [x for x in op.control_inputs if not (in_order and x.op_def.is_stateful)]
        return frozenset(found)

    def inputs_of(self, names: Ops) -> list[tf.Tensor]:
        """Returns what ops use that is made by none of them.

        Args:
            names: of ops.

        Returns:
            Tensors, each once, in the order of the graph.
        """
        used = {
            x.ref(): x
            for op in self._graph.get_operations()
            if op.name in names
            for x in op.inputs
            if x.op.name not in names
        }
        return list(used.values())

    def cut(
        self, names: Ops, fetches: Sequence[tf.Tensor], outside: Mapping | None = None
    ) -> "Cut":
        """Cuts out some ops as a function.

        Args:
            names: of the ops, as of `ancestors`.
            fetches: what the function returns: outputs of the ops, or anything else of the graph,
                which it then takes.
            outside: tensors from outside of the graph that it captures instead of taking them, by
                the `ref()` of what stands for them in it.

        Returns:
            The function.
        """
        outside = outside or {}
        needed = self.inputs_of(names)
        feeds = {x.ref(): x for x in needed if x.ref() not in outside}
        captured = {x.name: outside[x.ref()] for x in needed if x.ref() in outside}
        made = [x for x in fetches if x.op.name in names]
        definition = self._definition_of(names, {x.op.name for x in made})
        taken = list(feeds.values())

        def body(*values):
            _internal.add_functions(self._graph, tf.compat.v1.get_default_graph())
            given = {x.name: value for x, value in zip(taken, values, strict=True)}
            for x in taken:
                # Of a tensor list.
                _internal.copy_handle_data(x, given[x.name])
            capture = tf.compat.v1.get_default_graph().capture
            given |= {name: capture(tensor) for name, tensor in captured.items()}
            return tf.compat.v1.import_graph_def(
                definition, input_map=given, return_elements=[x.name for x in made], name=""
            )

        # Not inlined: it is called for each microbatch, and optimized once.
        specs = [tf.TensorSpec(x.shape, x.dtype) for x in taken]
        concrete = trace_for_devices(body, specs, taken, _noinline=True)
        return Cut(concrete, taken, made, fetches)

    def _definition_of(self, names: Ops, made: set[str]) -> tf.compat.v1.GraphDef:
        """The definition of some ops, with one constant in place of equal ones, but for `made`."""
        definition = tf.compat.v1.GraphDef()
        definition.versions.CopyFrom(self._definition.versions)
        constants: dict[tuple[bytes, str], str] = {}
        same: dict[str, str] = {}
        # In the order of the graph, in which collectives are put where they are imported.
        for original in self._definition.node:
            if original.name not in names:
                continue
            if original.op == "Const" and not original.input and original.name not in made:
                value = original.attr["value"].tensor.SerializeToString(deterministic=True)
                first = constants.setdefault((value, original.device), original.name)
                if first != original.name:
                    same[original.name] = first
                    continue
            node = definition.node.add()
            node.CopyFrom(original)
            # Which op it is placed with, as gradients are: the ops of a function are all together.
            node.attr.pop("_class", None)
            inside = [x for x in node.input if not x.startswith("^") or x[1:] in names]
            del node.input[:]
            node.input.extend(same.get(x, x) for x in inside if x[1:] not in same)
        return definition


class Cut:
    """A function that was cut out of a graph.

    Args:
        concrete: of `feeds` to `made`.
        feeds: what it takes, as tensors of the graph.
        made: what it computes.
        fetches: what it is asked for: `made`, and what is only handed on.
    """

    def __init__(
        self,
        concrete: tf.types.experimental.ConcreteFunction,
        feeds: Sequence[tf.Tensor],
        made: Sequence[tf.Tensor],
        fetches: Sequence[tf.Tensor],
    ):
        self.concrete = concrete
        self.feeds = list(feeds)
        self._made = list(made)
        self.fetches = list(fetches)

    def __call__(self, values: Mapping) -> list[tf.Tensor]:
        """Calls the function.

        Args:
            values: of tensors of the graph, by their `ref()`; at least of `feeds`.

        Returns:
            The values of `fetches`.
        """
        known = dict(values)
        if self._made:
            inputs = [known[x.ref()] for x in self.feeds]
            outputs = _internal.call_with_captures(self.concrete, inputs, [])
            known.update({x.ref(): y for x, y in zip(self._made, outputs, strict=True)})
        return [known[x.ref()] for x in self.fetches]

    def call(self, values: Mapping, captures: list[tf.Tensor]) -> dict:
        """Calls the function for what it does and makes, with other captures than its own.

        Args:
            values: of tensors of the graph, by their `ref()`; at least of `feeds`.
            captures: in the order of those of `concrete`.

        Returns:
            The values of what it makes, by `ref()`.
        """
        inputs = [values[x.ref()] for x in self.feeds]
        outputs = _internal.call_with_captures(self.concrete, inputs, captures)
        if not self._made:
            return {}
        return {x.ref(): y for x, y in zip(self._made, outputs, strict=True)}
