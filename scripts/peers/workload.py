"""What every run of llmos-benchmark trains: one model, one batch, one optimizer. numpy only.

Weights, batch and hyper-parameters are the same for all, so the first loss of two runs and the one
after some updates are equal up to float summation order. Where they are not, the runs did not do
the same work, and their times say nothing.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmos_tf.config import GPTConfig

# AdamW as Keras computes it: decay of all weights, apart from the gradient and times the learning
# rate; epsilon is added to the root of the second moment before its bias is corrected.
OPTIMIZER = {
    "learning_rate": 1e-3,
    "beta_1": 0.9,
    "beta_2": 0.999,
    "epsilon": 1e-7,
    "weight_decay": 0.1,
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The model, the batch and the optimizer of all runs.

    Args:
        model: fields of `GPTConfig`.
        global_batch: sequences in a step.
        seed: of weights and batch.
        optimizer: hyper-parameters, with Keras's names.
    """

    model: dict[str, int]
    global_batch: int
    seed: int
    optimizer: dict[str, float] = field(default_factory=lambda: dict(OPTIMIZER))

    @property
    def config(self) -> GPTConfig:
        """The sizes of the model."""
        return GPTConfig(**self.model)

    def weights(self) -> dict[str, np.ndarray]:
        """Returns the initial weights by name, float32.

        Returns:
            Names and shapes are those of `llmos_tf.models.GPT`: V tokens, P positions, width D, N
            heads of H, feed-forward width F.
        """
        config, rng = self.config, np.random.default_rng(self.seed)
        d, f = config.hidden_size, config.feed_forward_size
        heads = (config.num_heads, config.head_dim)
        deviation = 0.02
        residual = deviation / math.sqrt(2 * config.num_layers)

        def normal(*shape: int, scale: float = deviation) -> np.ndarray:
            return (scale * rng.standard_normal(shape)).astype(np.float32)

        def dense(name: str, kernel: np.ndarray, *bias: int) -> dict[str, np.ndarray]:
            return {f"{name}/kernel": kernel, f"{name}/bias": np.zeros(bias, np.float32)}

        def norm(name: str) -> dict[str, np.ndarray]:
            return {
                f"{name}/gamma": np.ones(d, np.float32),
                f"{name}/beta": np.zeros(d, np.float32),
            }

        weights = {
            "token_embedding/table": normal(config.vocab_size, d),
            "position_embedding/table": normal(config.max_positions, d),
        }
        for i in range(config.num_layers):
            block, attention = f"block_{i}", f"block_{i}/attention"
            weights |= norm(f"{block}/attention_norm")
            weights |= dense(f"{attention}/query_key_value", normal(d, 3, *heads), 3, *heads)
            weights |= dense(f"{attention}/output", normal(*heads, d, scale=residual), d)
            weights |= norm(f"{block}/feed_forward_norm")
            weights |= dense(f"{block}/feed_forward/up", normal(d, f), f)
            weights |= dense(f"{block}/feed_forward/down", normal(f, d, scale=residual), d)
        return weights | norm("final_norm")

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the batch that every step trains on.

        Returns:
            Tokens and the tokens that follow them, int32 ``[global batch, positions]``.
        """
        rng = np.random.default_rng((self.seed, 1))
        shape = (self.global_batch, self.config.max_positions + 1)
        tokens = rng.integers(0, self.config.vocab_size, shape, dtype=np.int32)
        return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process of a run is told.

    Args:
        kind: name of the kind, as in `kinds.KINDS`.
        devices: how many devices, or processes where each has one.
        options: what the run says besides.
        workload: what is trained.
        mesh: of a run of ours.
        threads_per_device: threads of a device, or None for what the framework takes by itself.
        rank: which of the processes this is.
        rendezvous: a file by which the processes find each other.
    """

    kind: str
    devices: int
    options: dict[str, Any]
    workload: Workload
    mesh: str = "1"
    threads_per_device: int | None = None
    rank: int = 0
    rendezvous: str = ""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Job":
        """Makes the job that ``dataclasses.asdict`` wrote.

        Args:
            data: field name to value.

        Returns:
            The job.
        """
        return cls(**data | {"workload": Workload(**data["workload"])})


def fused_by_heads(array: np.ndarray) -> np.ndarray:
    """Orders the fused query-key-value product by heads, so that a cut of its columns cuts heads.

    Args:
        array: ``[..., 3, N, H]``.

    Returns:
        ``[..., N·3·H]``.
    """
    return np.ascontiguousarray(np.swapaxes(array, -3, -2)).reshape(*array.shape[:-3], -1)
