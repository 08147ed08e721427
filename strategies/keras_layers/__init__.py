"""Keras's own layers on slices of their weights, where a layout cuts them over `tensor`.

Between Keras layers every rank of the `tensor` axis holds the whole activation. A variable that is
cut is gathered by whoever reads it, so any layer is right as it is, and computes everything on
every rank. Inside a program these layers do better:

- `Dense` and `EinsumDense` multiply with the slice of the kernel (`products`);
- `Embedding` and `ReversibleEmbedding` look up in, and multiply with, the slice of the table
  (`lookups`);
- `MultiHeadAttention` and `GroupQueryAttention` attend with the rank's own heads (`attention`).

And where the batch is split, `BatchNormalization(synchronized=True)` counts the valid positions of
all ranks (`normalization`).

Everything else reads whole variables, and so do these layers where they have to: with LoRA,
quantized, with a kernel of the user's own making, or cut in a way that they cannot use.
`LayerNormalization` reads its two vectors whole on purpose: its input is whole, so with slices of
the vectors it would have to gather an output that is as large as the input.
"""

from llmos_tf.strategies.keras_layers.replacements import layer_replacements

__all__ = ["layer_replacements"]
