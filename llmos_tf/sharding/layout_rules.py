"""From a variable's path to its layout."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import tensorflow as tf

from llmos_tf.mesh import Mesh
from llmos_tf.sharding.layout import Layout

# The axes along which layers work on slices of a variable. Along data and fsdp the batch is split,
# so there a layer needs all of it; fsdp cuts what is stored, of every variable, by itself.
LAYOUT_AXES = ("tensor", "expert")

# What the axes of a `keras.distribution.DeviceMesh` are called, in Keras's and KerasHub's own
# layout maps, and what they are here. A cut along the batch is one of storage; fsdp makes it, of
# every variable, where the mesh has that axis.
_KERAS_AXES = {"model": "tensor", "batch": None, "data": None, "fsdp": None}


class LayoutRules:
    """Layout rules of a strategy, and what they matched.

    Rules are a `keras.distribution.LayoutMap` or a plain mapping: path pattern (matched whole, as
    Keras does) to a tuple of an axis name or None per dimension. Strict: a rule that matches no
    variable is an error once a program is traced, and so is a `tensor` axis that nothing uses.

    A `LayoutMap` has the axis names of a `keras.distribution.DeviceMesh`. There "model" is taken
    as `tensor`, and along "batch", "data" and "fsdp" a variable is whole: an `fsdp` axis of the
    mesh cuts what is stored of it by itself. Shape and devices of the `DeviceMesh` do not matter;
    the strategy has its own.

    Args:
        mesh: the mesh.
        user_rules: the strategy's `layout_map`; with it, models' own tables are not used.

    Raises:
        ValueError: rules that are no mapping from patterns to axes, or name an axis that no layout
            can.
    """  # noqa: DOC502

    def __init__(self, mesh: Mesh, user_rules: Mapping | None = None):
        if user_rules is not None and not isinstance(user_rules, Mapping):
            raise ValueError(
                "layout_map is a keras.distribution.LayoutMap or a mapping such as "
                f"{{'path/pattern': (None, 'tensor')}}. Received: {user_rules!r}."
            )
        self._mesh = mesh
        self._from_user = user_rules is not None
        self._rules = _as_layouts(user_rules or {})
        self._matched: set[str] = set()
        self._optional: set[str] = set()
        # Shapes of trainable variables by path, in the order of their creation.
        self._weights: dict[str, tuple[int, ...]] = {}
        self._num_created = 0
        self._split_by_models: set[str] = set()

    @property
    def num_created(self) -> int:
        """How many trainable variables of one dimension or more were created so far."""
        return self._num_created

    def add_model_table(self, table: Mapping[str, Any], strict: bool = True) -> None:
        """Adds a model's own table, unless the user gave rules.

        Args:
            table: path pattern to axes or `Layout`, or a `keras.distribution.LayoutMap`.
            strict: whether each rule must match, and each axis divide its dimension.
        """
        if self._from_user:
            return
        layouts = _as_layouts(table)
        if not strict:
            self._optional.update(layouts)
            layouts = {p: dataclasses.replace(x, uneven=True) for p, x in layouts.items()}
        # First the table of the model that is being made: another one's patterns may match too.
        self._rules = {**layouts, **{p: x for p, x in self._rules.items() if p not in layouts}}

    def add_split_axes(self, axes: Iterable[str]) -> None:
        """Notes axes along which a model splits its activations, whatever the layouts say.

        Args:
            axes: axis names.
        """
        self._split_by_models.update(axes)

    def find(self, path: str, shape: tuple[int, ...], trainable: bool) -> Layout:
        """Returns the layout of dimensions for a new variable.

        Args:
            path: its Keras path.
            shape: its full shape.
            trainable: whether an optimizer will update it.

        Returns:
            The layout, without flat cuts; replicated where no rule matches.

        Raises:
            ValueError: the matching rule does not fit the variable.
        """  # noqa: DOC502
        if trainable:
            self._weights[path] = shape
            # A scalar may be a counter.
            self._num_created += shape != ()
        pattern = self._pattern_for(path)
        if pattern is None:
            return Layout((None,) * len(shape))
        self._matched.add(pattern)
        layout = self._rules[pattern]
        layout.check(path, shape, self._mesh)
        return layout.effective(self._mesh)

    def check_all_used(self) -> None:
        """Checks, when variables exist, that no rule is idle, and no axis that layers must know of.

        Raises:
            ValueError: a rule that matched nothing, a tensor axis without any layout, or a context
                or expert axis without a model that uses it.
        """
        if not self._weights:
            return
        needed = [p for p in self._rules if p in self._matched or p not in self._optional]
        used = any("tensor" in self._rules[pattern].dims for pattern in needed)
        if self._mesh.axis_size("tensor") > 1 and not used:
            raise ValueError(
                f"The mesh {self._mesh} has a tensor axis, but no layout says which variables lie "
                "along it. Give MeshStrategy or TensorParallelStrategy a "
                "layout_map={'path/pattern': (None, 'tensor')} (or keras.distribution.LayoutMap), "
                "or make, under the strategy's scope, a model that has layouts of its own: one of "
                "llmos_tf.models, or a KerasHub backbone with a get_layout_map, a GPT2Backbone or "
                f"a MistralBackbone.\n{self._all_weights()}"
            )
        self._check_model_axes(needed)
        for pattern in needed:
            if pattern not in self._matched:
                paths = list(self._weights)
                near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3)
                raise ValueError(
                    f"The layout rule {pattern!r} matches no variable. A rule must match a whole "
                    f"path (re.fullmatch); the nearest paths are {', '.join(near or paths[:3])}. "
                    "Correct or remove the rule, or create the variable under the same "
                    f"`with strategy.scope():` as the others.\n{self._all_weights()}"
                )

    def _check_model_axes(self, needed: list[str]) -> None:
        in_layouts = {axis for pattern in needed for axis in self._rules[pattern].dims}
        for axis in ("context", "expert"):
            used = axis in self._split_by_models or axis in in_layouts
            if self._mesh.axis_size(axis) > 1 and not used:
                raise ValueError(
                    f"The mesh {self._mesh} has the axis {axis}, and no model uses it. A context "
                    "axis splits positions and an expert axis the experts of mixture layers: a "
                    "model has to be made for it, as those of llmos_tf.models are. Make one of "
                    "them under the strategy's scope, or use another axis, such as data or fsdp.\n"
                    f"{self._all_weights()}"
                )

    def _all_weights(self) -> str:
        """Paths and shapes of all weights; those that differ in a number share a line."""
        groups: dict[tuple, list[str]] = {}
        for path, shape in self._weights.items():
            groups.setdefault((re.sub(r"\d+", r"\\d+", path), shape), []).append(path)
        lines = [
            f"  {paths[0]} {shape}" if len(paths) == 1 else f"  {alike} {shape}, {len(paths)} times"
            for (alike, shape), paths in groups.items()
        ]
        return "\n".join(["All paths and shapes of weights:", *lines])

    def _pattern_for(self, path: str) -> str | None:
        """The rule for a path: the path itself, else the pattern that matches all of it."""
        if path in self._rules:
            return path
        hits = [pattern for pattern in self._rules if re.fullmatch(pattern, path)]
        if len(hits) > 1 and self._from_user:
            raise ValueError(
                f"The variable {path} is matched by {len(hits)} layout rules: {', '.join(hits)}. "
                "Write them so that each variable is matched by one at most."
            )
        return hits[0] if hits else None


def announce_layouts(
    table: Mapping[str, Any], strict: bool = True, splits: Iterable[str] = ()
) -> None:
    """Offers a model's table to the strategy in whose scope the model is made.

    Without a mesh strategy nothing happens, so a model may always call it.

    Args:
        table: path pattern to an axis name or None per dimension, or to a `Layout`; or a
            `keras.distribution.LayoutMap`.
        strict: whether each rule must match a variable, and each axis divide its dimension.
        splits: axes along which the model splits its activations by itself.
    """
    extended = tf.distribute.get_strategy().extended
    rules = getattr(extended, "layout_rules", None)
    if isinstance(rules, LayoutRules):
        rules.add_model_table(table, strict)
        rules.add_split_axes(splits)


def mesh_axis_size(axis: str) -> int:
    """Returns the size of a mesh axis of the strategy in whose scope this is called.

    Args:
        axis: mesh axis name.

    Returns:
        1 without a mesh strategy.
    """
    mesh = getattr(tf.distribute.get_strategy().extended, "mesh", None)
    return mesh.axis_size(axis) if isinstance(mesh, Mesh) else 1


def _as_layouts(rules: Mapping[str, Any]) -> dict[str, Layout]:
    """Rules of any kind as layouts by pattern."""
    renamed = _KERAS_AXES if isinstance(rules, keras.distribution.LayoutMap) else {}
    return {pattern: _as_layout(rules[pattern], pattern, renamed) for pattern in rules}


def _as_layout(rule: Any, pattern: str, renamed: Mapping[str, str | None]) -> Layout:
    """A rule as a `Layout`: it may be one, a `keras.distribution.TensorLayout`, or axis names."""
    axes = getattr(rule, "axes", rule)
    if not isinstance(rule, Layout) and not isinstance(axes, tuple | list):
        raise ValueError(
            f"The layout rule {pattern!r} is one axis name or None for each dimension, such as "
            f"(None, 'tensor'). Received: {rule!r}."
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"The layout rule {pattern!r} is no regular expression: {error}."
        ) from error
    if isinstance(rule, Layout):
        layout = rule
    else:
        layout = Layout(tuple(renamed.get(axis, axis) for axis in axes))
    unknown = [axis for axis in layout.dims if axis is not None and axis not in LAYOUT_AXES]
    if unknown:
        also = (
            " In a LayoutMap 'model' is taken as 'tensor', and 'batch', 'data' and 'fsdp' as None: "
            "give the axes of its DeviceMesh these names."
        )
        raise ValueError(
            f"The layout rule {pattern!r} names the axis {unknown[0]!r}. A layout may name "
            f"{' and '.join(LAYOUT_AXES)}; an fsdp axis cuts every variable by itself, and along "
            f"the other axes variables are whole.{also if renamed else ''} "
            f"Received: {layout.dims}."
        )
    return layout
