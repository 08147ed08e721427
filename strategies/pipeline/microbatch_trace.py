"""The trace of a step of a model on one microbatch, of which the parts of a pipeline are cut."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from llmos_tf.graph.outlined_function import NotABlock
from llmos_tf.sharding import SeedVariable
from llmos_tf.spmd.program import ReplicaProgram
from llmos_tf.strategies.layer_stack.detection import is_stack

# Ops of which the length of the result depends on values; `tf.boolean_mask` has the first.
_SELECTING = ("Where", "Unique", "UniqueV2", "DynamicPartition")


class Unit(NamedTuple):
    """A call of a layer, between whose first op and that of the next one the model may be cut.

    Attributes:
        name: of the layer.
        models: names of the models and stacks of blocks around it, outermost first.
        begin: number of ops of the graph before it.
        weights: of the layer, as variables of the mesh.
    """

    name: str
    models: tuple[str, ...]
    begin: int
    weights: tuple[Any, ...] = ()

    @property
    def has_weights(self) -> bool:
        """Whether the layer has some."""
        return bool(self.weights)


class Read(NamedTuple):
    """A value of a variable that the step uses.

    Attributes:
        kind: "part", "slice" or "full", as for `Block.read`.
        variable: of the mesh.
        unit: number of units that had begun.
        value: its placeholder.
    """

    kind: str
    variable: Any
    unit: int
    value: tf.Tensor

    @property
    def is_differentiated(self) -> bool:
        """Whether its gradient is asked for."""
        return self.variable.trainable and self.variable.dtype.is_floating

    @property
    def is_seed(self) -> bool:
        """Whether it is the state of a stream of random numbers, which every stage has."""
        return isinstance(self.variable, SeedVariable)


class ModelTrace:
    """What a step uses, changes and leaves to be done after it, while and after it is traced.

    While it is traced it is the program's `trace` and its `block`: what the step reads of variables
    are placeholders, and what it writes is stored by whoever runs it.

    Args:
        microbatch: number of the microbatch, int32 scalar, an input of the graph.
        num_microbatches: how many there are.
    """

    compiled = False
    outer = None
    # Collectives of one microbatch are told from those of the next; see `key_offset`.
    levels = 1

    def __init__(self, microbatch: tf.Tensor, num_microbatches: int):
        self.graph = tf.compat.v1.get_default_graph()
        self.microbatch = microbatch
        self.num_microbatches = num_microbatches
        self.units: list[Unit] = []
        # Numbers of this microbatch whose sums over the batch the step needs: (number, sum).
        self.totals: list[tuple[tf.Tensor, tf.Tensor]] = []
        # Metrics of losses, updated when all microbatches are there: (metric, loss, weight).
        self.loss_metrics: list[tuple[Any, tf.Tensor, Any]] = []
        # Whether the step asked for what regularizes weights.
        self.regularizes = False
        self._reads: dict[Any, Read] = {}
        self._written: dict[int, tuple[Any, tf.Tensor]] = {}
        self._models: list[str] = []
        self._in_unit = False

    @property
    def reads(self) -> list[Read]:
        """The values of variables that the step uses."""
        return list(self._reads.values())

    @property
    def writes(self) -> list[tuple[Any, tf.Tensor]]:
        """Variables and their new values."""
        return list(self._written.values())

    @property
    def selects(self) -> bool:
        """Whether the step picks entries by their values: then rows may keep unequal numbers."""
        return any(op.type in _SELECTING for op in self.graph.get_operations())

    # --- as the program's block -------------------------------------------------------------------

    def key_offset(self) -> tf.Tensor:
        """What tells the collectives of a microbatch from those of the one before and after it.

        A rank can be ahead of another by one, as it ends none before the other has begun it.

        Returns:
            0 or 1, int32 scalar.
        """
        return self.microbatch % 2

    def lifts(self, layout: Any) -> bool:
        """Returns whether a variable is gathered outside: once for all microbatches.

        Args:
            layout: how it lies on the mesh.

        Returns:
            Whether there is something to gather.
        """
        return not layout.is_whole

    def read(self, kind: str, variable: Any, read: Callable[[], tf.Tensor]) -> tf.Tensor:
        """Returns a value of a variable, an input of the trace.

        Args:
            kind: which value of the variable: "part", "slice" or "full".
            variable: a variable of the mesh.
            read: not needed.

        Returns:
            A placeholder.
        """
        del read
        unit = len(self.units)
        key = (kind, id(variable), unit)
        if key not in self._reads:
            shape = variable.shape_of(kind)
            with self.graph.as_default(), tf.control_dependencies(None):
                value = tf.compat.v1.placeholder(variable.dtype, shape)
            self._reads[key] = Read(kind, variable, unit, value)
        return self._reads[key].value

    def written(self, variable: Any) -> tf.Tensor | None:
        """Returns what the step has written into a variable, or None.

        Args:
            variable: a variable of the mesh.

        Returns:
            Its new value.
        """
        return self._written.get(id(variable), (None, None))[1]

    def write(self, variable: Any, value: tf.Tensor) -> None:
        """Notes the new value of a variable.

        Args:
            variable: a variable of the mesh.
            value: its whole new value.

        Raises:
            NotABlock: in a loop or a condition, from which no value comes out.
        """
        if tf.compat.v1.get_default_graph() is not self.graph:
            raise NotABlock(f"it assigns the variable {variable.name} in a loop or a condition")
        self._written[id(variable)] = (variable, value)

    # --- what else the program asks of it ---------------------------------------------------------

    def total(self, count: tf.Tensor) -> tf.Tensor:
        """Returns the sum of a number over all microbatches and parts of the batch.

        Args:
            count: this microbatch's; it must not depend on weights.

        Returns:
            A placeholder.
        """
        with self.graph.as_default(), tf.control_dependencies(None):
            total = tf.compat.v1.placeholder(count.dtype, count.shape)
        self.totals.append((count, total))
        return total

    @contextmanager
    def call_of(self, layer: keras.layers.Layer) -> Iterator[None]:
        """Entered while a layer is called.

        Args:
            layer: the layer.
        """
        if self._in_unit or tf.compat.v1.get_default_graph() is not self.graph:
            yield
        elif isinstance(layer, keras.Model) or is_stack(layer):
            begin, before = self.graph.version, len(self.units)
            self._models.append(layer.name)
            yield
            self._models.pop()
            if self._models and len(self.units) == before:
                # One block, as where it is rematerialised.
                self._add_unit(layer, begin)
        else:
            self._add_unit(layer, self.graph.version)
            self._in_unit = True
            yield
            self._in_unit = False

    @property
    def is_outermost(self) -> bool:
        """Whether the model is being called of which the parts are cut, and no layer in it."""
        return len(self._models) == 1 and not self._in_unit

    def _add_unit(self, layer: keras.layers.Layer, begin: int) -> None:
        models = tuple(self._models)
        weights = tuple(getattr(v, "_value", v) for v in layer.variables)
        self.units.append(Unit(layer.name, models, begin, weights))


def trace_program(
    extended: Any, trace: ModelTrace, coordinate: tf.Tensor, token: tf.Tensor
) -> ReplicaProgram:
    """Returns the program in which a step is traced, like the one of a stage.

    Args:
        extended: the strategy's `MeshExtended`.
        trace: what the step leaves behind.
        coordinate: of the rank that will run it, int32 ``[axes]``, an input of the graph.
        token: resource that orders the rank's collectives, an input of the graph.

    Returns:
        A `ReplicaProgram`.
    """
    program = ReplicaProgram(
        extended.container_strategy(),
        extended.mesh,
        coordinate,
        token,
        # Gradients are summed after all microbatches, by the stages' own programs.
        token,
        extended.collective_keys,
        extended.communication,
        extended.options.sequence_parallel,
        extended.options.context_method,
    )
    program.trace = program.block = trace
    return program
