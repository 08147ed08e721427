"""Which of Keras's layers compute on slices, and which read whole variables."""

import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from llmos_tf import Mesh
from llmos_tf.sharding import Layout
from llmos_tf.strategies import MeshStrategy
from llmos_tf.strategies.keras_layers.products import Cut, cut_of, product_cut

pytestmark = pytest.mark.fast

WIDTH = 8


@pytest.mark.parametrize(
    ("equation", "kernel_dim", "cut"),
    [
        ("ab,bc->ac", 1, Cut(None, -1)),
        ("ab,bc->ac", 0, Cut(-1, None)),
        # Projections of attention to heads and from heads.
        ("abc,cde->abde", 1, Cut(None, -2)),
        ("abc,cde->abde", 2, Cut(None, -1)),
        ("abc,cde->abde", 0, Cut(-1, None)),
        ("abcd,cde->abe", 0, Cut(-2, None)),
        # A kernel that is kept the other way round.
        ("btd,ndh->btnh", 0, Cut(None, -2)),
        ("abc,bc->abc", 1, Cut(-1, -1)),
        ("abc,cb->bac", 1, Cut(-2, -3)),
        ("...x,xy->...y", 1, Cut(None, -1)),
        ("...x,xy->...y", 0, Cut(-1, None)),
        # Other dims may follow, so they are counted from the start.
        ("ab...,bc->ac...", 1, Cut(None, 1)),
        ("ab...,bc->ac...", 0, Cut(1, None)),
        # A diagonal is no slice.
        ("abb,bc->ac", 0, None),
        ("ab,bb->ab", 0, None),
    ],
)
def test_where_a_cut_dim_lies(equation, kernel_dim, cut):
    """Fails if a letter is looked for in the wrong part, or counted from the wrong end."""
    assert cut_of(equation, kernel_dim) == cut


class OwnKernel(layers.Dense):
    @property
    def kernel(self):
        return 2 * self._kernel


def with_lora():
    return layers.Dense(4, lora_rank=2, name="dense")


def quantized():
    layer = layers.Dense(4, name="dense")
    layer.build((None, WIDTH))
    layer.quantize("int8")
    return layer


def dense(kind=layers.Dense):
    return kind(4, name="dense")


def make(layer, x):
    """Builds a layer."""
    if not layer.built:
        layer.build(x.shape)
    return layer


ROWS, COLUMNS = ("tensor", None), (None, "tensor")


@pytest.mark.parametrize(
    ("build", "layout", "cut"),
    [
        (dense, COLUMNS, Cut(None, -1)),
        (dense, ROWS, Cut(-1, None)),
        (lambda: dense(type("Heir", (layers.Dense,), {})), COLUMNS, Cut(None, -1)),
        # Its kernel is not the variable.
        (lambda: dense(OwnKernel), COLUMNS, None),
        (with_lora, COLUMNS, None),
        # The last slice is padded.
        (lambda: layers.Dense(5, name="dense"), Layout(COLUMNS, uneven=True), None),
        (lambda: layers.EinsumDense("abb,bc->ac", 4, name="dense"), ROWS, None),
    ],
    ids=["columns", "rows", "heir", "own kernel", "lora", "padded", "diagonal"],
)
def test_what_is_computed_on_slices(build, layout, cut):
    """Fails if a layer multiplies with a slice of what is not its kernel as it is, and so computes
    something else than Keras."""
    strategy = MeshStrategy(Mesh(tensor=2), layout_map={"dense/kernel": layout})
    shape = (3, WIDTH, WIDTH) if cut is None and layout is ROWS else (3, WIDTH)
    x = tf.constant(np.random.default_rng(0).normal(size=shape), tf.float32)
    with strategy.scope():
        layer = make(build(), x)
    seen = []

    def call():
        seen.append(product_cut(layer, x))
        return layer(x)

    result = strategy.run(call)
    assert seen == [cut]
    for value in strategy.experimental_local_results(result):
        np.testing.assert_allclose(value, layer(x), atol=1e-5)


def test_what_is_whole_or_quantized_is_left_to_keras():
    """Fails if a layer without a layout is taken for one that is cut, or packed integers for a
    kernel."""
    strategy = MeshStrategy(Mesh(tensor=2), layout_map={"other/kernel": COLUMNS})
    x = tf.ones((2, WIDTH))
    with strategy.scope():
        make(layers.Dense(4, name="other"), x)
        layer, packed = make(dense(), x), quantized()
    assert product_cut(layer, x) is None
    result = strategy.run(lambda: (layer(x), packed(x)))
    for value in strategy.experimental_local_results(result):
        np.testing.assert_allclose(value[0], layer(x), atol=1e-5)
        np.testing.assert_allclose(value[1], packed(x), atol=1e-5)


