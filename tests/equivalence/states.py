"""Layers with state: batch normalization, dropout, random seeds."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from equivalence.columns import ANY_MODEL, Column
from equivalence.data import BATCH, NUMBERS, TARGETS, fit, mlp
from equivalence.features import Feature, compare, max_difference, one_device, parity, run
from llmos_tf import collectives
from llmos_tf.mesh import AXES, BATCH_AXES

# Four full batches.
EVEN = 4 * BATCH


class DropoutByParts(layers.Layer):
    """One device's model of dropout with a stream of masks for each part of the rows."""

    def __init__(self, rate, streams):
        super().__init__()
        self.rate = rate
        self.generators = [keras.random.SeedGenerator(0) for _ in streams]
        for generator, stream in zip(self.generators, streams, strict=True):
            generator.state.assign(stream)

    def call(self, x, training=False):
        if not training:
            return x
        parts = zip(ops.split(x, len(self.generators)), self.generators, strict=True)
        return ops.concatenate([keras.random.dropout(x, self.rate, seed=seed) for x, seed in parts])


def normalized(make, rows=None):
    """Fails if replicas keep averages of their own, or normalize by other rows than they should."""

    def script():
        model = keras.Sequential([keras.Input((4,)), make(), layers.Dense(2)])
        model.compile("sgd", "mse")

        def work():
            results = fit(model, 2, NUMBERS[:rows], TARGETS[:rows])
            return {**results, "prediction": model.predict(NUMBERS, verbose=0)}

        return model, work

    return script


def with_dropout(make=lambda: layers.Dropout(0.4, seed=3)):
    model = mlp()
    model = keras.Sequential([model.layers[0], make(), model.layers[1]])
    model.build((None, 4))
    model.compile("adam", "mse")
    return model


def streams_of(model, strategy) -> list[np.ndarray]:
    """The state of the dropout's random stream for each part of the batch."""
    values = model.layers[1].seed_generator.state.value.values
    return [values[i].numpy() for i in strategy.extended.batch_representatives]


def check_masks(layer, strategy) -> None:
    """Masks differ between the parts of the batch, and agree on ranks that have the same part."""

    def mask():
        x = layer(tf.ones([1, 64], tf.float64), training=True)
        return collectives.all_gather(x, AXES)

    masks = strategy.experimental_local_results(strategy.run(mask))[0].numpy()
    mesh = strategy.mesh
    parts = [mesh.index_along(rank, BATCH_AXES) for rank in range(mesh.size)]
    for one in range(mesh.size):
        for other in range(one):
            same = (masks[one] == masks[other]).all()
            assert same == (parts[one] == parts[other])


def dropout():
    """Fails if a rank drops otherwise than one device does of its rows."""
    model = with_dropout()
    return model, lambda: fit(model, 2)


def dropout_by_parts(column: Column) -> float:
    """Fails if replicas draw the same mask, ranks of one replica another one, if the stream does
    not go on between steps, or if its state is not one device's."""
    strategy = column.make()
    begun = []

    def script():
        model = with_dropout()
        begun.extend(streams_of(model, strategy))

        def work():
            fit(model, 2, NUMBERS[:EVEN], TARGETS[:EVEN])
            return {"state": model.layers[1].seed_generator.state.numpy()}

        return model, work

    def on_one_device(make):
        model = with_dropout(make)

        def work():
            fit(model, 2, NUMBERS[:EVEN], TARGETS[:EVEN])
            seeds = getattr(model.layers[1], "seed_generator", None)
            return {"state": begun if seeds is None else seeds.state.numpy()}

        return model, work

    actual = run(script, strategy)
    plain = run(lambda: on_one_device(lambda: layers.Dropout(0.4, seed=3)))
    np.testing.assert_array_equal(actual["state"], plain["state"])
    expected = run(lambda: on_one_device(lambda: DropoutByParts(0.4, begun)))
    with strategy.scope():
        layer = layers.Dropout(0.4, seed=3)
    check_masks(layer, strategy)
    # Weights of the reference end with the states of its streams.
    count = len(actual["weights"])
    return max_difference(actual["weights"], expected["weights"][:count])


def restart(column: Column) -> float:
    """Fails if a run that goes on from stored variables draws other masks than one that went on.

    Keras's files leave out the state of random seeds, on one device too, so the script stores the
    model's and the optimizer's variables itself.
    """
    strategy = column.make()

    def trained(interrupted):
        def script():
            model, another = with_dropout(), with_dropout()
            another.optimizer.build(another.trainable_variables)

            def work():
                fit(model)
                if not interrupted:
                    fit(model)
                    return {"weights": _variables(model)}
                for old, new in zip(_states(model), _states(another), strict=True):
                    new.assign(old.numpy())
                fit(another)
                return {"weights": _variables(another)}

            return model, work

        return run(script, strategy)

    return compare(trained(interrupted=True), trained(interrupted=False))


def _states(model):
    return [*model.variables, *model.optimizer.variables]


def _variables(model):
    return [variable.numpy() for variable in _states(model)]


def reproducible(column: Column) -> float:
    """Fails if `set_random_seed` does not fix weights, order and masks, or another than one
    device's weights begin."""

    def script():
        model = with_dropout(lambda: layers.Dropout(0.4))
        initial = model.get_weights()

        def work():
            return {**fit(model, 2, shuffle=True), "initial": initial}

        return model, work

    first, second = run(script, column.make()), run(script, column.make())
    begun = one_device(_initial)["weights"]
    assert all((a == b).all() for a, b in zip(first["initial"], begun, strict=True))
    return compare(first, second)


def _initial():
    return with_dropout(lambda: layers.Dropout(0.4)), dict


BY_PARTS = (
    "Compared with a layer on one device that drops of each replica's rows by themselves: a mesh "
    "that splits more than rows has a stream of masks for each replica."
)
WITH_ITSELF = "Compared with a second run on the same strategy: masks depend on the mesh."
STORED = (
    "Compared with a run on the same strategy that was not interrupted. The script stores "
    "`model.variables` itself: Keras's files leave out the state of seeds, on one device too."
)

FEATURES = [
    Feature(
        "`BatchNormalization(synchronized=True)`",
        parity(normalized(lambda: layers.BatchNormalization(momentum=0.8, synchronized=True))),
        ANY_MODEL,
        in_stages=False,
    ),
    Feature(
        "`BatchNormalization`",
        parity(normalized(lambda: layers.BatchNormalization(momentum=0.8))),
        ANY_MODEL,
        in_stages=False,
    ),
    Feature("`Dropout`", parity(dropout), ANY_MODEL, in_stages=False),
    Feature(
        "`Dropout` beside a tensor axis",
        dropout_by_parts,
        ("data=2,tensor=2",),
        in_stages=False,
        note=BY_PARTS,
    ),
    Feature("`Dropout`, `set_random_seed` and a shuffled fit", reproducible, note=WITH_ITSELF),
    Feature("`Dropout`, stored and restarted", restart, note=STORED),
]
