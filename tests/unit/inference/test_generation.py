"""Generation: the cache, the loop, every mesh, and what it refuses."""

import contextlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from lanes import usual
from references import shared

from llmos_tf import Mesh, collectives
from llmos_tf.inference import SamplingConfig, generate
from llmos_tf.models import GPT, GPTConfig, Llama, LlamaConfig
from llmos_tf.strategies import MeshStrategy

VOCABULARY, POSITIONS, NEW = 30, 16, 11
PROMPT = np.array([[1, 2, 3, 4, 5], [6, 29, 0, 6, 2], [7, 7, 7, 7, 7]])
GREEDY = SamplingConfig(temperature=0)
SAMPLED = SamplingConfig(temperature=1.2, top_k=20, top_p=0.95, seed=3)

# Dropout, which must be off: it would change the tokens.
SIZES = {
    "vocab_size": VOCABULARY,
    "max_positions": POSITIONS,
    "hidden_size": 16,
    "num_heads": 4,
    "num_layers": 2,
    "dropout": 0.5,
}
MODELS = {
    "gpt": lambda: GPT(GPTConfig(**SIZES)),
    # Two key-value heads: the tensor axis of 2 divides them, that of 4 does not.
    "llama": lambda: Llama(LlamaConfig(**SIZES, num_kv_heads=2, feed_forward_size=24)),
}
EPSILON = {"float64": 2**-52, "float32": 2**-23, "bfloat16": 2**-7, "float16": 2**-10}


def make(kind, strategy=None, seed=0):
    """A model whose tokens depend on all of its input: with new weights it repeats the last one."""
    keras.utils.set_random_seed(seed)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = MODELS[kind]()
    for variable in model.trainable_variables:
        if len(variable.shape) > 1:
            variable.assign(variable.numpy() * (25 if "block" in variable.path else 8))
    return model


def by_full_passes(model, prompt, count):
    """Greedy tokens without a cache."""
    tokens = np.asarray(prompt, np.int32)
    for _ in range(count):
        logits = model(tokens).numpy()
        tokens = np.concatenate([tokens, np.argmax(logits[:, -1:], -1).astype(np.int32)], axis=1)
    return tokens


@shared
def one_device(kind):
    """Sampled and greedy tokens, in float64."""
    model = make(kind)
    return generate(model, PROMPT, NEW, SAMPLED), generate(model, PROMPT[:1, :2], 4, GREEDY)


@pytest.mark.parametrize("kind", MODELS)
def test_the_cache_changes_nothing(float64, kind):
    """Fails for a wrong position or mask in the cache, for dropout, or another number of tokens."""
    model = make(kind)
    tokens = generate(model, PROMPT, NEW, GREEDY)
    assert (tokens.shape, tokens.dtype) == ((3, 5 + NEW), np.int32)
    np.testing.assert_array_equal(tokens, by_full_passes(model, PROMPT, NEW))
    # Another number of rows and tokens, in a program that has seen more of both.
    short = generate(model, PROMPT[:1, :1], 2, GREEDY)
    np.testing.assert_array_equal(short, by_full_passes(model, PROMPT[:1, :1], 2))
    assert len(np.unique(tokens[:, 5:])) > 5


