"""Random layers: switched off where weights are compared, and compared by themselves.

On a mesh a dropout mask is another one for other rows, so a model with dropout cannot have the
weights of one device, and is not meant to. What is compared instead are the masks: another one on
each rank that has other rows, the same one on ranks that have the same rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from llmos_tf import _internal, collectives
from llmos_tf.layers import Dropout
from llmos_tf.layers.activation_sharding import Stream, current_stream, entered
from llmos_tf.mesh import AXES, BATCH_AXES
from llmos_tf.spmd.program import current_program
from llmos_tf.testing.cases import Case

# Attributes by which Keras's random layers, and those of users who follow it, say how much.
_RATES = ("rate", "dropout", "recurrent_dropout", "stddev")
# Masks are drawn at this rate and of so many rows, so that two are never alike by chance.
_RATE, _ROWS, _TIMES = 0.5, 8, 8


class Draws(NamedTuple):
    """What the ranks of a mesh drew in a layer.

    Attributes:
        values: ``[ranks, ...]``: masks of a layer that the model calls with one tensor, else the
            seeds that its generator gives. On one device one rank.
        stream_axes: mesh axes along which the layer's input is split
            (`layers.activation_sharding`).
    """

    values: np.ndarray
    stream_axes: tuple[str, ...] = ()


class _Input(NamedTuple):
    """What a layer is called with, and in which stream."""

    spec: tf.TensorSpec
    stream: Stream | None


def random_layers(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """Returns the layers that own a random generator, by path.

    Args:
        model: a built model.

    Returns:
        Layers, also those whose rate is 0.
    """
    layers: dict[str, keras.layers.Layer] = {}
    for layer in model._flatten_layers():
        if layer._seed_generators:
            path = layer.path or layer.name
            layers[f"{path} ({len(layers)})" if path in layers else path] = layer
    return layers


def switch_off(model: keras.Model) -> dict[str, keras.layers.Layer]:
    """Sets the rates of all dropout layers, and the like, to 0.

    Args:
        model: a built model.

    Returns:
        The layers that had another rate, by path.
    """
    changed = {}
    for path, layer in random_layers(model).items():
        for name in _RATES:
            if isinstance(vars(layer).get(name), int | float) and vars(layer)[name] > 0:
                setattr(layer, name, 0.0)
                changed[path] = layer
    return changed


def seeds_of(model: keras.Model) -> dict[str, np.ndarray]:
    """Returns the states of all random generators of a model, as the user sees them.

    Args:
        model: a built model.

    Returns:
        States by the path of the layer.
    """
    return {
        f"{path} ({index})" if index else path: np.array(generator.state.numpy())
        for path, layer in random_layers(model).items()
        for index, generator in enumerate(layer._seed_generators)
    }


def moved_layer(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> str | None:
    """Returns the first layer whose random generator has gone on.

    Args:
        before: states, from `seeds_of`.
        after: later states.

    Returns:
        Its path, or None.
    """
    moved = [path for path, seed in after.items() if not np.array_equal(seed, before[path])]
    return moved[0] if moved else None


def draw(
    model: keras.Model, layers: dict[str, keras.layers.Layer], inputs: Any
) -> dict[str, Draws]:
    """Lets layers draw on every rank, from the same inputs on all of them.

    Args:
        model: a built model, on a mesh or on one device.
        layers: those to draw, from `switch_off`.
        inputs: some rows for the model.

    Returns:
        What they drew, by the layer's path.
    """
    inputs_of: dict[str, _Input] = {}

    def program(inputs):
        with _noting_inputs(layers, inputs_of):
            model(inputs, training=True)
        drawn = {path: _drawn(layer, inputs_of.get(path)) for path, layer in layers.items()}
        if current_program() is None:
            return {path: value[tf.newaxis] for path, value in drawn.items()}
        return {path: collectives.all_gather(x[tf.newaxis], AXES) for path, x in drawn.items()}

    inputs = tf.nest.map_structure(tf.convert_to_tensor, inputs)
    results = model.distribute_strategy.run(program, args=(inputs,))
    draws = {}
    for path, value in results.items():
        value = value.values[0] if isinstance(value, tf.distribute.DistributedValues) else value
        stream = inputs_of[path].stream if path in inputs_of else None
        draws[path] = Draws(value.numpy().copy(), () if stream is None else stream.axes)
    return draws


def wrong_draws(case: Case, drawn: dict, layers: dict) -> Iterator[tuple[str, str]]:
    """Yields (layer, what is wrong) for masks that are alike and must not be, or the other way.

    Args:
        case: the mesh.
        drawn: what each rank drew, from `draw`.
        layers: the layers, by the same paths.

    Yields:
        Pairs.
    """
    mesh = case.mesh
    for path, (values, stream_axes) in drawn.items():
        split_by = {*BATCH_AXES, *stream_axes}
        if _is_split_over_tensor(layers[path], case):
            split_by.add("tensor")
        for rank in range(1, mesh.size):
            for other in range(rank):
                axes = _differing(mesh, rank, other)
                apart = bool(split_by.intersection(axes))
                if np.array_equal(values[rank], values[other]) == apart:
                    where = "other parts of the activation" if apart else "the same activation"
                    yield (
                        path,
                        f"draws {'the same mask' if apart else 'different masks'} on ranks {other} "
                        f"and {rank}, which differ on {' and '.join(axes)} and hold {where}",
                    )
                    break
            else:
                continue
            break


def _differing(mesh: Any, rank: int, other: int) -> list[str]:
    one, two = mesh.coordinate(rank), mesh.coordinate(other)
    return [axis for axis in AXES if one[axis] != two[axis]]


def _is_split_over_tensor(layer: keras.layers.Layer, case: Case) -> bool:
    """Whether ranks of `tensor` hold different parts of what the layer drops from."""
    return isinstance(layer, Dropout) and (layer.split_over_tensor or case.sequence_parallel)


def _drawn(layer: keras.layers.Layer, called: _Input | None) -> tf.Tensor:
    """What a layer draws: masks where it is known what it is called with, else seeds, as many."""
    if called is None or not isinstance(vars(layer).get("rate"), float):
        seeds = [layer._seed_generators[0].next() for _ in range(_TIMES)]
        return tf.cast(tf.stack(seeds), tf.int64)
    layer.rate = _RATE
    ones = tf.ones(called.spec.shape, called.spec.dtype)
    with nullcontext() if called.stream is None else entered(called.stream):
        masks = [layer(ones, training=True) for _ in range(_TIMES)]
    layer.rate = 0.0
    return tf.stack(masks)


@contextmanager
def _noting_inputs(layers: dict[str, keras.layers.Layer], inputs: dict) -> Iterator[None]:
    """Notes for each layer that is called what its input is like."""

    def noting(path):
        def replacement(original):
            def call(*args, **kwargs):
                if args and tf.is_tensor(args[0]) and args[0].dtype.is_floating:
                    shape = [_ROWS, *args[0].shape[1:]]
                    if all(length is not None for length in shape):
                        spec = tf.TensorSpec(shape, args[0].dtype)
                        inputs.setdefault(path, _Input(spec, current_stream()))
                return original(*args, **kwargs)

            return call

        return replacement

    with _internal.patched({(layer, "call"): noting(path) for path, layer in layers.items()}):
        yield
