"""The general strategy: any mesh."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import devices as device_list
from llmos_tf.mesh import Mesh
from llmos_tf.options import MeshOptions
from llmos_tf.strategies.extended import MeshExtended


class MeshStrategy(tf.distribute.MirroredStrategy):
    """Trains Keras models over a mesh of devices, with the weights of one device.

    Args:
        mesh: the axes, and optionally the devices.
        devices: device names in rank order, for a mesh that names none; None takes the first
            visible ones.
        zero_stage: 0 keeps optimizer state on every rank; 1 and 2 cut it along `data` (ZeRO,
            arXiv 1910.02054; 2 keeps only that part of accumulated gradients too); 3 says that
            parameters are cut too, along `fsdp`. An `fsdp` axis cuts parameters, gradients and
            optimizer state at any stage.
        layout_map: `keras.distribution.LayoutMap` or mapping from variable path to axes, for the
            `tensor` axis. None takes the model's own table.
        sequence_parallel: also split activations between blocks along positions over `tensor`
            (arXiv 2205.05198).
        num_microbatches: into how many equal parts a replica's rows are cut for the `pipe` axis,
            at least as many as stages but with "gpipe". None takes as many.
        schedule: "gpipe", "1f1b", "interleaved", "zb-h1" or "zb-v"; see `planning.schedules`.
        num_chunks: parts of the model on each stage, for the schedule "interleaved".
        stage_of: layer name to pipeline stage, or part of the model where a stage has several, to
            overrule how the model is cut.
        context_method: how attention sees positions of other ranks of the `context` axis: "ring"
            (arXiv 2310.01889) or "ulysses" (all-to-all over heads, arXiv 2309.14509).
        bucket_bytes: how many bytes of gradients are reduced together; None chooses by the mesh
            (`llmos_tf.planning.buckets`).
        gradient_compression: what is sent of gradients that are summed: None for all bits, "bf16",
            "fp16" or "int8" for fewer, "powersgd" for matrices of low rank. All but None train
            otherwise than one device does, by what docs/compression.md measures.
        powersgd_rank: rank of these matrices; None for 4.
        rematerialise: what the backward pass computes again in place of keeping it. "none";
            "block": each block of a stack keeps its inputs only, and where a model is no stack each
            of its layers; "selective": the same blocks keep the results of products too, and
            compute attention scores, softmax, dropout, norms and activations again (arXiv
            2205.05198); "full": every layer of the model keeps its inputs only; or the bytes that
            blocks may keep together on a device, from which the cheapest of these ways is chosen
            for each. None is "none". See `strategies.layer_stack.rematerialise`.
        offload: what lies in the memory of the host in place of the devices. "optimizer": the state
            of the optimizer, with accumulated gradients and averages of weights; it is updated
            there, and of each weight a gradient goes to the host and a change comes back
            (ZeRO-Offload, arXiv 2101.06840). "parameters": trained weights, which are copied to the
            device where they are used. A tuple of both, or "all"; None for nothing.
        host_device: the device that is the host, such as "CPU:0", which None takes: a CPU device of
            this process.
        reshard_after_forward: for the `fsdp` axis: whether each block of a stack lets go of its
            gathered weights after the forward pass, and gathers them again for the backward pass.
            That sends half as much again, and keeps the whole weights of about two blocks in place
            of all. Weights outside of blocks stay. Where `rematerialise` computes a block again,
            its weights are gathered again anyway. See `strategies.layer_stack.fsdp_prefetch`.

    Raises:
        ValueError: the mesh does not fit the devices, or the options do not fit the mesh.

    Example:
        >>> strategy = MeshStrategy(Mesh(data=2, tensor=2))
        >>> with strategy.scope():
        ...     model = llmos_tf.models.GPT.from_preset("gpt_tiny")
        ...     model.compile("adamw", llmos_tf.layers.TokenCrossEntropy())
        >>> model.fit(dataset)
    """

    # `tf.distribute` looks for it on the class of the strategy.
    _collective_key_base = 0

    def __init__(
        self,
        mesh: Mesh,
        *,
        devices: Sequence[str] | None = None,
        zero_stage: int = 0,
        layout_map: Mapping | None = None,
        sequence_parallel: bool = False,
        num_microbatches: int | None = None,
        schedule: str = "1f1b",
        num_chunks: int = 1,
        stage_of: Mapping[str, int] | None = None,
        context_method: str = "ring",
        bucket_bytes: int | None = None,
        gradient_compression: str | None = None,
        powersgd_rank: int | None = None,
        rematerialise: str | int | None = None,
        offload: str | Iterable[str] | None = None,
        host_device: str | None = None,
        reshard_after_forward: bool = False,
    ):
        if not isinstance(mesh, Mesh):
            raise ValueError(
                f"MeshStrategy takes an llmos_tf.Mesh, such as Mesh(data=2). Received: {mesh!r}."
            )
        mesh = mesh_over(mesh, devices)
        options = MeshOptions(
            zero_stage=zero_stage,
            layout_map=layout_map,
            sequence_parallel=sequence_parallel,
            num_microbatches=num_microbatches,
            schedule=schedule,
            num_chunks=num_chunks,
            stage_of=dict(stage_of or {}),
            context_method=context_method,
            bucket_bytes=bucket_bytes,
            gradient_compression=gradient_compression,
            powersgd_rank=powersgd_rank,
            rematerialise=rematerialise,
            offload=offload,
            host_device=host_device,
            reshard_after_forward=reshard_after_forward,
        ).resolved(mesh)
        extended = MeshExtended(self, device_list.resolve(mesh), options)
        # Past MirroredStrategy's own constructor, which would make its own `extended`.
        tf.distribute.Strategy.__init__(self, extended)

    @contextlib.contextmanager
    def scope(self) -> Iterator[tf.distribute.Strategy]:
        """Enters the strategy: what is created in the context belongs to it.

        Layout rules are checked when it is left, after weights were created in it: everything that
        a `layout_map` names is created under the same one. A scope inside another one checks
        nothing.

        Yields:
            The strategy.

        Raises:
            ValueError: when it is left, if a layout rule matches no variable that exists, or an
                axis of the mesh is used by none.
        """  # noqa: DOC502
        rules = self.extended.layout_rules
        is_outermost, before = not tf.distribute.has_strategy(), rules.num_created
        with super().scope() as strategy:
            yield strategy
        if is_outermost and rules.num_created > before:
            rules.check_all_used()

    @property
    def mesh(self) -> Mesh:
        """The mesh, with full device names."""
        return self.extended.mesh

    @property
    def num_traces(self) -> int:
        """How many programs were traced so far."""
        return self.extended.engine.num_traces

    def explain(self, model: keras.Model) -> list[dict[str, Any]]:
        """Returns what the steps of a model gather, of those that were traced.

        A step of a mesh that splits nothing but rows is traced as for one device and partitioned
        (docs/adr/0017). Where an op needs rows of other ranks, or has no rule for rows on several
        ranks, they are gathered.

        Args:
            model: of this strategy; `fit`, `evaluate`, `predict` or a step by `make_train_step` has
                run.

        Returns:
            One dict for each value: `step`, such as "train_step"; `op`, its name; `type` of the op;
            `layer`, in whose scope it is made; `bytes_per_row`, or None; `without_rule`, types of
            the ops that have no rule, empty where an op needs all rows by what it computes.

        Raises:
            ValueError: no step of the model was partitioned yet.

        Example:
            >>> model.fit(dataset)
            >>> strategy.explain(model)
            []
        """
        steps = self.extended.engine.gathered.get(model)
        if steps is None:
            raise ValueError(
                f"No step of the model {model.name!r} was partitioned yet. Call fit, evaluate or "
                "predict first, on a mesh that has no other axes than data and fsdp."
            )
        return [{"step": name, **row} for name, rows in steps.items() for row in rows]


def mesh_over(mesh: Mesh, devices: Sequence[str] | None) -> Mesh:
    """Returns a mesh over the devices that a strategy was given beside it.

    Args:
        mesh: with or without devices.
        devices: device names in rank order, or None.

    Returns:
        The mesh, with these devices if there are any.

    Raises:
        ValueError: both name devices.
    """
    if devices is None:
        return mesh
    if mesh.devices is not None:
        raise ValueError(
            "Give the devices once, to the mesh or to the strategy. Received: "
            f"{mesh!r} and devices={list(devices)}."
        )
    return mesh.with_devices(devices)