@pytest.mark.parametrize("kind", MODELS)
def test_decoding_in_pieces(kind):
    """Fails if logits of a piece are those of other positions, or weights keep another precision
    than the activations they meet."""
    for policy in ("float64", "float32", "mixed_bfloat16", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        model = make(kind)
        tokens = tf.constant(PROMPT, tf.int32)
        cache, logits = model.new_cache(3, 7), []
        for begin, end in ((0, 2), (2, 3), (3, 5)):
            piece, cache = model.decode(tokens[:, begin:end], cache, begin)
            logits.append(piece)
        actual, expected = tf.concat(logits, 1), model(tokens)
        assert actual.dtype == cache.dtype == expected.dtype == model.compute_dtype
        actual, expected = tf.cast(actual, tf.float64), tf.cast(expected, tf.float64)
        # Roundings of two layers, in sums whose terms may be larger than they are.
        tolerance = 16 * EPSILON[model.compute_dtype] * np.max(np.abs(expected))
        assert np.max(np.abs(actual - expected)) <= tolerance


MESHES = {
    "data2": (Mesh(data=2), {}),
    "fsdp2": (Mesh(fsdp=2), {"zero_stage": 3}),
    "tensor2": (Mesh(tensor=2), {}),
    "tensor2-sp": (Mesh(tensor=2), {"sequence_parallel": True}),
    # 4 does not divide 30 tokens nor 2 key-value heads.
    "tensor4": (Mesh(tensor=4), {}),
    "data2-tensor2": (Mesh(data=2, tensor=2), {}),
    "fsdp2-tensor2-sp": (Mesh(fsdp=2, tensor=2), {"sequence_parallel": True}),
}


# Llama on all of them; of GPT what it has of its own: learned positions, biases, whole heads.
RUNS = [("llama", mesh) for mesh in MESHES]
RUNS += [("gpt", mesh) for mesh in ("tensor4", "data2-tensor2", "fsdp2-tensor2-sp")]


@pytest.mark.parametrize(
    ("kind", "mesh"),
    usual(
        RUNS,
        ("llama", "data2"),
        ("llama", "tensor4"),
        ("llama", "fsdp2-tensor2-sp"),
        ("gpt", "data2-tensor2"),
    ),
)
def test_every_mesh_writes_the_same(float64, kind, mesh):
    """Fails if rows are split where they do not divide (one row, or three, on two parts of the
    batch), positions stay split, a padded token is drawn, or a rank takes another's heads."""
    sampled, greedy = one_device(kind)
    strategy = MeshStrategy(MESHES[mesh][0], **MESHES[mesh][1])
    model = make(kind, strategy)
    np.testing.assert_array_equal(generate(model, PROMPT, NEW, SAMPLED), sampled)
    np.testing.assert_array_equal(generate(model, PROMPT[:1, :2], 4, GREEDY), greedy)
    assert strategy.num_traces == 1


def test_one_trace_for_every_call(monkeypatch):
    """Fails if a call of other shapes, sampling or stop token traces anew, or an option of the
    first call is built into the program."""
    model, calls = make("gpt"), []
    decode = GPT.decode
    monkeypatch.setattr(GPT, "decode", lambda *args: calls.append(1) or decode(*args))
    first = generate(model, PROMPT, 9, SAMPLED)
    for prompt, count, sampling, stop in (
        (PROMPT[:1], 3, GREEDY, None),
        (PROMPT[:2, :1], 5, SamplingConfig(temperature=0.5, seed=9), 4),
        (PROMPT, 9, SamplingConfig(top_p=0.5), 5),
    ):
        generate(model, prompt, count, sampling, stop)
    np.testing.assert_array_equal(generate(model, PROMPT, 9, SAMPLED), first)
    other = SamplingConfig(temperature=1.2, top_k=20, top_p=0.95, seed=4)
    assert np.mean(generate(model, PROMPT, 9, other)[:, 5:] == first[:, 5:]) < 0.5
    # The prompt, and the loop.
    assert len(calls) == 2


def test_it_follows_the_weights():
    """Fails if the program keeps the weights of its first call: training goes on in between."""
    model, other = make("gpt"), make("gpt", seed=1)
    before = generate(model, PROMPT, NEW, GREEDY)
    model.set_weights(other.get_weights())
    after = generate(model, PROMPT, NEW, GREEDY)
    np.testing.assert_array_equal(after, generate(other, PROMPT, NEW, GREEDY))
    assert np.any(after != before)


def test_a_row_ends_with_its_stop_token():
    """Fails if a row goes on after its stop token, another row is touched by that, or generation
    goes on after the last row has ended, or ends with the first."""
    model = make("gpt")
    # Draws from eight tokens, so that rows share some.
    sampling = SamplingConfig(temperature=10, vocab_size=8)
    free = generate(model, PROMPT, NEW, sampling)[:, 5:]
    ends = {
        stop: [int(np.argmax(row == stop)) if stop in row else NEW for row in free]
        for stop in range(8)
    }
    # One stop token that ends every row early, each at another step, and one that ends only some.
    early = {stop for stop, at in ends.items() if len(set(at)) > 1 and max(at) < NEW - 1}
    some = {stop for stop, at in ends.items() if min(at) < NEW == max(at)}
    assert early
    assert some
    for stop in early | some:
        expected = free.copy()
        for row, end in zip(expected, ends[stop], strict=True):
            row[end:] = stop
        expected = expected[:, : max(ends[stop]) + 1]
        tokens = generate(model, PROMPT, NEW, sampling, stop_token=stop)
        np.testing.assert_array_equal(tokens[:, :5], PROMPT)
        np.testing.assert_array_equal(tokens[:, 5:], expected)
    # A stop token in the prompt ends nothing.
    stop = next(iter(some))
    prompt = np.full([1, 3], stop)
    assert generate(model, prompt, 2, sampling, stop_token=stop).shape[1] > 3


class RankGPT(GPT):
    """On rank r of data=2 the likeliest token is r + the sum of both ranks' last tokens."""

    def decode(self, tokens, cache, offset):
        total = collectives.all_reduce(tokens[:, -1], "data") + collectives.axis_index("data")
        return tf.one_hot(total % VOCABULARY, VOCABULARY)[:, tf.newaxis], cache


def test_ranks_go_on_from_the_same_token():
    """Fails if a rank whose logits were rounded in another way goes on from a token of its own."""
    with MeshStrategy(Mesh(data=2)).scope():
        model = RankGPT(GPTConfig(**SIZES))
    tokens = generate(model, [[1], [2]], 4, GREEDY)
    np.testing.assert_array_equal(tokens, [[1, 2, 4, 8, 16], [2, 4, 8, 16, 2]])


def test_diverged_weights_are_told():
    """Fails if tokens are made up from logits that are not numbers, of the prompt or later."""
    for strategy in (None, MeshStrategy(Mesh(tensor=2))):
        model = make("gpt", strategy)
        name = re.escape(repr(model.name))
        beta, table = model.final_norm.beta, model.position_embedding.table
        sound = beta.numpy(), table.numpy()
        for value in (np.nan, np.inf):
            beta.assign(np.full(beta.shape, value))
            with pytest.raises(FloatingPointError, match=f"{name} are infinite or not a number"):
                generate(model, PROMPT, 1)
        beta.assign(sound[0])
        table.assign(np.where(np.arange(POSITIONS)[:, np.newaxis] < 7, sound[1], np.nan))
        generate(model, PROMPT, 3)
        with pytest.raises(FloatingPointError, match="earlier checkpoint"):
            generate(model, PROMPT, 4)


# Arguments in place of the right ones, and the words of the answer.
WRONG = {
    "one row without its batch": ({"prompt": [1, 2]}, "[B, T], such as [[1, 2, 3]]", "shape (2,)"),
    "text": ({"prompt": "abc"}, "integers of shape [B, T]", "<U3"),
    "numbers that are not whole": ({"prompt": [[1.0, 2.0]]}, "integers of shape", "float64"),
    "truth values": ({"prompt": [[True]]}, "integers of shape", "bool"),
    "rows of several lengths": (
        {"prompt": [[1, 2], [3]]},
        "same number of tokens",
        "[[1, 2], [3]]",
    ),
    "no row": ({"prompt": np.zeros([0, 3], int)}, "at least one row", "(0, 3)"),
    "no token": ({"prompt": np.zeros([2, 0], int)}, "one token", "(2, 0)"),
    "a token too large": ({"prompt": [[1, 30]]}, "from 0 to 29", "Received: 30"),
    "a negative token": ({"prompt": [[-1, 1]]}, "from 0 to 29", "Received: -1"),
    "a huge token": ({"prompt": np.array([[2**32 + 1]])}, "from 0 to 29", "Received: 4294967297"),
    "too many new tokens": (
        {"max_new_tokens": 14},
        "16 positions",
        "3 tokens and max_new_tokens=14",
    ),
    "how many would fit": ({"max_new_tokens": 14}, "Take at most 13", "Received"),
    "a prompt without room": ({"prompt": np.ones([1, 16], int)}, "shorter prompt", "16 tokens"),
    "no new token": ({"max_new_tokens": 0}, "positive integer", "max_new_tokens=0"),
    "half a token": ({"max_new_tokens": 1.5}, "positive integer", "max_new_tokens=1.5"),
    "a true token": ({"max_new_tokens": True}, "positive integer", "max_new_tokens=True"),
    "sampling": ({"sampling": 0.7}, "a SamplingConfig", "0.7"),
    "a stop token too large": ({"stop_token": 30}, "from 0 to 29", "stop_token=30"),
    "a negative stop token": ({"stop_token": -1}, "from 0 to 29", "stop_token=-1"),
    "a stop token by name": ({"stop_token": "</s>"}, "from 0 to 29", "stop_token='</s>'"),
    "another model": ({"model": keras.Sequential()}, "llmos_tf.models.GPT", "Sequential"),
}


def test_a_misuse_is_named_before_anything_is_traced(monkeypatch):
    """Fails if a wrong argument is taken, or shows as an error of TensorFlow, or only after the
    program was traced."""
    monkeypatch.setattr(GPT, "decode", lambda *args: pytest.fail("It was traced."))
    right = {"model": MODELS["gpt"](), "prompt": [[1, 2, 3]], "max_new_tokens": 2}
    for case, (wrong, advice, received) in WRONG.items():
        with pytest.raises(ValueError, match=re.escape(advice)) as error:
            generate(**(right | wrong))
        assert received in str(error.value), case


def test_other_forms_of_a_prompt():
    """Fails if lists, tensors or other integers are not taken for the tokens that they hold."""
    model = make("gpt")
    expected = generate(model, PROMPT, np.int64(3), stop_token=np.int32(9))
    for prompt in (PROMPT.tolist(), tf.constant(PROMPT), PROMPT.astype(np.uint8)):
        np.testing.assert_array_equal(generate(model, prompt, 3, stop_token=9), expected)
