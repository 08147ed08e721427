"""The optimizer's update in a few large ops, where Keras has a dozen for each variable.

Keras computes an update variable by variable out of small ops: most of what is traced of a step, a
kernel launch each on an accelerator, and on a CPU several passes over memory. Here, for optimizers
that work element by element, Keras's own `update_step` is traced with something else in place of
variables (`strategies.optimizer.variable_proxies`), so that its formulas are the only ones:

- a large variable is updated by a function that XLA compiles: one pass over the variable, its
  gradient and its state, in place, weight decay included;
- small ones are laid end to end in groups of up to `GROUP_BYTES`.

What was measured and decided: docs/adr/0011.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from llmos_tf.graph.fusion import is_large
from llmos_tf.planning.buckets import plan_buckets
from llmos_tf.sharding import ShardedVariable
from llmos_tf.spmd.program import current_program
from llmos_tf.strategies.gradients.packing import creation_order, packed
from llmos_tf.strategies.optimizer.variable_proxies import (
    EndToEnd,
    Held,
    numbers_of,
    optimizer_for,
    slots_of,
)

# What a group reads and writes stays in a processor's cache, and no copy of all weights is made.
GROUP_BYTES = 4 * 2**20

# Those that need only an element's gradient and state to update it.
_ELEMENTWISE = (
    keras.optimizers.SGD,
    keras.optimizers.Adam,
    keras.optimizers.AdamW,
    keras.optimizers.Adamax,
    keras.optimizers.Nadam,
    keras.optimizers.RMSprop,
    keras.optimizers.Adagrad,
    keras.optimizers.Adadelta,
    keras.optimizers.Ftrl,
    keras.optimizers.Lion,
)


def is_known(optimizer: Any) -> bool:
    """Returns whether an optimizer is one of Keras's whose formulas are known here.

    Args:
        optimizer: a Keras optimizer.

    Returns:
        False for other kinds, and for subclasses, which may do anything.
    """
    return type(optimizer) in _ELEMENTWISE


def is_elementwise(optimizer: Any) -> bool:
    """Returns whether an optimizer can update a part of a variable by itself.

    Args:
        optimizer: a Keras optimizer; one of the user's own may say so with a true class attribute
            `elementwise`.

    Returns:
        True where parts are enough; otherwise the update sees full variables.
    """
    return is_known(optimizer) or bool(getattr(optimizer, "elementwise", False))


def fused_update(original: Callable) -> Callable:
    """Stands in for the loop over the variables in which Keras calls an optimizer's `update_step`.

    Args:
        original: `_distributed_tf_update_step` of Keras's optimizer, for what is not fused:
            gradients by rows, and optimizers of the user's own.

    Returns:
        A method like it, for the time an optimizer updates in a program.
    """

    def update(optimizer, distribution, grads_and_vars, learning_rate):
        if not is_known(optimizer):
            original(optimizer, distribution, grads_and_vars, learning_rate)
            return
        by_rows, compiled, others = [], [], []
        device = _device_of(optimizer)
        for gradient, variable in grads_and_vars:
            is_compiled = _is_compiled(device, gradient, variable)
            kind = by_rows if _is_by_rows(gradient) else compiled if is_compiled else others
            kind.append((gradient, variable))
        original(optimizer, distribution, by_rows, learning_rate)
        with tf.device(device):
            _update_compiled(optimizer, compiled, learning_rate)
            _update_groups(optimizer, device, others, learning_rate)

    return update


def decay_weights(
    optimizer: Any, gradients: Sequence[Any], variables: Sequence[ShardedVariable]
) -> None:
    """Decays weights as Keras's optimizers do before an update: θ ← θ - η λ θ.

    Args:
        optimizer: a Keras optimizer that is known.
        gradients: of the variables. Those whose update is compiled are decayed by that.
        variables: what it is about to update.
    """
    device = _device_of(optimizer)
    for gradient, variable in zip(gradients, variables, strict=True):
        if _is_compiled(device, gradient, variable):
            continue
        factor = _decay(optimizer, variable)
        if factor is None:
            continue
        # Not before: a copy of all weights would be there through the whole step.
        with tf.device(variable.host), tf.control_dependencies([gradient]):
            variable.assign_sub(variable.read() * factor)


def _decay(optimizer: Any, variable: ShardedVariable) -> tf.Tensor | None:
    """η λ of a weight, or None where it does not decay."""
    if optimizer.weight_decay is None or not optimizer._use_weight_decay(variable):
        return None
    rate = tf.cast(optimizer.learning_rate, variable.dtype)
    return rate * tf.cast(optimizer.weight_decay, variable.dtype)


def _is_by_rows(gradient: Any) -> bool:
    return isinstance(gradient, tf.IndexedSlices)


def _device_of(optimizer: Any) -> str | None:
    """Where an optimizer computes: with its state, or with the weights if it has none."""
    program = current_program()
    hosts = program.strategy.extended
    return program.update_device if slots_of(optimizer) else hosts.host_of_parameters


def _is_compiled(device: str | None, gradient: Any, variable: ShardedVariable) -> bool:
    """Whether a weight is updated by a compiled function, which has one device: the optimizer's."""
    return variable.host == device and not _is_by_rows(gradient) and is_large(gradient)


