"""Whether each device stores what the layouts say: the bytes that exist against arithmetic.

What is expected is computed here from the mesh, the options and the layout rules, and not read from
the variables: a variable that was made whole says of itself that it is whole.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

from llmos_tf.mesh import Mesh
from llmos_tf.sharding import Layout, ShardedVariable
from llmos_tf.testing.cases import Case
from llmos_tf.testing.runs import named_variables


class Stored(NamedTuple):
    """Bytes of a variable on a rank.

    Attributes:
        name: path of the variable.
        rank: of the mesh.
        expected: bytes by its layout.
        actual: bytes that are there.
    """

    name: str
    rank: int
    expected: int
    actual: int


def stored_bytes(model: keras.Model, case: Case) -> Iterator[Stored]:
    """Yields what each rank stores of each variable of a model and its optimizer.

    Args:
        model: a model that was trained on the mesh.
        case: the mesh and its options.

    Yields:
        One entry for each variable and rank. A variable that does not lie on the mesh, or on the
        wrong device of it, has 0 bytes there.
    """
    extended = model.distribute_strategy.extended
    mesh = extended.mesh
    weights = {}
    for path, variable in named_variables(model):
        shape = tuple(variable.shape)
        layout = extended.layout_rules.find(variable.path, shape, trainable=False)
        layout = _flat(layout, case, variable, optimizer=False).effective(mesh)
        state_layout = _flat(layout, case, variable, optimizer=True).effective(mesh)
        weights[variable.path] = (shape, state_layout)
        yield from _on_each_rank(path, variable, layout, mesh)
    for variable in getattr(model.optimizer, "variables", ()):
        layout = _state_layout(variable, weights)
        yield from _on_each_rank(variable.path, variable, layout.effective(mesh), mesh)


def _flat(layout: Layout, case: Case, variable: keras.Variable, optimizer: bool) -> Layout:
    """The layout with the axes along which every trainable variable is cut besides."""
    # Not the Keras variable's `trainable`, which a layer that is frozen later changes.
    inner = getattr(variable, "_value", variable)
    if not inner.trainable or not inner.dtype.is_floating or not inner.shape.rank:
        return layout
    axes = ("fsdp", "data") if optimizer and case.zero_stage in (1, 2) else ("fsdp",)
    return Layout(layout.dims, axes, layout.uneven)


def _state_layout(variable: keras.Variable, weights: dict[str, tuple]) -> Layout:
    """Optimizer state lies as its weight; Keras names it by the weight's path."""
    shape = tuple(variable.shape)
    _, _, name = variable.path.rpartition("/")
    owners = [
        path
        for path, (weight_shape, _) in weights.items()
        if weight_shape == shape and name.startswith(f"{path.replace('/', '_')}_")
    ]
    if owners:
        return weights[max(owners, key=len)][1]
    return Layout((None,) * len(shape))


def _on_each_rank(
    path: str, variable: keras.Variable, layout: Layout, mesh: Mesh
) -> Iterator[Stored]:
    inner: Any = getattr(variable, "_value", variable)
    parts, stages = {}, None
    if isinstance(inner, ShardedVariable):
        ranks = inner.distribute_strategy.extended.local_ranks
        parts = dict(zip(ranks, inner.values, strict=True))
        # Only how the model was cut says which.
        stages = inner.layout.stages
    shape = layout.part_shape(tuple(variable.shape), mesh)
    size = inner.dtype.size
    for rank, device in enumerate(mesh.devices):
        part = parts.get(rank)
        is_there = part is not None and part.device == device
        actual = part.shape.num_elements() * size if is_there else 0
        is_held = stages is None or mesh.coordinate(rank)["pipe"] in stages
        expected = size * math.prod(shape) if is_held else 0
        yield Stored(path, rank, expected, actual)
