"""What a verification compares, and how it explains what differs."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from llmos_tf import Mesh
from llmos_tf.layers import Dropout, TokenCrossEntropy
from llmos_tf.models import GPT, GPTConfig
from llmos_tf.sharding import SeedVariable, ShardedVariable
from llmos_tf.strategies.optimizer import apply
from llmos_tf.testing import verify
from llmos_tf.testing.cases import Case
from llmos_tf.testing.randomness import Draws, wrong_draws

_rng = np.random.default_rng(0)
BATCHES = [(_rng.normal(size=(rows, 6)), _rng.normal(size=(rows, 1))) for rows in (6, 5)]


def made(*hidden, optimizer="sgd", **options):
    def build():
        model = keras.Sequential([*(make() for make in hidden), layers.Dense(1, name="out")])
        model.compile(optimizer if isinstance(optimizer, str) else optimizer(), "mse", **options)
        return model

    return build


def dense():
    return layers.Dense(3, name="dense")


def failures(build, mesh=None, **options):
    """feature -> row of what differs."""
    report = verify(build, BATCHES, [mesh or Mesh(data=2)], **options)
    assert report.agrees == (not report.failures)
    return {row.feature: row for row in report.failures}


# Tensor with sequence parallelism, and stages; nightly beside other axes.
@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(tensor=2),
        pytest.param(Mesh(pipe=2), marks=pytest.mark.nightly),
        pytest.param(Mesh(fsdp=2, tensor=2), marks=pytest.mark.nightly),
        pytest.param(Mesh(pipe=2, context=2), marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_a_language_model_on_every_axis(mesh):
    """Fails if token batches, layouts of the model's own, dropout that is split over heads, over
    positions of `tensor` or of `context`, or weights that only one stage has are compared in
    another way than they are run, or more of endless batches are taken than steps."""

    def build():
        config = GPTConfig(
            vocab_size=11,
            max_positions=4,
            hidden_size=8,
            num_heads=2,
            num_layers=2,
            dropout=0.2,
        )
        model = GPT(config)
        model.compile(keras.optimizers.AdamW(0.01), TokenCrossEntropy())
        return model

    tokens = np.random.default_rng(1).integers(0, 11, (2, 4, 4)).astype("int32")
    batches = itertools.cycle((rows, rows) for rows in tokens)
    has_tensor = mesh.axis_size("tensor") > 1
    report = verify(build, batches, [mesh], steps=3, sequence_parallel=has_tensor)
    assert report.agrees, report.failures
    assert report.steps == 3
    features = ["gradients", "weights", "loss", "storage", "dropout"]
    assert [row.feature for row in report.rows] == features
    if has_tensor:
        stage = "ZeRO stage 3 + " if mesh.axis_size("fsdp") > 1 else ""
        assert report.rows[0].parallelism == f"{stage}tensor parallel + sequence parallel"
    assert keras.config.dtype_policy().name == "float32"


def test_averages_and_steps_per_execution():
    """Fails if weights that `fit` overwrites at its end are not compared, or steps that are one
    execution are looked for one by one."""

    def optimizer():
        return keras.optimizers.Adam(use_ema=True)

    assert failures(made(dense, optimizer=optimizer, steps_per_execution=2)) == {}


def test_an_update_that_only_the_averages_show(monkeypatch):
    """Fails if the weights after `fit` has ended are not compared."""
    original = apply._update_averages

    def wrong(program, optimizer):
        original(program, optimizer)
        for average in optimizer._model_variables_moving_average:
            average.assign(tf.zeros(average.shape, average.dtype))

    monkeypatch.setattr(apply, "_update_averages", wrong)
    failed = failures(made(dense, optimizer=lambda: keras.optimizers.SGD(use_ema=True)))
    assert set(failed) == {"weights"}
    assert failed["weights"].step == 2


def test_batch_normalization_of_replicas():
    """Fails if it passes, or the hint does not name the layer and the way out; where a step is
    partitioned, it has the statistics of one device."""
    assert not failures(made(dense, layers.BatchNormalization))
    row = failures(made(dense, layers.BatchNormalization, jit_compile=True))["weights"]
    assert "batch_normalization normalizes each replica's rows" in row.hint
    assert "synchronized=True" in row.hint


def test_a_model_that_is_another_one_each_time():
    """Fails if a build function that is not seeded is blamed on the mesh."""
    rng = np.random.default_rng()

    def random_dense():
        return layers.Dense(3, kernel_initializer=lambda shape, dtype: rng.normal(size=shape))

    row = failures(made(random_dense))["weights"]
    assert row.step == 0
    assert "anew" not in row.detail
    assert "differ before the first step" in row.hint


def test_a_layer_in_float32():
    """Fails if a rounding of float32 is taken for a fault of the mesh, or for none in float64."""
    build = made(lambda: layers.Dense(300, dtype="float32"))
    row = failures(build)["gradients"]
    assert "size of a float32 rounding" in row.hint
    assert failures(build, dtype="float32") == {}


def test_mixed_precision():
    """Fails if the policy is forgotten before the model is made, or stays when all is done."""
    policies = set()

    def build():
        policies.add(keras.config.dtype_policy().name)
        return made(dense)()

    keras.config.set_dtype_policy("float64")
    assert failures(build, dtype="mixed_bfloat16") == {}
    assert policies == {"mixed_bfloat16"}
    assert keras.config.dtype_policy().name == "float64"


def test_an_overflow_in_float16():
    """Fails if a step that one device skips, and a mesh does not, is blamed on the mesh."""

    def scaled(scale):
        return lambda: keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(), initial_scale=scale
        )

    failed = failures(made(dense, optimizer=scaled(2.0**15)), dtype="mixed_float16")
    assert set(failed) == {"weights", "loss"}
    assert "may overflow" in failed["weights"].hint
    assert failures(made(dense, optimizer=scaled(2.0**10)), dtype="mixed_float16") == {}


class Noise(layers.Layer):
    """Random, and no rate says how much."""

    def __init__(self):
        super().__init__()
        self.generator = keras.random.SeedGenerator(1)

    def call(self, x):
        return x * keras.random.uniform(tf.shape(x), seed=self.generator, dtype=x.dtype)


def test_a_random_layer_that_cannot_be_switched_off():
    """Fails if it is compared as if it could agree, without a word; where a step is partitioned, it
    does agree."""
    assert not failures(made(dense, Noise))
    row = failures(made(dense, Noise, jit_compile=True))["weights"]
    assert "noise draws random numbers" in row.hint


def test_a_model_that_gives_no_number():
    """Fails if NaN counts as agreement."""
    failed = failures(made(dense, optimizer=lambda: keras.optimizers.SGD(float("nan"))))
    assert "no numbers on one device either" in failed["weights"].hint
    assert np.isnan(failed["weights"].difference)
    assert failed["weights"].to_dict()["difference"] == "nan"


def test_copies_that_only_other_ranks_have_wrong(monkeypatch):
    """Fails if only the first rank's weights are looked at."""
    original = apply._update

    def drift(program, optimizer, gradients, variables):
        original(program, optimizer, gradients, variables)
        component = variables[0]._value.values[0]
        rank = tf.cast(program.axis_index("data"), component.dtype)
        component.assign_add(tf.fill(component.shape, rank))

    monkeypatch.setattr(apply, "_update", drift)
    row = failures(made(dense))["weights"]
    assert (row.step, row.variable, row.difference >= 1) == (1, "sequential/dense/kernel", True)
    assert "different copies of it (rank 0 and rank 1)" in row.hint


