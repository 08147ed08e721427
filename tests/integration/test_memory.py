"""Memory: the variables of each device, counted to the byte, follow ZeRO's formulas.

ZeRO (arXiv 1910.02054) counts 2 + 2 + K bytes a parameter for mixed-precision Adam: the weight and
its gradient in 16 bits, and K = 12 for the weight, the momentum and the variance in 32 bits. Here
weights are float32, so the one that is computed with is the one that Adam updates and there is no
copy in 16 bits; gradients live within a step only. Of P parameters on N devices that leaves 4 bytes
of weight and 8 of Adam's state: 12P without ZeRO; (4 + 8/N)P for stages 1 and 2, which cut Adam's
state alone, since the weights are needed to compute with; 12P/N for stage 3, which cuts both.

Gradients that are accumulated over steps are variables too, 4 bytes more: whole without ZeRO, and
cut as Adam's state from stage 2 on.
"""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf
from lanes import in_turn

from llmos_tf import Mesh, _internal
from llmos_tf.models import GPT, GPTConfig
from llmos_tf.sharding import ShardedVariable
from llmos_tf.strategies import DataParallelStrategy, MeshStrategy, ZeroStrategy

TOLERANCE = 0.01  # of the formula; padding, counters and seeds are within it


def devices(count):
    return [f"CPU:{i}" for i in range(count)]


# The formulas: bytes a parameter on each of n devices.
STAGES = {
    0: (lambda n: DataParallelStrategy(devices(n)), lambda n: 12),
    1: (lambda n: ZeroStrategy(1, devices(n)), lambda n: 4 + 8 / n),
    2: (lambda n: ZeroStrategy(2, devices(n)), lambda n: 4 + 8 / n),
    3: (lambda n: ZeroStrategy(3, devices(n)), lambda n: 12 / n),
}


