"""The table of `llmos_tf.memory.report` of a model that is not built."""

from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

from llmos_tf.config import ModelConfig
from llmos_tf.memory.liveness import READS
from llmos_tf.mesh import Mesh
from llmos_tf.options import MeshOptions
from llmos_tf.planning.memory_model import memory_of
from llmos_tf.planning.plan import COMPUTE_BYTES, Plan
from llmos_tf.planning.schedules import make_schedule


def estimate(
    config: ModelConfig,
    mesh: Mesh | None = None,
    *,
    global_batch: int,
    seq_len: int | None = None,
    zero_stage: int = 0,
    optimizer: str | keras.Optimizer = "adamw",
    sequence_parallel: bool = False,
    context_method: str = "ring",
    num_microbatches: int | None = None,
    schedule: str = "1f1b",
    num_chunks: int = 1,
    dtype_policy: str = "float32",
    rematerialise: str | None = "none",
    bucket_bytes: int | None = None,
    offload: str | Iterable[str] | None = None,
    reshard_after_forward: bool = False,
) -> list[dict[str, Any]]:
    """Returns what `report` would count, by closed formulas: nothing is built or traced.

    Weights and optimizer state are exact, padding included. What lives within a step is that of a
    step of `make_train_step` or `fit` with `TokenCrossEntropy` at its fullest moment, by the
    formulas of `llmos_tf.planning.activations` and `llmos_tf.planning.memory_model`, on experts of
    balanced load. Metrics and counters, some bytes, are left out.

    Args:
        config: a `GPTConfig`, `LlamaConfig` or `MixtralConfig`.
        mesh: the mesh, whose devices need not exist; None for one device without a strategy.
        global_batch: rows of a step.
        seq_len: positions of a row; None for as many as the model takes.
        zero_stage: as for `MeshStrategy`.
        optimizer: a Keras optimizer or its name.
        sequence_parallel: as for `MeshStrategy`.
        context_method: as for `MeshStrategy`.
        num_microbatches: as for `MeshStrategy`.
        schedule: as for `MeshStrategy`.
        num_chunks: as for `MeshStrategy`.
        dtype_policy: "float32", "mixed_float16" or "mixed_bfloat16".
        rematerialise: as for `MeshStrategy`, but no number of bytes. "block" is also what
            `keras.RematScope("list_of_layers", layer_names=[...])` of all blocks does.
        bucket_bytes: as for `MeshStrategy`.
        offload: as for `MeshStrategy`.
        reshard_after_forward: as for `MeshStrategy`.

    Returns:
        A dict for each device of the mesh, in rank order: `device`, its name in the mesh or, where
        the mesh names none, its rank; and the other keys of `report`.

    Raises:
        ValueError: an option that is unknown or does not fit the mesh, or an optimizer whose state
            is not of the shape of the weights.

    Example:
        >>> row, *_ = estimate(get_preset("llama2_7b"), Mesh(fsdp=8), zero_stage=3,
        ...                    global_batch=8, seq_len=4096, dtype_policy="mixed_bfloat16")
        >>> row["parameters"], row["optimizer"]
        (3369207808, 6738415628)
    """  # noqa: DOC502
    without_strategy = mesh is None
    mesh = Mesh() if mesh is None else mesh
    if dtype_policy not in COMPUTE_BYTES:
        raise ValueError(
            f"dtype_policy is one of {', '.join(COMPUTE_BYTES)}. Received: {dtype_policy!r}."
        )
    stages = mesh.axis_size("pipe")
    offload = MeshOptions(offload=offload).resolved(mesh).offload
    if offload and without_strategy:
        raise ValueError(
            f"offload={offload} is an option of MeshStrategy, and mesh=None is a run without one. "
            "Give a mesh, which may be Mesh() for one device."
        )
    optimizer = keras.optimizers.get(optimizer)
    slots, scalars = _state_of(optimizer)
    pipeline = None
    if stages > 1:
        pipeline = make_schedule(schedule, stages, num_microbatches or stages, num_chunks)
    plan = Plan(
        config=config,
        mesh=mesh,
        global_batch=global_batch,
        seq_len=getattr(config, "max_positions", None) if seq_len is None else seq_len,
        zero_stage=zero_stage,
        sequence_parallel=sequence_parallel and mesh.axis_size("tensor") > 1,
        context_method=context_method,
        schedule=pipeline,
        optimizer_slots=slots,
        optimizer_scalars=scalars,
        update="keras" if without_strategy else "fused",
        decays=bool(optimizer.weight_decay),
        early_values=_num_early(optimizer, dtype_policy) if without_strategy else 0,
        compute_bytes=COMPUTE_BYTES[dtype_policy],
        bucket_bytes=bucket_bytes,
        rematerialise=rematerialise or "none",
        offload=offload,
        reshard_after_forward=reshard_after_forward,
    )
    by_stage = memory_of(plan)
    names = mesh.devices or [f"rank {rank}" for rank in range(mesh.size)]
    return [
        {"device": name, **by_stage[mesh.coordinate(rank)["pipe"]]}
        for rank, name in enumerate(names)
    ]


def _state_of(optimizer: keras.Optimizer) -> tuple[int, int]:
    """How many numbers an optimizer keeps for each weight, and the bytes that it keeps beside."""
    shape = (3, 5)
    # A copy, which is asked what it keeps of a weight of 15 numbers.
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    copy.build([keras.Variable(keras.ops.zeros(shape), name="weight")])
    slots = [v for v in copy.variables if tuple(v.shape) == shape]
    others = [v for v in copy.variables if tuple(v.shape) not in (shape, ())]
    if others:
        raise ValueError(
            "estimate knows optimizers that keep numbers for each number of a weight, such as adam "
            f"or sgd. Received: {optimizer.name}, which keeps {tuple(others[0].shape)} of a weight "
            f"of {shape}."
        )
    scalars = [v for v in copy.variables if tuple(v.shape) == ()]
    return len(slots), sum(map(_size, scalars))


def _num_early(optimizer: keras.Optimizer, dtype_policy: str) -> int:
    """How many values of a weight's size Keras computes before the gradient is there.

    As they wait for nothing, TensorFlow computes them when a step begins: ρ v of RMSprop, momentum
    that decays, and weights that do, unless they are read in 16 bits before.
    """
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    weight = keras.Variable(keras.ops.zeros((3, 5)), name="weight")
    copy.build([weight])

    @tf.function(autograph=False)
    def update(gradient):
        copy.update_step(gradient, weight, copy.learning_rate)

    graph = update.get_concrete_function(tf.TensorSpec(weight.shape, weight.dtype)).graph
    late, late_ops, early = {graph.inputs[0].ref()}, set(), set()
    for op in graph.get_operations():
        if late.isdisjoint(x.ref() for x in op.inputs) and late_ops.isdisjoint(op.control_inputs):
            continue
        late_ops.add(op)
        late.update(x.ref() for x in op.outputs)
        early |= {
            x.ref()
            for x in op.inputs
            if x.ref() not in late and x.shape == weight.shape and x.op.type != READS
        }
    return len(early) + bool(optimizer.weight_decay and dtype_policy == "float32")


def _size(variable: keras.Variable) -> int:
    return int(keras.ops.convert_to_numpy(variable.value).dtype.itemsize)