def test_a_generator_that_draws_less_often(monkeypatch):
    """Fails if the state that a checkpoint would hold is not compared."""
    monkeypatch.setattr(SeedVariable, "_write_in_program", lambda *arguments: None)
    row = failures(made(dense, lambda: layers.Dropout(0.5)))["dropout"]
    assert "random state" in row.detail


def test_layers_that_are_switched_off():
    """Fails if one of them still draws in the runs that compare weights, or is not compared."""
    random = (layers.Dropout, layers.GaussianDropout, layers.GaussianNoise, Dropout)
    build = made(dense, *(lambda kind=kind: kind(0.01) for kind in random))
    report = verify(build, BATCHES, [Mesh(data=2)])
    assert report.agrees, report.failures
    assert report.rows[-1].feature == "dropout"
    assert "and 1 more" in report.notes[0]


@pytest.mark.parametrize(("jit", "scope"), [(True, None), (False, "full")])
def test_dropout_of_a_block(jit, scope):
    """Fails if what a layer is called with, compiled or to be computed again, is taken out of the
    graph it belongs to."""

    def dropout():
        with keras.RematScope(scope):
            return layers.Dropout(0.5)

    report = verify(made(dense, dropout, jit_compile=jit), BATCHES, [Mesh(data=2)])
    assert report.agrees, report.failures
    assert report.rows[-1].feature == "dropout"


