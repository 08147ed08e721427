"""What the language models share: presets, training on sharded logits, decoding."""

from collections.abc import Mapping
from typing import Any, ClassVar

import keras
import tensorflow as tf

from llmos_tf.config import ModelConfig
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.layers.activation_sharding import Stream, check_positions, entered, open_stream
from llmos_tf.layers.ring_attention import check_heads
from llmos_tf.mesh import Mesh
from llmos_tf.models.presets import PRESETS, get_preset
from llmos_tf.sharding import announce_layouts
from llmos_tf.spmd.program import current_program


class LanguageModel(keras.Model):
    """A decoder-only transformer: tokens ``[B, T]`` in, logits ``[B, T, V]`` out.

    It is built when it is made, so its weights exist, its parameters can be counted and a
    checkpoint can be loaded before any data is seen.

    Args:
        config: sizes.
        name: model name; its variables' paths begin with it.
        **kwargs: as for `keras.Model`.

    Call arguments:
        tokens: integers ``[B, T]``, T <= max_positions. Or, as `fit` hands inputs on, a mapping
            with "tokens" and "segment_ids".
        training: whether to drop.
        cache: keys and values of earlier positions, as for `decode`, or None.
        offset: number of positions in the cache.
        segment_ids: integers ``[B, T]``, the document that each token is of, where a row holds
            several; a token sees only those of its own. None where it sees the whole row.

    Call returns:
        Logits ``[B, T, V]``; with a cache, (these, the new cache).

    Raises:
        ValueError: a configuration of another architecture; in a call, segment ids with a cache,
            or positions that a mesh cannot split over its `context` axis.
    """  # noqa: DOC502

    config_class: ClassVar[type[ModelConfig]] = ModelConfig

    def __init__(self, config: ModelConfig, name: str | None = None, **kwargs: Any):
        super().__init__(name=name, **kwargs)
        if not isinstance(config, self.config_class):
            raise ValueError(
                f"{type(self).__name__} takes a {self.config_class.__name__}. Received: {config!r}."
            )
        self.config = config
        announce_layouts(self.layout_table(), splits=("context", "expert"))
        self.make_layers()
        self.build((None, config.max_positions))

    @classmethod
    def from_preset(cls, preset: str, **kwargs: Any) -> "LanguageModel":
        """Makes a model of a named size, with new weights.

        Args:
            preset: a name in `llmos_tf.models.PRESETS`.
            **kwargs: as for the constructor.

        Returns:
            The model.

        Raises:
            ValueError: an unknown preset, or one of another architecture.

        Example:
            >>> model = GPT.from_preset("gpt_tiny")
        """
        config = get_preset(preset)
        if not isinstance(config, cls.config_class):
            mine = [name for name, c in PRESETS.items() if isinstance(c, cls.config_class)]
            raise ValueError(
                f"The preset {preset!r} is a {type(config).__name__}; {cls.__name__} takes one of "
                f"{', '.join(mine)}."
            )
        return cls(config, **kwargs)

    def make_layers(self) -> None:
        """Makes `blocks` and the other layers."""
        raise NotImplementedError

    def layout_table(self) -> dict[str, Any]:
        """Returns the layouts of this model's variables over a tensor axis, by path pattern."""
        raise NotImplementedError

    def build(self, input_shape: Any) -> None:
        """Makes all weights.

        Args:
            input_shape: not needed: the configuration says it all.

        Raises:
            NotImplementedError: the architecture does not say how.
        """
        raise NotImplementedError

    def embed(
        self, tokens: tf.Tensor, training: bool | None, offset: int | tf.Tensor = 0
    ) -> tf.Tensor:
        """Begins the residual stream.

        Args:
            tokens: ``[B, T]``, or this rank's part of them.
            training: whether to drop.
            offset: as for `decode`.

        Returns:
            ``[B, T, D]``.

        Raises:
            NotImplementedError: the architecture does not say how.
        """
        raise NotImplementedError

    def score(self, x_BTD: tf.Tensor) -> tf.Tensor:
        """Ends the residual stream: the last norm and the output layer.

        Args:
            x_BTD: the residual stream after the last block.

        Returns:
            Logits ``[B, T, V]``, or ``[B, T, V/t]`` where the program allows sharded logits.

        Raises:
            NotImplementedError: the architecture does not say how.
        """
        raise NotImplementedError

    def call(
        self,
        tokens: tf.Tensor | Mapping[str, tf.Tensor],
        training: bool | None = None,
        cache: tf.Tensor | None = None,
        offset: int | tf.Tensor = 0,
        segment_ids: tf.Tensor | None = None,
    ) -> Any:
        if isinstance(tokens, Mapping):
            tokens, segment_ids = _inputs(tokens)
        if cache is not None:
            if segment_ids is not None:
                raise ValueError("Decoding with a cache takes no segment_ids: a row is one text.")
            x, cache = self.run_blocks(
                self.embed(tokens, training, offset), training, cache, offset
            )
            return self.score(x), cache
        stream = open_stream(self.trainable_variables, tokens.shape)
        with entered(stream):
            x = self.embed(stream.enter(tokens), training, offset)
            ids = None if segment_ids is None else stream.enter(segment_ids)
            x, _ = self.run_blocks(x, training, segment_ids=ids)
            logits = self.score(x)
        return _left(stream, logits)

    def check_inputs_on_mesh(self, inputs: Any, mesh: Mesh, options: Any) -> None:
        """Checks that a mesh can split a batch; its strategy calls this before a step is traced.

        Args:
            inputs: as the model is called with, of one replica.
            mesh: the strategy's mesh.
            options: its `MeshOptions`.

        Raises:
            ValueError: the `context` axis divides neither positions nor, by all-to-all, heads.
        """  # noqa: DOC502
        tokens = inputs.get("tokens") if isinstance(inputs, Mapping) else inputs
        shape = getattr(tokens, "shape", None)
        if shape is None or len(shape) != 2:
            return
        check_positions(mesh, options, shape[1])
        if options.context_method == "ulysses":
            heads, ways = self.config.num_heads, mesh.axis_size("tensor")
            mine = heads if heads % ways else heads // ways
            check_heads(mine, mesh.axis_size("context"))

    def decode(
        self, tokens: tf.Tensor, cache: tf.Tensor, offset: int | tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Scores tokens that follow those in the cache.

        Args:
            tokens: ``[B, T]``.
            cache: ``[layers, 2, B, K', S, H]``, see `new_cache`.
            offset: number of positions already in the cache, int32 scalar.

        Returns:
            Logits ``[B, T, V]`` and the cache with the T positions written.
        """
        # Through Keras's __call__, which casts weights to the compute dtype of the policy.
        return self(tokens, training=False, cache=cache, offset=offset)

    def run_blocks(
        self,
        x_BTD: tf.Tensor,
        training: bool | None,
        cache: tf.Tensor | None = None,
        offset: int | tf.Tensor = 0,
        segment_ids: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Runs the blocks one after another.

        Args:
            x_BTD: the residual stream.
            training: whether to drop.
            cache: as for `decode`, or None.
            offset: as for `decode`.
            segment_ids: the documents of this rank's tokens, or None.

        Returns:
            The residual stream after the last block, and the new cache, if there is one.
        """
        if cache is None:
            for block in self.blocks:
                x_BTD = block(x_BTD, training=training, segment_ids=segment_ids)
            return x_BTD, None
        caches = []
        for block, block_cache in zip(self.blocks, tf.unstack(cache), strict=True):
            x_BTD, block_cache = block(x_BTD, training=training, cache=block_cache, offset=offset)
            caches.append(block_cache)
        return x_BTD, tf.stack(caches)

    def new_cache(self, rows: int | tf.Tensor, length: int | tf.Tensor) -> tf.Tensor:
        """Returns an empty key-value cache for this rank.

        Args:
            rows: B.
            length: S, positions in all.

        Returns:
            Zeros ``[layers, 2, B, K', S, H]``, K' the key-value heads that this rank keeps.
        """
        attention = self.blocks[0].attention
        shape = [len(self.blocks), 2, rows, attention.cache_heads(), length, attention.head_dim]
        return tf.zeros(shape, self.compute_dtype)

    def num_parameters(self) -> int:
        """Returns the number of trainable parameters, from the configuration."""
        return self.config.num_parameters()

    def train_step(self, data: Any) -> dict[str, Any]:
        """As Keras's, on sharded logits where loss and metrics can use them.

        Args:
            data: this replica's rows.

        Returns:
            Metric results.
        """
        return self._on_sharded_logits(super().train_step, data)

    def test_step(self, data: Any) -> dict[str, Any]:
        """As Keras's, on sharded logits where loss and metrics can use them.

        Args:
            data: this replica's rows.

        Returns:
            Metric results.
        """
        return self._on_sharded_logits(super().test_step, data)

    def _on_sharded_logits(self, step: Any, data: Any) -> Any:
        program = current_program()
        if program is None:
            return step(data)
        knows = isinstance(self.loss, TokenCrossEntropy) and len(self.metrics) == 1
        with program.having(sharded_logits=knows, logits_axis=None, logits_stream=None):
            return step(data)

    def export(
        self,
        filepath: Any,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        **kwargs: Any,
    ) -> None:
        """As `keras.Model.export`, which cannot tell the inputs of a subclassed model.

        Args:
            filepath: where to write.
            format: as in Keras.
            verbose: as in Keras.
            input_signature: as in Keras; None takes int32 tokens ``[B, T]`` of any B and T.
            **kwargs: as in Keras.
        """
        if input_signature is None:
            input_signature = [keras.InputSpec(shape=(None, None), dtype="int32", name="tokens")]
        super().export(filepath, format, verbose, input_signature, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Returns what `from_config` needs."""
        return {"config": self.config.to_dict(), "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "LanguageModel":
        """Makes a model like another, with new weights.

        Args:
            config: what `get_config` returned.
            custom_objects: not needed.

        Returns:
            The model.
        """
        return cls(cls.config_class.from_dict(config["config"]), name=config["name"])


def _inputs(inputs: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor | None]:
    unknown = sorted(set(inputs) - {"tokens", "segment_ids"})
    if unknown or "tokens" not in inputs:
        raise ValueError(
            'A language model takes tokens, or a mapping with "tokens" and "segment_ids". '
            f"Received: a mapping with {sorted(inputs)}."
        )
    return inputs["tokens"], inputs.get("segment_ids")


def _left(stream: Stream, logits: tf.Tensor) -> tf.Tensor:
    """The logits of all ranks, or this rank's where the loss can use them so."""
    program = current_program()
    if program is not None and program.sharded_logits and stream.axes:
        program.logits_stream = stream
        return logits
    return stream.leave(logits)
