"""Attention with heads split over `tensor`: Keras's `MultiHeadAttention`, `GroupQueryAttention`.

KerasHub's `CachedMultiHeadAttention` is one of the first kind, while it has no cache.

With query and output products cut by heads, a rank computes its own queries, attends with its own
heads, and multiplies with its rows of the output product; one all-reduce ends it (Megatron-LM,
arXiv 1909.08053). Keras's own code runs in between, on fewer heads. Keys and values are cut by
heads too, or computed whole, as where their heads are too few to be cut: then a rank takes what its
queries need.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.strategies.keras_layers.products import (
    AXIS,
    Cut,
    enter,
    is_elementwise,
    leave,
    multiply,
    product_cut,
)

# Of a tensor [..., heads, head width].
_HEADS = -2
_TO_HEADS, _FROM_HEADS = Cut(None, _HEADS), Cut(_HEADS, None)


class HeadRegions:
    """The attention layers of a program that are being called with split heads."""

    def __init__(self):
        # The region of an attention layer and of the layers in it, by `id`.
        self._entered: dict[int, _HeadRegion] = {}

    def attention_call(self, original: Callable) -> Callable:
        """Returns what stands in for `call` of an attention layer.

        Args:
            original: Keras's own.

        Returns:
            A function of the layer and its arguments.
        """
        signature = inspect.signature(original)

        @functools.wraps(original)
        def call(*args, **kwargs):
            arguments = signature.bind(*args, **kwargs).arguments
            region = _region_of(**arguments)
            if region is None:
                return original(*args, **kwargs)
            if arguments.get("attention_mask") is not None:
                arguments["attention_mask"] = region.own_mask(arguments["attention_mask"])
            with self._inside(region):
                result = original(**arguments)
            if not arguments.get("return_attention_scores"):
                return result
            output, scores = result
            return output, collectives.gather_from_axis(scores, AXIS, region.scores_dim)

        return call

    def compute_attention(self, original: Callable) -> Callable:
        """Returns what stands in for `_compute_attention` of an attention layer.

        Args:
            original: Keras's own.

        Returns:
            A function of the layer, queries, keys, values and more.
        """

        @functools.wraps(original)
        def _compute_attention(layer, query, key, value, *args, **kwargs):
            if id(layer) in self._entered:
                num_heads = query.shape[_HEADS]
                key, value = _own_heads(key, num_heads), _own_heads(value, num_heads)
            return original(layer, query, key, value, *args, **kwargs)

        return _compute_attention

    def einsum_dense_call(self, original: Callable) -> Callable:
        """Returns what stands in for `keras.layers.EinsumDense.call`.

        Args:
            original: Keras's own.

        Returns:
            A function of the layer and its arguments.
        """

        @functools.wraps(original)
        def call(layer, inputs, *args, **kwargs):
            cut = product_cut(layer, inputs)
            if cut is None:
                return original(layer, inputs, *args, **kwargs)
            region = self._entered.get(id(layer))
            if region is None:
                return leave(layer, multiply(layer, enter(inputs, cut), cut), cut)
            x = region.enter(inputs) if cut == _TO_HEADS else inputs
            return multiply(layer, x, cut)

        return call

    def dropout_call(self, original: Callable) -> Callable:
        """Returns what stands in for `keras.layers.Dropout.call`.

        Args:
            original: Keras's own.

        Returns:
            A function of the layer and its arguments.
        """

        @functools.wraps(original)
        def call(layer, inputs, training=False):
            if id(layer) not in self._entered or not training or not layer.rate:
                return original(layer, inputs, training=training)
            # Seeds agree along `tensor`, where activations do, and these heads do not.
            seed = tf.cast(layer.seed_generator.next(), tf.int32)
            seed += tf.stack([0, collectives.axis_index(AXIS) * 1_000_003])
            return tf.nn.experimental.stateless_dropout(inputs, rate=layer.rate, seed=seed)

        return call

    @contextlib.contextmanager
    def _inside(self, region: "_HeadRegion") -> Iterator[None]:
        members = {id(layer): region for layer in region.members}
        self._entered.update(members)
        try:
            yield
        finally:
            for member in members:
                del self._entered[member]


class _HeadRegion:
    """One call of an attention layer with split heads.

    Args:
        members: the attention layer, those of its products that are cut by heads, its dropout.
        scores_dim: dim of the heads in the attention scores and in a mask with as many dims.
        scores_rank: number of dims of the scores.
    """

    def __init__(self, members: list[keras.layers.Layer], scores_dim: int, scores_rank: int):
        self.members = members
        self.scores_dim = scores_dim
        self._scores_rank = scores_rank
        self._copies: dict[int, tuple[tf.Tensor, tf.Tensor]] = {}

    def enter(self, x: tf.Tensor) -> tf.Tensor:
        """Brings an activation into the region; one all-reduce backward for all that use it."""
        if id(x) not in self._copies:
            # With `x` itself, whose `id` would be free for another one.
            self._copies[id(x)] = (x, collectives.copy_to_axis(x, AXIS))
        return self._copies[id(x)][1]

    def takes_mask(self, mask: Any) -> bool:
        """Whether a mask is for all heads alike, or has a length for them that is known."""
        return isinstance(mask, tf.Tensor) and (
            mask.shape.rank < self._scores_rank or mask.shape[self.scores_dim] is not None
        )

    def own_mask(self, mask: tf.Tensor) -> tf.Tensor:
        """The mask for this rank's heads."""
        if mask.shape.rank < self._scores_rank or mask.shape[self.scores_dim] == 1:
            return mask
        return collectives.split_to_axis(mask, AXIS, self.scores_dim)


def _region_of(self, query, attention_mask=None, cache=None, **arguments) -> _HeadRegion | None:
    """The region for a call of an attention layer; None where its heads are not split."""
    del arguments
    if cache is not None:
        # KerasHub's keys and values of earlier positions, with all heads.
        return None
    is_grouped = isinstance(self, keras.layers.GroupQueryAttention)
    kind = keras.layers.GroupQueryAttention if is_grouped else keras.layers.MultiHeadAttention
    if type(self)._compute_attention is not kind._compute_attention:
        return None
    gate = [self._gate_dense] if hasattr(self, "_gate_dense") else []
    needed = [self._query_dense, *gate, self._output_dense]
    by_heads = {
        dense
        for dense in (*needed, self._key_dense, self._value_dense)
        if product_cut(dense, query) == (_FROM_HEADS if dense is needed[-1] else _TO_HEADS)
    }
    # What an activity regularizer sees has to be whole.
    if not by_heads.issuperset(needed) or not all(
        is_elementwise(dense) and dense.activity_regularizer is None for dense in by_heads
    ):
        return None
    num_axes = 1 if is_grouped else len(self._attention_axes)
    members = [self, self._dropout_layer, *by_heads]
    region = _HeadRegion(members, -1 - 2 * num_axes, query.shape.rank + num_axes)
    return region if attention_mask is None or region.takes_mask(attention_mask) else None


def _own_heads(x: tf.Tensor, num_heads: int) -> tf.Tensor:
    """This rank's heads, of those or of all."""
    return x if x.shape[_HEADS] == num_heads else collectives.split_to_axis(x, AXIS, _HEADS)
