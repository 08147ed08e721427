"""The update of a step that is traced as for one device: a region that is written for a rank.

It takes gradients as the ranks have them, parts of a sum or what all have, so that they are summed
in buckets, scattered for ZeRO, compressed and clipped as `strategies.optimizer.apply` does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from llmos_tf.mesh import Mesh
from llmos_tf.partition.graph.choice import Choice
from llmos_tf.partition.graph.flat_graph import Node
from llmos_tf.partition.graph.placements import PARTIAL, REPLICATED, Placement, Sharded
from llmos_tf.sharding import ShardedVariable
from llmos_tf.spmd.global_trace import current_trace
from llmos_tf.strategies.gradients.packing import creation_order
from llmos_tf.strategies.optimizer.apply import apply_gradients, apply_scaled_gradients

# Updates variables by gradients: (optimizer, gradients, variables, which gradients are summed).
_Apply = Callable[[Any, list, Any, list[bool]], None]


def update_in_region(optimizer: Any, gradients: Sequence[Any], variables: Any = None) -> Any:
    """Stands in for `Optimizer.apply` while a step is traced as for one device.

    Args:
        optimizer: a Keras optimizer.
        gradients: of the whole batch, one for each variable; None where there is none.
        variables: `keras.Variable`s; None takes those that the optimizer was built with.

    Returns:
        The optimizer's number of updates.
    """
    _add_region(apply_gradients, optimizer, gradients, variables)
    return optimizer.iterations


def scaled_update_in_region(
    original: Callable, optimizer: Any, gradients: Sequence[Any], variables: Any = None
) -> None:
    """Stands in for `LossScaleOptimizer.apply`; see `update_in_region`.

    Args:
        original: Keras's own method.
        optimizer: the `keras.optimizers.LossScaleOptimizer`.
        gradients: of the scaled loss.
        variables: as there.
    """

    def apply(optimizer, gradients, variables, are_summed):
        apply_scaled_gradients(original, optimizer, gradients, variables, are_summed)

    _add_region(apply, optimizer, gradients, variables)


def _add_region(apply: _Apply, optimizer: Any, gradients: Sequence[Any], variables: Any) -> None:
    gradients = list(gradients)
    tensors = tf.nest.flatten([g for g in gradients if g is not None], expand_composites=True)
    region = UpdateRegion(apply, optimizer, gradients, variables)
    if tensors:
        current_trace().add_region(region, tensors)
    else:
        # Keras's own error, or nothing.
        optimizer._filter_empty_gradients(gradients, variables)


class UpdateRegion:
    """The update as an op of the global graph.

    Args:
        apply: updates by a rank's gradients.
        optimizer: the optimizer.
        gradients: of the step; dense, `tf.IndexedSlices` or None.
        variables: the variables.
    """

    def __init__(self, apply: _Apply, optimizer: Any, gradients: list, variables: Any):
        self._apply = apply
        self._optimizer = optimizer
        self._variables = variables
        # How many tensors each gradient consists of.
        self._counts = [_num_tensors(gradient) for gradient in gradients]

    def choice(self, node: Node, found: Sequence[Placement]) -> Choice:
        """Returns which gradients are taken as parts of a sum.

        Args:
            node: the op.
            found: placements of its inputs.

        Returns:
            The choice.
        """
        needed: list[Placement] = []
        are_summed: list[bool] = []
        position = 0
        for count, is_overwritten in zip(self._counts, self._are_overwritten(), strict=True):
            own = tuple(found[position : position + count])
            position += count
            if count == 1:
                own = own if own == (PARTIAL,) and not is_overwritten else (REPLICATED,)
            elif count:
                is_of_rows = own[0] == own[1] == Sharded(0)
                own = (Sharded(0), Sharded(0)) if is_of_rows else (REPLICATED, REPLICATED)
                own += (REPLICATED,) * (count - 2)
            needed += own
            are_summed.append(REPLICATED in own[:1])

        def emit(emission, node, inputs):
            gradients = self._of_parts(self._packed(inputs), are_summed, emission.program.mesh)
            with emission.program.strategy.extended.replica_hooks():
                self._apply(self._optimizer, gradients, self._variables, are_summed)
            return [None] * len(node.outputs)

        return Choice(tuple(needed), (REPLICATED,) * len(node.outputs), emit)

    def _updated(self) -> list[Any]:
        """The variables, one for each gradient."""
        if self._variables is not None:
            return list(self._variables)
        return list(_inner(self._optimizer)._trainable_variables)

    def _are_overwritten(self) -> list[bool]:
        """Which variables are given their gradient as their value, as the scales of float8 are."""
        overwritten = _inner(self._optimizer)._overwrite_variable_with_gradient
        return [overwritten(variable) for variable in self._updated()]

    def _of_parts(self, gradients: list, are_summed: Sequence[bool], mesh: Mesh) -> list:
        """Gradients of what a rank stores: a tape of the rank's program would give them so."""
        stored = [getattr(variable, "_value", variable) for variable in self._updated()]
        parts = list(gradients)
        dense = {
            i: gradient
            for i, gradient in enumerate(gradients)
            if isinstance(gradient, tf.Tensor)
            and isinstance(stored[i], ShardedVariable)
            and not are_summed[i]
        }
        # In the order of the backward pass, in which they are reduced.
        made = creation_order(dense)
        for i in sorted(dense, key=made.__getitem__):
            gradient, shape = dense[i], stored[i].shape
            if not gradient.shape.is_fully_defined():
                gradient = tf.ensure_shape(gradient, shape)
            parts[i] = stored[i].layout.part_of_sum(gradient, mesh)
        return parts

    def _packed(self, tensors: Sequence[tf.Tensor]) -> list[Any]:
        remaining = iter(tensors)
        gradients: list[Any] = []
        for count in self._counts:
            own = [next(remaining) for _ in range(count)]
            if count == 0:
                gradients.append(None)
            else:
                gradients.append(own[0] if count == 1 else tf.IndexedSlices(*own))
        return gradients


def _inner(optimizer: Any) -> Any:
    """The optimizer inside of one that scales the loss."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _num_tensors(gradient: Any) -> int:
    if gradient is None:
        return 0
    return len(tf.nest.flatten(gradient, expand_composites=True))
