"""Which weights lie where, before and after a model is cut."""

import keras
import pytest
import tensorflow as tf

from llmos_tf import Mesh, memory
from llmos_tf.models import GPT, GPTConfig
from llmos_tf.strategies import MeshStrategy
from llmos_tf.strategies.pipeline.microbatch_trace import Unit
from llmos_tf.strategies.pipeline.placement import placement_of

pytestmark = pytest.mark.fast

FLOAT = 4


def placed(build, stages=2, **options):
    """A model under a pipeline's scope, and the strategy."""
    strategy = MeshStrategy(Mesh(pipe=stages), num_microbatches=2, **options)
    with strategy.scope():
        model = build()
    return model, strategy


def stages_of(layer):
    return {variable.value.layout.stages for variable in layer.variables}


def chain():
    """Four layers of the same work with what has its own rules between them."""
    inputs = keras.Input([16])
    first = keras.layers.Dense(16, name="first")
    x = first(inputs)
    x = keras.layers.Dropout(0.5, name="drop")(x)
    x = keras.layers.Dense(16, name="second")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Dense(16, name="third")(first(x))
    return keras.Model(inputs, keras.layers.Dense(16, name="last")(x))


def test_a_weight_is_on_the_stages_that_use_it():
    """Fails if a shared layer is on one stage only, a statistic is apart from its layer, or the
    state of a random stream is not on every stage."""
    model, strategy = placed(chain)
    assert all(v.value.waits for v in model.get_layer("first").weights)
    strategy.extended.place(model)
    assert stages_of(model.get_layer("first")) == {(0, 1)}
    assert stages_of(model.get_layer("last")) == {(1,)}
    assert len(stages_of(model.get_layer("norm"))) == 1
    assert stages_of(model.get_layer("drop")) == {None}
    assert not strategy.extended.waiting


class Pair(keras.layers.Layer):
    """Two layers, with a width inside of their own."""

    def __init__(self, width=16):
        super().__init__()
        self.up, self.down = keras.layers.Dense(width), keras.layers.Dense(16)

    def call(self, x):
        return x + self.down(self.up(x))


class Composed(keras.layers.Layer):
    """Layers one after another, in a layer that is no model."""

    def __init__(self, inside):
        super().__init__(name="composed")
        self.inside = inside

    def call(self, x):
        for layer in self.inside:
            x = layer(x)
        return x


def test_a_stack_that_is_no_model_is_cut():
    """Fails if the blocks of an encoder go to one stage because a layer holds them, or if a block
    is cut in the middle because two of the layers that it holds are alike."""

    def around(*inside):
        layer = Composed(inside)
        ends = [keras.layers.Dense(16) for _ in range(2)]
        return keras.Sequential([keras.Input([16]), ends[0], layer, ends[1]]), layer

    (model, stack), strategy = placed(lambda: around(Pair(), Pair(), Pair(), Pair()))
    strategy.extended.place(model)
    assert [stages_of(pair) for pair in stack.inside] == 2 * [{(0,)}] + 2 * [{(1,)}]
    (model, block), strategy = placed(
        lambda: around(Pair(), Pair(), keras.layers.Dense(256), keras.layers.Dense(16))
    )
    strategy.extended.place(model)
    assert len(stages_of(block)) == 1


def test_optimizer_state_goes_with_its_weight():
    """Fails if state that was made before the model is cut stays behind, or is everywhere."""

    def build():
        model = chain()
        model.compile("adam", "mse")
        model.optimizer.build(model.trainable_variables)
        return model

    model, strategy = placed(build)
    strategy.extended.place(model)
    last = [v.value for v in model.optimizer.variables if "last_kernel" in v.path]
    assert len(last) == 2
    for state in last:
        assert state.layout.stages == (1,)
        assert [part.shape.num_elements() for part in state.values] == [0, 256]


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(
            lambda: keras.Sequential(
                [keras.Input([16]), *(keras.layers.Dense(16) for _ in range(4))]
            ),
            id="sequential",
        ),
        pytest.param(chain, id="functional"),
        pytest.param(
            lambda: GPT(
                GPTConfig(vocab_size=8, max_positions=4, hidden_size=8, num_heads=2, num_layers=2)
            ),
            id="gpt",
        ),
    ],
)
def test_report_before_the_first_step(build):
    """Fails if weights that wait on the host are reported as the first device's."""
    model, _ = placed(build)
    rows = memory.report(model)
    on_one = FLOAT * sum(v.shape.num_elements() for v in model.trainable_variables)
    shared = [v for v in model.trainable_variables if len(v.value.layout.stages) == 2]
    twice = FLOAT * sum(v.shape.num_elements() for v in shared)
    assert [row["device"][-5:] for row in rows] == ["CPU:0", "CPU:1"]
    assert sum(row["parameters"] for row in rows) == on_one + twice
    assert all(twice < row["parameters"] < on_one for row in rows)


def test_report_of_a_model_without_known_inputs():
    """Fails if a model is reported that no one can place yet."""

    class Plain(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def build(self, shape):
            self.dense.build(shape)

        def call(self, x):
            return self.dense(x)

    model, strategy = placed(Plain)
    with strategy.scope():
        model.build((None, 2))
    with pytest.raises(ValueError, match=r"Run a step first, such as model\.predict"):
        memory.report(model)


def test_a_step_that_calls_other_layers():
    """Fails if a model that was cut by some layers runs others on the wrong stage."""
    model, strategy = placed(chain)
    strategy.extended.place(model)

    class Trace:
        units = (Unit("first", (), 0), Unit("second", (), 1))

    with pytest.raises(ValueError, match=r"(?s)others: first, second instead of first, drop"):
        placement_of(model).begins_in(Trace())


def test_synchronized_normalization_needs_the_whole_batch():
    """Fails if the layer normalizes by a microbatch and says nothing."""

    def build():
        layers = [keras.layers.Dense(4), keras.layers.BatchNormalization(synchronized=True)]
        return keras.Sequential([keras.Input([4]), *layers, keras.layers.Dense(4)])

    model, strategy = placed(build)
    with pytest.raises(ValueError, match=r"(?s)num_microbatches=2.*LayerNormalization"):
        strategy.extended.place(model)
    assert all(v.value.waits for v in model.weights)


def test_variables_of_no_model_are_everywhere():
    """Fails if a variable that a replica function uses has no value on some stage."""
    strategy = MeshStrategy(Mesh(pipe=2))
    with strategy.scope():
        variable = tf.Variable([1.0, 2.0])
    assert variable.waits
    result = strategy.run(lambda: variable + 1.0)
    assert not variable.waits
    assert len({part.device for part in variable.values}) == 2
    assert list(result.numpy()) == [2.0, 3.0]