@pytest.mark.parametrize("axes", [ROWS, COLUMNS])
def test_a_lookup_of_any_kind_of_number(axes):
    """Fails if tokens that count from the end, or are floats, find another row than in Keras."""
    strategy = MeshStrategy(Mesh(tensor=2), layout_map={"table/embeddings": axes})
    tokens = tf.constant([[0, 5, -1], [-6, 3, 2]])
    with strategy.scope():
        layer = make(layers.Embedding(6, 4, name="table"), tokens)
    result = strategy.run(lambda: (layer(tokens), layer(tf.cast(tokens, tf.float32))))
    for both in strategy.experimental_local_results(result):
        for value in both:
            np.testing.assert_array_equal(value, layer(tokens))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("axes", [ROWS, COLUMNS])
def test_a_gradient_is_sparse_where_all_reads_are_lookups(policy, axes):
    """Fails if an adaptive optimizer gets a dense gradient for lookups alone, or only the lookups'
    rows where the table is multiplied with too, or rows that are not those of the table."""
    strategy = MeshStrategy(Mesh(tensor=2), layout_map={"table/embeddings": axes})
    tokens = tf.constant([[0, 5, 5]])
    with strategy.scope():
        layer = make(layers.ReversibleEmbedding(6, 4, name="table", dtype=policy), tokens)
    table = layer.embeddings
    seen = []

    def gradients(is_tied):
        with tf.GradientTape() as tape:
            x = layer(tokens)
            y = layer(x, reverse=True) if is_tied else x
        gradient = tape.gradient(y, table._value.values[0])
        sparse = table._value.sparse_gradient(gradient)
        seen.append(sparse is not None)
        return tf.zeros(()) if sparse is None else tf.convert_to_tensor(sparse)

    result = strategy.run(gradients, args=(False,))
    for value in strategy.experimental_local_results(result):
        np.testing.assert_array_equal(value[:, 0], [1, 0, 0, 0, 0, 2])
    strategy.run(gradients, args=(True,))
    assert seen == [True, False]


def heads_seen(attention, mask=None):
    """How many heads a rank attends with, and whether the result is Keras's."""
    rules = {
        "attention/(query|key|value)/kernel": (None, "tensor", None),
        "attention/attention_output/kernel": ("tensor", None, None),
    }
    strategy = MeshStrategy(Mesh(tensor=2), layout_map=rules)
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 3, WIDTH)), tf.float32)
    with strategy.scope():
        layer = attention()
        layer.build(x.shape, x.shape)
    seen = []
    softmax = layer._softmax.call

    def spy(scores, mask=None):
        seen.append(scores.shape[1])
        return softmax(scores, mask=mask)

    layer._softmax.call = spy
    options = {"attention_mask": mask, "return_attention_scores": True}
    result = strategy.run(lambda: layer(x, x, **options))
    expected = layer(x, x, **options)
    for both in strategy.experimental_local_results(result):
        for value, other in zip(both, expected, strict=True):
            np.testing.assert_allclose(value, other, atol=1e-5)
    return seen[0]


class OwnAttention(layers.MultiHeadAttention):
    def _compute_attention(self, query, key, value, *args, **kwargs):
        return super()._compute_attention(2 * query, key, value, *args, **kwargs)


def multi_head(kind=layers.MultiHeadAttention, **options):
    return kind(4, 2, name="attention", **options)


def test_which_attention_has_its_heads_split():
    """Fails if attention that can be split is computed whole, or if a subclass, a regularizer of
    activations or a mask without a known number of heads gets heads that are not all."""
    assert heads_seen(multi_head) == 2
    assert heads_seen(lambda: layers.GroupQueryAttention(2, 4, 2, name="attention")) == 2
    assert heads_seen(multi_head, tf.ones((2, 4, 3, 3))) == 2
    assert heads_seen(multi_head, tf.ones((2, 1, 3, 3))) == 2
    assert heads_seen(multi_head, tf.ones((3, 3))) == 2
    assert heads_seen(lambda: multi_head(OwnAttention)) == 4
    assert heads_seen(lambda: multi_head(activity_regularizer="l2")) == 4
