"""The trace of a step as for one device, of which a rank's program is made afterwards.

While a `GlobalTrace` is entered, the step sees the whole batch, whole variables and no strategy:
what it reads and writes are stand-ins of the mesh's variables. `llmos_tf.partition`
turns the graph into the program of a rank.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from llmos_tf import _internal


class GlobalTrace(_internal.ReplicaContext):
    """The only replica of a step that is traced as for one device.

    `tf.distribute.has_strategy()` is false in it, so Keras and user code do what they do there.

    Args:
        strategy: the mesh strategy, which makes the variables that the step asks for.
    """

    def __init__(self, strategy: tf.distribute.Strategy):
        super().__init__(_internal.default_strategy(), replica_id_in_sync_group=0)
        self._mesh_strategy = strategy
        # The mesh's variables that the step uses, by the `id` of the handle of their stand-in.
        self.variables: dict[int, Any] = {}
        # What is written for a rank, in the order in which the step came to it.
        self.regions: list[Any] = []
        self._creators: Any = None

    def __enter__(self) -> "GlobalTrace":
        self._creators = tf.variable_creator_scope(self._make_variable)
        self._creators.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._creators.__exit__(*exception)

    def _make_variable(self, next_creator: Callable, **kwargs: Any) -> tf.Variable:
        with _internal.ReplicaContext(self._mesh_strategy, replica_id_in_sync_group=0):
            return next_creator(**kwargs)

    def stand_in(self, variable: Any) -> tf.Variable:
        """Returns what the step reads and writes in the place of a variable of the mesh.

        Args:
            variable: a distributed variable.

        Returns:
            A variable of its whole shape, which has a handle and no memory.
        """
        made = variable.__dict__.get("_stand_in")
        if made is None:
            made = _internal.variable_without_memory(variable)
            variable._stand_in = made
        self.variables[id(made.handle)] = variable
        return made

    def add_region(self, region: Any, inputs: list[tf.Tensor]) -> None:
        """Puts a region, which is written for a rank, in the place where the step is.

        Args:
            region: as `llmos_tf.partition.manual.Region`.
            inputs: tensors of the step that it is given, at least one.
        """
        graph = tf.compat.v1.get_default_graph()
        with _internal.op_attribute(graph, "_region", len(self.regions)):
            tf.raw_ops.IdentityN(input=inputs)
        self.regions.append(region)


def current_trace() -> GlobalTrace | None:
    """Returns the global trace that is being made, or None outside of one."""
    context = tf.distribute.get_replica_context()
    return context if isinstance(context, GlobalTrace) else None