def make_dense(**optimizer_options):
    """Some 60,000 parameters in lengths that nothing divides, and the seed of a dropout."""
    model = keras.Sequential(
        [
            keras.Input((101,)),
            keras.layers.Dense(307, activation="relu"),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(97),
        ]
    )
    model.compile(keras.optimizers.Adam(**optimizer_options), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def all_variables():
    """Every variable of TensorFlow's that exists, whoever holds it."""
    # By type, because asking some lazy objects for their class imports what they stand for.
    found = [o for o in gc.get_objects() if issubclass(type(o), tf.Variable)]
    kept = [v for v in found if not isinstance(v, tf.distribute.DistributedValues)]
    # A stand-in, of which a step is traced, has a handle and no memory.
    return {id(v): v for v in kept if not _internal.is_without_memory(v)}


def made_since(before, parts=()):
    """Variables in neither; `before` keeps its own alive, so that no `id` is used twice."""
    gc.collect()
    known = {id(part) for part in parts} | set(before)
    return [variable for key, variable in all_variables().items() if key not in known]


def bytes_of(parts, count):
    """Bytes on each of the first `count` devices."""
    total = dict.fromkeys(range(count), 0)
    for part in parts:
        index = tf.DeviceSpec.from_string(part.device).device_index
        total[index] += int(np.prod(part.shape)) * part.dtype.size
    return list(total.values())


def counted(make, strategy):
    """Makes a model, and counts its variables and the optimizer's: bytes on each device.

    Nothing else may have been made meanwhile but the sum and the count of the shown loss.
    """
    count = strategy.mesh.size
    before = all_variables()
    with strategy.scope():
        model = make()
    variables = {id(v): v for v in [*model.variables, *model.optimizer.variables]}
    parts = [part for v in variables.values() for part in v._value.values]
    assert all(len(v._value.values) == count for v in variables.values())
    others = made_since(before, parts)
    assert bytes_of(others, count) == [8] * count, [(v.name, v.shape) for v in others]
    return bytes_of(parts, count), model


def num_parameters(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


@pytest.mark.parametrize(("stage", "count"), in_turn(STAGES, [2, 4, 8], 3))
def test_zero_follows_its_formulas(stage, count):
    """Catches state that is not cut, a full copy beside the parts, or padding of more than 1%."""
    make_strategy, bytes_a_parameter = STAGES[stage]
    seen, model = counted(make_dense, make_strategy(count))
    expected = bytes_a_parameter(count) * num_parameters(model)
    np.testing.assert_allclose(seen, expected, rtol=TOLERANCE)
    # Every byte: what is not the formula is padding and the counters and seeds, 20 bytes of them.
    padding = 4 * 3 * len(model.trainable_variables)
    assert all(0 <= size - expected <= 20 + padding for size in seen)


@pytest.mark.parametrize(
    ("strategy", "bytes_a_parameter"),
    [
        (lambda: DataParallelStrategy(devices(4)), 16),
        (lambda: ZeroStrategy(2, devices(4)), 4 + 12 / 4),
        (lambda: ZeroStrategy(3, devices(4)), 16 / 4),
    ],
    ids=["data", "stage 2", "stage 3"],
)
def test_accumulated_gradients_are_cut_by_stage_2(strategy, bytes_a_parameter):
    """Catches an accumulator that is whole on every device."""
    seen, model = counted(lambda: make_dense(gradient_accumulation_steps=2), strategy())
    np.testing.assert_allclose(seen, bytes_a_parameter * num_parameters(model), rtol=TOLERANCE)


def test_a_step_leaves_nothing_behind():
    """Catches a gathered weight or a gradient that stays on a device after the step."""
    _, model = counted(make_dense, ZeroStrategy(3, devices(4)))
    before = all_variables()
    model.fit(np.ones((8, 101)), np.ones((8, 97)), batch_size=8, verbose=0)
    assert [v.name for v in made_since(before)] == []


# --- with a tensor axis ---------------------------------------------------------------------------

CONFIG = GPTConfig(
    vocab_size=509, max_positions=64, hidden_size=64, num_heads=8, num_layers=1, dropout=0.1
)


def make_gpt():
    model = GPT(CONFIG)
    model.compile(keras.optimizers.AdamW(0.01), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def gpt_parameters():
    """Parameters that a tensor axis cuts, and the rest, counted from the architecture."""
    h, f, v = CONFIG.hidden_size, CONFIG.feed_forward_size, CONFIG.vocab_size
    query_key_value, out = 3 * h * h + 3 * h, h * h
    up, down = h * f + f, f * h
    cut = v * h + CONFIG.num_layers * (query_key_value + out + up + down)
    biases, norms = 2 * h, 4 * h
    rest = CONFIG.max_positions * h + CONFIG.num_layers * (biases + norms) + 2 * h
    return cut, rest


@pytest.mark.parametrize(
    ("mesh", "options", "formula"),
    [
        (Mesh(tensor=2), {}, lambda cut, rest: 12 * (cut / 2 + rest)),
        (Mesh(tensor=4), {}, lambda cut, rest: 12 * (cut / 4 + rest)),
        (Mesh(tensor=8), {}, lambda cut, rest: 12 * (cut / 8 + rest)),
        (Mesh(fsdp=2, tensor=2), {}, lambda cut, rest: 12 * (cut / 2 + rest) / 2),
        (Mesh(data=2, tensor=2), {}, lambda cut, rest: 12 * (cut / 2 + rest)),
        (
            Mesh(data=4, tensor=2),
            {"zero_stage": 1},
            lambda cut, rest: (4 + 8 / 4) * (cut / 2 + rest),
        ),
        (
            Mesh(data=2, fsdp=2, tensor=2),
            {"zero_stage": 2},
            lambda cut, rest: (4 + 8 / 2) * (cut / 2 + rest) / 2,
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, Mesh) else "",
)
def test_a_tensor_axis_keeps_its_share(mesh, options, formula):
    """Catches a table, or its optimizer state, that every rank of the tensor axis holds whole."""
    cut, rest = gpt_parameters()
    seen, model = counted(make_gpt, MeshStrategy(mesh, **options))
    assert cut + rest == num_parameters(model) == model.num_parameters()
    np.testing.assert_allclose(seen, formula(cut, rest), rtol=TOLERANCE)


def test_what_is_counted_is_what_layouts_say():
    """Catches a part that is stored in another shape than its layout plans with."""
    strategy = MeshStrategy(Mesh(data=2, fsdp=2, tensor=2), zero_stage=1)
    seen, model = counted(make_gpt, strategy)
    planned = 0
    for variable in [*model.variables, *model.optimizer.variables]:
        inner = variable._value
        assert isinstance(inner, ShardedVariable)
        shape = inner.layout.part_shape(tuple(inner.shape), strategy.mesh)
        planned += int(np.prod(shape)) * inner.dtype.size
    assert seen == [planned] * 8
