"""What an optimizer's `update_step` is given in place of variables, to compute on something else.

Keras's optimizers ask a variable for its shape, dtype and value, and assign to it. So an update
rule can be traced on the inside of a compiled function, or on several variables laid end to end.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from llmos_tf.sharding import ShardedVariable
from llmos_tf.strategies.gradients.packing import packed, unpacked


def slots_of(optimizer: Any) -> dict[str, list]:
    """Returns the lists of an optimizer that have a `keras.Variable` of state for each variable.

    Args:
        optimizer: a Keras optimizer that is built.

    Returns:
        By the names of the attributes. None is in the place of a variable that is overwritten.
    """
    count = len(optimizer._trainable_variables)
    return {
        name: value
        for name, value in vars(optimizer).items()
        if isinstance(value, list)
        and name != "_trainable_variables"
        and len(value) == count
        and all(slot is None or isinstance(slot, keras.Variable) for slot in value)
        and any(slot is not None for slot in value)
    }


def numbers_of(optimizer: Any) -> dict[str, tf.Tensor]:
    """Reads the variables that an optimizer has once for all, such as its iterations.

    Args:
        optimizer: a Keras optimizer.

    Returns:
        By the names of the attributes.
    """
    return {
        name: tf.convert_to_tensor(value)
        for name, value in vars(optimizer).items()
        if isinstance(value, keras.Variable)
    }


def optimizer_for(optimizer: Any, attributes: Mapping[str, Any]) -> Any:
    """Returns an optimizer like another for one variable, whose state is given.

    Args:
        optimizer: a Keras optimizer.
        attributes: for each name of `slots_of` a list with the state of the one variable; what
            else is to be another one.

    Returns:
        An object for the call of `update_step` only.
    """
    stand_in = object.__new__(type(optimizer))
    # Past `__setattr__`, by which Keras would track what is set.
    stand_in.__dict__.update(optimizer.__dict__, **attributes)
    stand_in.__dict__["_get_variable_index"] = lambda variable: 0
    return stand_in


def _operator(name: str) -> Callable:
    def operate(stand_in, *other):
        return getattr(tf.convert_to_tensor(stand_in), name)(*other)

    return operate


class _StandIn:
    """A value that is read when it is needed, and kept when it is assigned.

    Args:
        shape: static.
        dtype: of the value.
    """

    def __init__(self, shape: tf.TensorShape, dtype: tf.DType):
        self.shape = shape
        self.dtype = dtype
        self._value: tf.Tensor | None = None
        self._changed = False

    def _read(self) -> tf.Tensor:
        raise NotImplementedError

    def __tf_tensor__(self, dtype=None, name=None) -> tf.Tensor:
        del dtype, name
        if self._value is None:
            self._value = self._read()
        return self._value

    def assign(self, value: tf.Tensor) -> None:
        self._value = value
        self._changed = True

    def assign_add(self, value: tf.Tensor) -> None:
        self.assign(tf.convert_to_tensor(self) + value)

    def assign_sub(self, value: tf.Tensor) -> None:
        self.assign(tf.convert_to_tensor(self) - value)

    __add__, __radd__ = _operator("__add__"), _operator("__radd__")
    __sub__, __rsub__ = _operator("__sub__"), _operator("__rsub__")
    __mul__, __rmul__ = _operator("__mul__"), _operator("__rmul__")
    __truediv__, __rtruediv__ = _operator("__truediv__"), _operator("__rtruediv__")
    __pow__, __neg__ = _operator("__pow__"), _operator("__neg__")


class Held(_StandIn):
    """A variable inside of a function that is given its place.

    Args:
        place: handle of a resource, which is written where it lies, or a value.
        shape: static.
        dtype: of the value.
    """

    def __init__(self, place: tf.Tensor, shape: tf.TensorShape, dtype: tf.DType):
        super().__init__(shape, dtype)
        self._place = place

    def _read(self) -> tf.Tensor:
        if self._place.dtype != tf.resource:
            return self._place
        value = tf.raw_ops.ReadVariableOp(resource=self._place, dtype=self.dtype)
        return tf.ensure_shape(value, self.shape)

    def store(self) -> tf.Tensor | None:
        """Writes what was assigned.

        Returns:
            The new value, if the place is a value and has changed.
        """
        if not self._changed:
            return None
        if self._place.dtype != tf.resource:
            return self._value
        tf.raw_ops.AssignVariableOp(resource=self._place, value=self._value)
        return None


class EndToEnd(_StandIn):
    """Variables laid end to end.

    Those that lie elsewhere than the optimizer computes are not read to be changed: what is added
    to them goes there.

    Args:
        variables: of one dtype.
        device: on which the optimizer computes; None for that of the rank.
    """

    def __init__(self, variables: Sequence[ShardedVariable], device: str | None):
        shape = tf.TensorShape([sum(v.shape.num_elements() for v in variables)])
        super().__init__(shape, variables[0].dtype)
        self._variables = variables
        self._is_elsewhere = any(variable.host != device for variable in variables)
        # The method of a variable and its argument, for one that was not read.
        self._change: tuple[str, tf.Tensor] | None = None

    def _read(self) -> tf.Tensor:
        value = packed([variable.read() for variable in self._variables])
        if self._change is None:
            return value
        (method, change), self._change = self._change, None
        self._changed = True
        return value + change if method == "assign_add" else value - change

    def assign_add(self, value: tf.Tensor) -> None:
        if not self._leaves("assign_add", value):
            super().assign_add(value)

    def assign_sub(self, value: tf.Tensor) -> None:
        if not self._leaves("assign_sub", value):
            super().assign_sub(value)

    def _leaves(self, method: str, value: tf.Tensor) -> bool:
        """Whether a change is left to the variables: the first one, of what was not read."""
        if not self._is_elsewhere or self._value is not None or self._change is not None:
            return False
        self._change = method, value
        return True

    def store(self) -> list[tf.Tensor]:
        """Gives the variables their parts of what was assigned, or of what is to be added.

        Returns:
            The parts; none where nothing was.
        """
        method, value = self._change or ("assign", self._value if self._changed else None)
        if value is None:
            return []
        parts = unpacked(value, self._variables)
        for variable, part in zip(self._variables, parts, strict=True):
            # Not before: what is cut of a weight would be there through the whole step.
            with tf.control_dependencies([part]):
                getattr(variable, method)(part)
        return parts
