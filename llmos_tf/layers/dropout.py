"""Dropout whose masks are those of one activation, however it is split."""

from typing import Any

import keras
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.layers.tensor_region import AXIS
from llmos_tf.spmd.program import current_program


class Dropout(keras.layers.Layer):
    """Zeroes a share of the entries and scales up the others (arXiv 1207.0580).

    Ranks with other rows of the batch draw other masks, because their seed generators have other
    states (`sharding.SeedVariable`). Along `tensor` the same activation gets the same mask, and an
    activation that is split along it (heads; positions between blocks under sequence parallelism)
    gets another for each rank. So it does along the axes that split the stream
    (`layers.activation_sharding`).

    Args:
        rate: share of entries that are dropped, 0 <= rate < 1.
        split_over_tensor: whether each rank of `tensor` always holds another part, as of heads. An
            activation of the residual stream is split exactly when the program is sequence
            parallel.
        seed: of the mask stream.
        name: layer name.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        x: any tensor.
        training: whether to drop.

    Call returns:
        Tensor like `x`.
    """

    def __init__(
        self,
        rate: float,
        split_over_tensor: bool = False,
        seed: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        self.rate = rate
        self.split_over_tensor = split_over_tensor
        self.seed_generator = keras.random.SeedGenerator(seed) if rate > 0 else None
        self.built = True

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        if not training or self.rate == 0:
            return x
        return tf.nn.experimental.stateless_dropout(x, rate=self.rate, seed=self.next_seed())

    def next_seed(self) -> tf.Tensor:
        """Returns the seed of one more mask, for a layer that has a rate and draws by itself.

        Returns:
            int32 ``[2]``, another one on ranks that hold other entries.
        """
        seed = tf.cast(self.seed_generator.next(), tf.int32)
        axes = self._axes_that_split()
        if axes:
            seed += tf.stack([0, collectives.axis_index(axes) * 1_000_003])
        return seed

    def _axes_that_split(self) -> tuple[str, ...]:
        """The axes whose ranks hold other entries of the activation, rows of the batch apart."""
        program = current_program()
        if program is None:
            return ()
        is_split = self.split_over_tensor or program.sequence_parallel
        stream = () if program.stream is None else program.stream.axes
        return (*stream, AXIS) if is_split else stream
