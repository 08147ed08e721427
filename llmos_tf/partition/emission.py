"""Makes the program of a rank by a plan: its ops, and the collectives between them."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from llmos_tf import _internal, collectives
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.partition.graph.flat_graph import Node, Value
from llmos_tf.partition.graph.placements import REPLICATED, Partial, Placement
from llmos_tf.partition.list_changes import change_list
from llmos_tf.partition.manual import Storage
from llmos_tf.partition.plan import ANYTHING, Change, Compute, Plan
from llmos_tf.partition.rank_tensors import REDUCIBLE, RankTensors
from llmos_tf.spmd.program import ReplicaProgram

_FOLDED_TYPES = (tf.int32, tf.int64)
_FOLDED_SIZE = 64


class Emission(RankTensors):
    """Makes ops in the graph that is being traced, for the rank of the current program.

    Args:
        program: the program of the rank.
        own_rows: the rank's number of rows, an int or an int32 scalar.
        all_rows: that of the whole batch.
        ways: over how many ranks rows are split.
        index: the rank's place among them, int32 scalar.
    """

    def __init__(
        self, program: ReplicaProgram, own_rows: Any, all_rows: Any, ways: int, index: tf.Tensor
    ):
        super().__init__(own_rows, all_rows, ways, index)
        self.program = program
        self._made: dict[tuple[Value, Placement], tf.Tensor] = {}
        # Values of variables, until something may change them.
        self._reads: dict[int, tf.Tensor] = {}
        # Around the body of a loop: the emission, its graph, and what the loop writes.
        self._around: tuple[Emission, tf.Graph, frozenset[int]] | None = None
        # Partial values that are reduced together, once one of them is needed.
        self._pending: dict[Value, Partial] = {}

    def run(
        self, plan: Plan, inputs: Sequence[tuple[Value, Placement, Any]], outputs: Sequence[Value]
    ) -> list[tf.Tensor]:
        """Makes all ops of a plan.

        Args:
            plan: the plan.
            inputs: values that are given, their placement and tensor.
            outputs: values that are returned, in the plan's placements.

        Returns:
            Their tensors on the rank.
        """
        for value, placement, tensor in inputs:
            self._made[value, placement] = tensor
        for step in plan.steps:
            if isinstance(step, Compute):
                self._compute(step)
            elif isinstance(step.source, Partial) and step.target == REPLICATED:
                self._pending[step.value] = step.source
            else:
                self._made[step.value, step.target] = self._changed(step)
        return [self._get(v, p) for v, p in zip(outputs, plan.outputs, strict=True)]

    def nested(self, written: frozenset[int] | None = None) -> "Emission":
        """Begins a function in this program, as a branch is, or the body of a loop.

        Its ops may take what was made around it, and nothing that was made in another function.

        Args:
            written: of a loop, what it writes, as in `Plan`: other variables are read outside of
                it, once. None for a branch.

        Returns:
            What makes the ops of the function.
        """
        inner = copy.copy(self)
        inner._made, inner._constants, inner._pending = {}, {}, {}
        inner._reads = dict(self._reads) if written is None else {}
        inner._around = None
        if written is not None and ANYTHING not in written:
            inner._around = (self, tf.compat.v1.get_default_graph().outer_graph, written)
        return inner

    def _get(self, value: Value, placement: Placement | None) -> tf.Tensor | None:
        if placement is None:
            return None
        if value in self._pending and placement == REPLICATED:
            self._reduce_pending()
        return self._made[value, placement]

    def _compute(self, step: Compute) -> None:
        node, choice = step
        folded = [
            None if node.is_stateful or placement != REPLICATED else self._constant_of(node, value)
            for value, placement in zip(node.outputs, choice.outputs, strict=True)
        ]
        if not folded or any(x is None for x in folded):
            inputs = [self._get(v, p) for v, p in zip(node.inputs, choice.inputs, strict=True)]
            emit = choice.emit
            outputs = self.copy(node, inputs) if emit is None else emit(self, node, inputs)
            # Rules went by the constant: of one row what is broadcast is reduced in another way.
            folded = [x if y is None else y for x, y in zip(outputs, folded, strict=True)]
        for value, placement, tensor in zip(node.outputs, choice.outputs, folded, strict=True):
            if tensor is not None and not tensor.shape.is_fully_defined():
                # What follows from shapes that are computed here is known of the global graph.
                tensor.set_shape(self.static_shape(value, placement))
            self._made[value, placement] = tensor
        if step.acts:
            self._reads.clear()

    def read(self, storage: Storage) -> tf.Tensor:
        """Returns the value of a variable; what is gathered is gathered once between two writes.

        Args:
            storage: of the variable.

        Returns:
            The value, in the placement of the storage.
        """
        key = id(storage)
        if key not in self._reads:
            if self._around is not None and key not in self._around[2]:
                outer, graph, _ = self._around
                with graph.as_default(), tf.control_dependencies(None):
                    self._reads[key] = outer.read(storage)
            else:
                self._reads[key] = storage.read(self)
        return self._reads[key]

    def _constant_of(self, node: Node, output: Value) -> tf.Tensor | None:
        """A constant, as axes and shapes are, in the place of the op that computes it."""
        if node.type != "Const" and not _may_be_folded(output):
            return None
        value = output.constant
        if value is None or (node.type != "Const" and value.size > _FOLDED_SIZE):
            return None
        return self._constant(node, value)

    def _constant(self, node: Node, value: np.ndarray) -> tf.Tensor:
        """A constant, one op for all equal ones."""
        if value.size > _FOLDED_SIZE or value.dtype == object:
            return self.copy(node, [])[0]
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = tf.constant(value)
        return self._constants[key]

    def copy(
        self, node: Node, inputs: Sequence[Any], attributes: dict[str, Any] | None = None
    ) -> list[tf.Tensor]:
        """Makes the op of a node on other inputs.

        Args:
            node: the op.
            inputs: tensors, or what can be made one.
            attributes: those that differ from the node's.

        Returns:
            Its outputs.
        """
        tensors = [
            x if isinstance(x, tf.Tensor) else tf.convert_to_tensor(x, value.dtype)
            for x, value in zip(inputs, node.inputs, strict=True)
        ]
        found = self._attributes(node, tensors) | (attributes or {})
        return _internal.copy_of_op(node.op, node.name, tensors, found)

    def _attributes(self, node: Node, tensors: Sequence[tf.Tensor]) -> dict[str, Any]:
        """Those of the node, for the types of shapes that it is given here."""
        changed = {}
        for argument, x in zip(node.op.op_def.input_arg, tensors, strict=False):
            if argument.number_attr or argument.type_list_attr:
                break
            if (
                argument.type_attr
                and node.attr[argument.type_attr].type != x.dtype.as_datatype_enum
            ):
                changed[argument.type_attr] = tf.compat.v1.AttrValue(type=x.dtype.as_datatype_enum)
        return node.attr | changed

    # --- changes of placement --------------------------------------------------------------------

    def _changed(self, step: Change) -> tf.Tensor:
        value, source, target = step
        x = self._get(value, source)
        if isinstance(target, Partial):
            return self.as_part(x)
        if value.dtype == tf.variant:
            return change_list(self, step, x)
        if source == REPLICATED:
            return self.own(value.dims[target.dim], target.dim, x)
        return self.gathered(value.dims[source.dim], source.dim, x)

    def _reduce_pending(self) -> None:
        """Reduces all parts that there are, in one collective for each type and reduction."""
        pending, self._pending = self._pending, {}
        kinds: dict[tuple, list[Value]] = {}
        for value, placement in pending.items():
            dtype = _reducible_type(value.dtype)
            kinds.setdefault((dtype, placement), []).append(value)
        for (dtype, placement), values in kinds.items():
            parts = [_as_reducible(self._made[value, placement], dtype) for value in values]
            for value, whole in zip(values, _reduced(parts, placement.reduction), strict=True):
                self._made[value, REPLICATED] = _from_reducible(whole, value.dtype)


def _reducible_type(dtype: tf.DType) -> tf.DType:
    """The type as which values are reduced."""
    if dtype in REDUCIBLE:
        return dtype
    if dtype.is_complex:
        return dtype.real_dtype
    return tf.int32 if dtype.size <= 4 else tf.int64


def _as_reducible(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    if x.dtype.is_complex:
        return tf.stack([tf.math.real(x), tf.math.imag(x)], -1)
    return tf.cast(x, dtype)


def _from_reducible(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    return tf.complex(x[..., 0], x[..., 1]) if dtype.is_complex else tf.cast(x, dtype)


def _may_be_folded(value: Value) -> bool:
    is_small = value.dims is not None and len(value.dims) <= 1
    return is_small and value.dtype in _FOLDED_TYPES


def _reduced(parts: list[tf.Tensor], reduction: str) -> list[tf.Tensor]:
    if len(parts) == 1:
        return [collectives.all_reduce(parts[0], BATCH_AXES, op=reduction)]
    flat = tf.concat([tf.reshape(part, [-1]) for part in parts], 0)
    whole = collectives.all_reduce(flat, BATCH_AXES, op=reduction)
    sizes = [part.shape.num_elements() for part in parts]
    sizes = [tf.size(p) if n is None else n for p, n in zip(parts, sizes, strict=True)]
    pieces = tf.split(whole, sizes)
    return [tf.reshape(y, tf.shape(x)) for x, y in zip(parts, pieces, strict=True)]