def test_dropout_inside_other_layers():
    """Fails if the dropout that attention makes when it is built, a recurrent cell's, or one of two
    of the same name is missed."""

    def build():
        inputs = keras.Input((4, 2))
        attention = layers.MultiHeadAttention(1, 2, dropout=0.5)
        x = attention(inputs, inputs)
        for name in ("first", "second"):
            x = keras.Sequential([layers.Dropout(0.5, name="alike")], name=name)(x)
        x = layers.SimpleRNN(2, dropout=0.5, recurrent_dropout=0.5)(x)
        model = keras.Model(inputs, layers.Dense(1)(x))
        model.compile("sgd", "mse")
        return model

    batches = [(_rng.normal(size=(4, 4, 2)), _rng.normal(size=(4, 1)))]
    report = verify(build, batches, [Mesh(fsdp=2)])
    assert report.agrees, report.failures
    assert "(dropout, alike, alike (2) and 1 more)" in report.notes[0]


def test_state_that_is_not_cut(monkeypatch):
    """Fails if only weights are counted, and not the state of the optimizer."""
    original = ShardedVariable.__init__

    def whole(self, strategy, components, aggregation, layout, update_layout, *more, **named):
        original(self, strategy, components, aggregation, layout, layout, *more, **named)

    monkeypatch.setattr(ShardedVariable, "__init__", whole)
    row = failures(made(dense, optimizer="adam"), zero_stage=1)["storage"]
    assert row.variable == "adam/sequential_dense_kernel_momentum"
    assert row.detail == "holds 144 bytes on rank 0; by its layout 72"
    assert row.difference == 72


def test_masks_along_each_axis():
    """Fails if masks may be alike along `data`, or differ along `tensor` where it is one
    activation, or be alike there where it is split."""
    case = Case(mesh=Mesh(data=2, tensor=2))
    # Ranks in order: data 0 tensor 0, data 0 tensor 1, data 1 tensor 0, data 1 tensor 1.
    right, shared, apart = ([0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 3])
    plain, split = layers.Dropout(0.5), Dropout(0.5, split_over_tensor=True)

    def wrong(draws, layer, *stream_axes):
        drawn = {"layer": Draws(np.array(draws)[:, np.newaxis], stream_axes)}
        return [text for _, text in wrong_draws(case, drawn, {"layer": layer})]

    assert wrong(right, plain) == []
    assert wrong(apart, split) == []
    (text,) = wrong(shared, plain)
    assert "the same mask on ranks 0 and 2, which differ on data" in text
    (text,) = wrong(apart, plain)
    assert "different masks on ranks 0 and 1, which differ on tensor" in text
    (text,) = wrong(right, split)
    assert "the same mask on ranks 0 and 1, which differ on tensor" in text
    # What is split along `tensor` by the stream is as along `context`.
    assert wrong(apart, plain, "tensor") == []
    (text,) = wrong(right, plain, "tensor")
    assert "the same mask on ranks 0 and 1, which differ on tensor" in text


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "no batches"),
        (3, "Received: 3"),
        ([np.ones((2, 6))], "Received: as batch 1, array"),
        ([(np.ones((2, 6)),)], "tuple of 1"),
        ([(np.ones((2, 6)), np.ones((3, 1)))], "the shapes (2, 6), (3, 1)"),
        ([(np.ones((0, 6)), np.ones((0, 1)))], "at least one"),
        ([(np.float64(1), np.float64(2))], "the shapes (), ()"),
        ([BATCHES[0], (BATCHES[0][0][..., np.newaxis], BATCHES[0][1])], "batch 2 has x with 3"),
        ([BATCHES[0], (*BATCHES[0], np.ones(6))], "another structure"),
        ([(object(), np.ones((2, 1)))], "holds arrays"),
    ],
)
def test_batches_that_are_none(batches, words):
    """Fails if what is no batch is found out inside Keras, or later."""
    with pytest.raises(ValueError, match=r"Received|batch") as error:
        verify(made(dense), batches, [Mesh(data=2)])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "int8"),
        ({"steps": 0}, "steps=0"),
        ({"tolerance": float("nan")}, "nan"),
        ({"meshes": []}, "At least one mesh"),
        ({"zero_stage": 3}, "zero_stage=3"),
        ({"sequence_parallel": True}, "which no mesh has"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    """Fails if a wrong option is found out after the first run, or never."""
    meshes = options.pop("meshes", [Mesh(data=2)])
    with pytest.raises(ValueError, match=words):
        verify(made(dense), BATCHES, meshes, **options)