# --- one by one, compiled ------------------------------------------------------------------------


def _update_compiled(optimizer: Any, grads_and_vars: Sequence[Any], learning_rate: Any) -> None:
    slots, functions = slots_of(optimizer), {}
    numbers = numbers_of(optimizer)
    learning_rate = tf.convert_to_tensor(learning_rate)
    for gradient, variable in grads_and_vars:
        index = optimizer._get_variable_index(variable)
        states = [of_slot[index].value for of_slot in slots.values()]
        decay = _decay(optimizer, variable)
        # One function for all, which is traced for each shape.
        key = variable.dtype, decay is None
        if key not in functions:
            functions[key] = _compiled(optimizer, list(slots), numbers, variable.dtype)
        # What is read before that would be there, as a copy, through the whole step.
        with tf.control_dependencies([gradient]):
            places = [_place_of(variable), *map(_place_of, states)]
        changed = functions[key](learning_rate, decay, gradient, *places)
        for stored, value in zip([variable, *states], changed, strict=True):
            if value is not None:
                stored.assign(value)


def _compiled(
    optimizer: Any, slots: Sequence[str], numbers: Mapping[str, tf.Tensor], dtype: tf.DType
) -> Callable:
    """A function that updates a variable and its state where they lie.

    Args:
        optimizer: a Keras optimizer.
        slots: names of its lists of state.
        numbers: values of the variables it has for all, which the function captures.
        dtype: of the variable and its state.

    Returns:
        A function of learning rate, η λ or None, gradient, and places as of `_place_of`; it returns
        the new values of those of them that are values.
    """

    @tf.function(autograph=False, jit_compile=True)
    def update(rate, decay, gradient, *places):
        held = [Held(place, gradient.shape, dtype) for place in places]
        weights, states = held[0], held[1:]
        if decay is not None:
            weights.assign_sub(weights * decay)
        lists = {name: [state] for name, state in zip(slots, states, strict=True)}
        optimizer_for(optimizer, {**lists, **numbers}).update_step(gradient, weights, rate)
        return [one.store() for one in held]

    return update


def _place_of(variable: ShardedVariable) -> tf.Tensor:
    """Where a variable lies, if all of a rank's component is updated; else the part that is."""
    is_cut_further = variable.update_layout != variable.layout
    return variable.read() if is_cut_further else variable.component.handle


# --- end to end, by Keras's ops ------------------------------------------------------------------


def _update_groups(
    optimizer: Any, device: str | None, grads_and_vars: Sequence[Any], learning_rate: Any
) -> None:
    groups = _groups(*zip(*grads_and_vars, strict=True)) if grads_and_vars else []
    slots = slots_of(optimizer)
    # One after another: copies of all groups at once would be several of all weights.
    previous: list[tf.Tensor] = []
    for group in groups:
        gradients, variables = zip(*(grads_and_vars[i] for i in group), strict=True)
        with tf.control_dependencies([*previous, *gradients]):
            gradient = packed(gradients)
        indices = [optimizer._get_variable_index(variable) for variable in variables]
        weights = EndToEnd(variables, device)
        states = {
            name: [EndToEnd([of_slot[i].value for i in indices], device)]
            for name, of_slot in slots.items()
        }
        # What is read before that would be there, as a copy, through the whole step.
        with tf.control_dependencies([gradient]):
            optimizer_for(optimizer, states).update_step(gradient, weights, learning_rate)
        changed = [weights, *(state for (state,) in states.values())]
        previous = [value for values in changed for value in values.store()]


def _groups(
    gradients: Sequence[tf.Tensor], variables: Sequence[ShardedVariable]
) -> list[tuple[int, ...]]:
    """Groups variables of one dtype, in order, up to `GROUP_BYTES`.

    The order is theirs; on a host, which works beside the device, that of their gradients.
    """
    dtypes = {i: variable.dtype for i, variable in enumerate(variables)}
    sizes = {i: v.shape.num_elements() * v.dtype.size for i, v in enumerate(variables)}
    limits = dict.fromkeys(dtypes.values(), GROUP_BYTES)
    offloads = current_program().update_device is not None
    made = creation_order(dict(enumerate(gradients))) if offloads else {i: i for i in dtypes}
    buckets = plan_buckets(dtypes, sizes, made, limits)
    return [bucket.members for bucket in buckets]
