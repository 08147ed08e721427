"""The optimizer's update in a few large ops, where Keras has a dozen for each variable.

Keras computes an update variable by variable out of small ops: most of what is traced of a step, a
kernel launch each on an accelerator, and on a CPU several passes over memory. Here, for optimizers
that work element by element:

- SGD updates a variable by TensorFlow's own kernel, in one pass and in place;
- everything else is laid end to end in groups of up to `GROUP_BYTES`, and Keras's own `update_step`
  runs once for a group: the same formulas, on longer vectors.

What was measured and decided: docs/adr/0011.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from llmos_tf.program import current_program
from llmos_tf.sharding import ShardedVariable
from llmos_tf.strategies.buckets import creation_order, packed, plan_buckets, unpacked

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
        by_rows = [pair for pair in grads_and_vars if isinstance(pair[0], tf.IndexedSlices)]
        dense = [pair for pair in grads_and_vars if not isinstance(pair[0], tf.IndexedSlices)]
        in_place = [pair for pair in dense if _has_kernel(optimizer, pair[1])]
        for gradient, variable in in_place:
            _descend(optimizer, gradient, variable, learning_rate)
        original(optimizer, distribution, by_rows, learning_rate)
        rest = [pair for pair in dense if not _has_kernel(optimizer, pair[1])]
        _update_groups(optimizer, rest, learning_rate)

    return update


def decay_weights(
    optimizer: Any, gradients: Sequence[Any], variables: Sequence[ShardedVariable]
) -> None:
    """Decays weights as Keras's optimizers do before an update: θ ← θ - η λ θ.

    Args:
        optimizer: a Keras optimizer.
        gradients: of the variables.
        variables: what it is about to update.
    """
    if optimizer.weight_decay is None:
        return
    factors: dict[tf.DType, tf.Tensor] = {}
    for gradient, variable in zip(gradients, variables, strict=True):
        if not optimizer._use_weight_decay(variable):
            continue
        dtype = variable.dtype
        if dtype not in factors:
            rate = tf.cast(optimizer.learning_rate, dtype)
            factors[dtype] = rate * tf.cast(optimizer.weight_decay, dtype)
        # Not before: a copy of all weights would be there through the whole step.
        with tf.device(variable.host), tf.control_dependencies([gradient]):
            variable.assign_sub(variable.read() * factors[dtype])


# --- in place, by TensorFlow's kernels -----------------------------------------------------------


def _has_kernel(optimizer: Any, variable: ShardedVariable) -> bool:
    """Whether all of a rank's component is updated, by SGD, in a dtype that all devices know.

    Adam's kernel is twice as fast as a group, but takes 1 - β2 of a float32 β2, which is off by
    5e-5 for 0.999: after 200 steps gpt_tiny's losses were off by 5e-3.
    """
    extra = variable.update_layout.flat[len(variable.layout.flat) :]
    is_sgd = type(optimizer) is keras.optimizers.SGD
    return (
        is_sgd
        and not extra
        and variable.dtype in (tf.float32, tf.float64)
        # A kernel has one device, and one of both may be offloaded.
        and (optimizer.momentum == 0 or not _is_elsewhere(variable))
    )


def _is_elsewhere(variable: ShardedVariable) -> bool:
    """Whether a weight lies on another device than its optimizer computes on."""
    return variable.host != current_program().update_device


def _descend(
    optimizer: keras.optimizers.SGD, gradient: tf.Tensor, variable: ShardedVariable, rate: Any
) -> None:
    dtype, where = variable.dtype, variable.component.handle
    gradient, rate = tf.cast(gradient, dtype), tf.cast(rate, dtype)
    if optimizer.momentum == 0:
        with tf.device(variable.host):
            tf.raw_ops.ResourceApplyGradientDescent(var=where, alpha=rate, delta=gradient)
        return
    momentum = optimizer.momentums[optimizer._get_variable_index(variable)].value
    tf.raw_ops.ResourceApplyKerasMomentum(
        var=where,
        accum=momentum.component.handle,
        lr=rate,
        grad=gradient,
        momentum=tf.cast(optimizer.momentum, dtype),
        use_nesterov=optimizer.nesterov,
    )


# --- end to end, by Keras's own formulas ---------------------------------------------------------


def _update_groups(optimizer: Any, grads_and_vars: Sequence[Any], learning_rate: Any) -> None:
    groups = _groups(*zip(*grads_and_vars, strict=True)) if grads_and_vars else []
    flat = [_Flat([grads_and_vars[i][1] for i in group], k) for k, group in enumerate(groups)]
    indices = [
        [optimizer._get_variable_index(grads_and_vars[i][1]) for i in group] for group in groups
    ]
    # The same optimizer with groups for variables. Its own attributes are tracked by Keras.
    stand_in = object.__new__(type(optimizer))
    stand_in.__dict__.update(optimizer.__dict__)
    stand_in.__dict__["_get_variable_index"] = lambda group: group.index
    states = []
    for name, slots in _slots_of(optimizer).items():
        groups_of_slots = [
            _Flat([slots[i].value for i in members], k) for k, members in enumerate(indices)
        ]
        stand_in.__dict__[name] = groups_of_slots
        states += groups_of_slots
    # One after another: copies of all groups at once would be several of all weights.
    previous: list[tf.Tensor] = []
    for k, (group, variables) in enumerate(zip(groups, flat, strict=True)):
        gradients = [grads_and_vars[i][0] for i in group]
        with tf.control_dependencies([*previous, *gradients]):
            gradient = packed(gradients)
        # What is read before that would be there, as a copy, through the whole step.
        with tf.control_dependencies([gradient]):
            stand_in.update_step(gradient, variables, learning_rate)
        changed = [variables, *(state for state in states if state.index == k)]
        previous = [value for of_group in changed for value in of_group.store()]


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


def _slots_of(optimizer: Any) -> dict[str, list]:
    """The lists of an optimizer that have a `keras.Variable` of state for each variable."""
    count = len(optimizer._trainable_variables)
    return {
        name: value
        for name, value in vars(optimizer).items()
        if isinstance(value, list)
        and name != "_trainable_variables"
        and len(value) == count
        and all(isinstance(slot, keras.Variable) for slot in value)
    }


def _operator(name: str) -> Callable:
    def operate(flat, *other):
        return getattr(tf.convert_to_tensor(flat), name)(*other)

    return operate


class _Flat:
    """Variables end to end, as an optimizer sees one variable: read once, stored if it changed.

    Weights that lie on another device than the optimizer are not read to be changed: what is added
    to them goes there.

    Args:
        variables: of one dtype.
        index: number of the group.
    """

    def __init__(self, variables: list[ShardedVariable], index: int):
        self.index = index
        self.dtype = variables[0].dtype
        self._variables = variables
        self._value: tf.Tensor | None = None
        self._changed = False
        self._is_elsewhere = any(map(_is_elsewhere, variables))
        # The method of a variable and its argument, for one that was not read.
        self._change: tuple[str, tf.Tensor] | None = None

    @property
    def shape(self) -> tf.TensorShape:
        return tf.TensorShape([sum(v.shape.num_elements() for v in self._variables)])

    def __tf_tensor__(self, dtype=None, name=None) -> tf.Tensor:
        del dtype, name
        if self._value is None:
            self._value = packed([variable.read() for variable in self._variables])
            if self._change is not None:
                method, value = self._change
                self._change = None
                getattr(self, method)(value)
        return self._value

    def assign(self, value: tf.Tensor) -> None:
        self._value = value
        self._changed = True

    def assign_add(self, value: tf.Tensor) -> None:
        if not self._leaves("assign_add", value):
            self.assign(tf.convert_to_tensor(self) + value)

    def assign_sub(self, value: tf.Tensor) -> None:
        if not self._leaves("assign_sub", value):
            self.assign(tf.convert_to_tensor(self) - value)

    def _leaves(self, method: str, value: tf.Tensor) -> bool:
        """Whether a change is left to the variables: the first one, of what was not read."""
        if not self._is_elsewhere or self._value is not None or self._change is not None:
            return False
        self._change = method, value
        return True

    __add__, __radd__ = _operator("__add__"), _operator("__radd__")
    __sub__, __rsub__ = _operator("__sub__"), _operator("__rsub__")
    __mul__, __rmul__ = _operator("__mul__"), _operator("__rmul__")
    __truediv__, __rtruediv__ = _operator("__truediv__"), _operator("__rtruediv__")
    __pow__, __neg__ = _operator("__pow__"), _operator("__neg__")

    def store(self) -> list[tf.Tensor]:
        """Gives the variables their parts of a new value.

        Returns:
            The parts; none where the value was not changed.
        """
        if self._changed:
            self._change = "assign", self._value
        if self._change is None:
            return []
        method, value = self._change
        parts = unpacked(value, self._variables)
        for variable, part in zip(self._variables, parts, strict=True):
            # Not before: what is cut of a weight would be there through the whole step.
            with tf.control_dependencies([part]):
                getattr(variable, method)(part)
        return parts
