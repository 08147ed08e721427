"""TPUs: `tf.distribute.TPUStrategy` with its replicas and logical cores placed as a mesh says.

Nothing here has run on a TPU. The placement is arithmetic (`strategies.tpu_topology`), tested on
constructed topologies; `docs/tpu.md` says what is not tested.
"""

import math
import os
import socket
from collections.abc import Sequence

import tensorflow as tf

from llmos_tf.mesh import BATCH_AXES, Mesh
from llmos_tf.strategies.tpu_topology import CORE_AXES, core_coordinates

# Seconds to wait for each worker of a TPU before it is said to be absent.
_ANSWER_SECONDS = 5


def device_assignment(
    mesh: Mesh, topology: tf.tpu.experimental.Topology
) -> tf.tpu.experimental.DeviceAssignment:
    """Turns a mesh into the placement that `tf.distribute.TPUStrategy` takes.

    The boxes of `core_coordinates` are given to replicas host by host, because TPUStrategy feeds
    replicas in the order of their hosts and would else send rows from one host to another.

    Args:
        mesh: the axes, without devices.
        topology: what `tf.tpu.experimental.initialize_tpu_system` returned.

    Returns:
        A placement of data × fsdp replicas, on as many cores each as the other axes multiply to.

    Raises:
        ValueError: `topology` is not one, the mesh names devices, or it needs more cores.

    Example:
        >>> topology = tf.tpu.experimental.initialize_tpu_system(resolver)
        >>> device_assignment(Mesh(data=4, tensor=2), topology).core_assignment[3].tolist()
        [[1, 0, 0, 0], [1, 0, 0, 1]]
    """
    _check_mesh(mesh)
    if not isinstance(topology, tf.tpu.experimental.Topology):
        raise ValueError(
            "A topology is what tf.tpu.experimental.initialize_tpu_system returns, or a "
            "tf.tpu.experimental.Topology(mesh_shape=..., device_coordinates=...). "
            f"Received: {topology!r}."
        )
    cores = core_coordinates(mesh, topology.mesh_shape, topology.missing_devices)
    hosts = [int(topology.task_ordinal_at_coordinates(core)) for core in cores[:, 0]]
    turn = {host: index for index, host in enumerate(dict.fromkeys(hosts))}
    # Sorting is stable: hosts, and the replicas of one host, stay in the order of the walk.
    by_host = sorted(range(len(hosts)), key=lambda replica: turn[hosts[replica]])
    return tf.tpu.experimental.DeviceAssignment(topology, cores[by_host])


def partition_dimensions(layout: Sequence[str | None], mesh: Mesh) -> list[int]:
    """Turns a layout into what `experimental_split_to_logical_devices` takes.

    TPUStrategy gives part p of a tensor, counted along its dimensions, to logical core p. So a
    layout can be said only if it names every split core axis, in the order of the mesh.

    Args:
        layout: an axis name or None per dimension, such as ``(None, "tensor")``.
        mesh: the mesh.

    Returns:
        Ways to split each dimension; all 1 for a replicated tensor.

    Raises:
        ValueError: an unknown axis, or a layout that TPUStrategy cannot express.

    Example:
        >>> partition_dimensions((None, "tensor"), Mesh(data=2, tensor=4))
        [1, 4]
    """
    sizes = [1 if axis is None else mesh.axis_size(axis) for axis in layout]
    named = [axis for axis, size in zip(layout, sizes, strict=True) if size > 1]
    split = [axis for axis in CORE_AXES if mesh.axis_size(axis) > 1]
    if set(named) & set(BATCH_AXES):
        raise ValueError(
            "The axes data and fsdp number the replicas of a TPUStrategy, and inside a replica "
            f"nothing is left to split along them. Received: the layout {tuple(layout)} on the "
            f"mesh {mesh}. Write None for that dimension."
        )
    if named and named != split:
        raise ValueError(
            "A TPUStrategy splits a tensor over all logical cores of a replica or none, in mesh "
            f"order. Received: the layout {tuple(layout)} on the mesh {mesh}. Name each of "
            f"{', '.join(split)} once, in this order, or give None for all dimensions."
        )
    return sizes


class TPUMeshStrategy(tf.distribute.TPUStrategy):
    """`tf.distribute.TPUStrategy` with replicas and logical cores placed as a mesh says.

    What runs on it is stock TensorFlow, not the engine of `MeshStrategy`: clipping, uneven batches
    and the like are as Keras has them under TPUStrategy. Variables are stored whole on every core,
    so `fsdp` is refused, and `tensor`, `context` and `expert` need `replicate_variables=True`:
    they split the computation on tensors that go through `split`, and nothing else. A model's
    layout table is not read.

    Args:
        mesh: the axes, without devices.
        resolver: which TPU. None takes the one that the variable TPU_NAME names, or the TPU of
            this machine.
        topology: of a TPU that is connected and initialized already, which starting it again
            would empty. None connects to it and initializes it.
        replicate_variables: says that on an axis other than `data` computation is to be split
            although every core stores every variable.

    Raises:
        ValueError: an axis that TPUStrategy cannot honour, a mesh that does not fit the topology,
            or a resolver or topology that is not one.
        RuntimeError: no TPU answers.

    Example:
        >>> strategy = TPUMeshStrategy(Mesh(data=8))
        >>> with strategy.scope():
        ...     model = llmos_tf.models.GPT.from_preset("gpt_tiny")
    """  # noqa: DOC502

    def __init__(
        self,
        mesh: Mesh,
        resolver: tf.distribute.cluster_resolver.TPUClusterResolver | None = None,
        *,
        topology: tf.tpu.experimental.Topology | None = None,
        replicate_variables: bool = False,
    ):
        _check_mesh(mesh)
        _check_axes(mesh, replicate_variables)
        if not isinstance(resolver, tf.distribute.cluster_resolver.TPUClusterResolver | None):
            raise ValueError(
                "A resolver is a tf.distribute.cluster_resolver.TPUClusterResolver, such as "
                f"TPUClusterResolver('my-tpu'). Received: {resolver!r}."
            )
        try:
            tpu = _default_resolver() if resolver is None else resolver
            topology = _start(tpu) if topology is None else topology
        except (OSError, RuntimeError, ValueError, tf.errors.OpError) as error:
            raise RuntimeError(_no_tpu(resolver, error)) from error
        assignment = device_assignment(mesh, topology)
        # Without SPMD partitioning the logical cores other than the first would idle: TPUStrategy
        # puts each op and variable on one core. With one core there is nothing to partition, and
        # the flag would only choose another kind of variable.
        super().__init__(
            tpu,
            experimental_device_assignment=assignment,
            experimental_spmd_xla_partitioning=assignment.num_cores_per_replica > 1,
        )
        self._mesh = mesh.with_devices(self._device_names(mesh))

    @property
    def mesh(self) -> Mesh:
        """The mesh, with the full names of the TPU cores in rank order."""
        return self._mesh

    def split(self, tensor: tf.Tensor, layout: Sequence[str | None]) -> tf.Tensor:
        """Tells the compiler how a tensor lies on the logical cores of its replica.

        Args:
            tensor: a tensor inside `strategy.run`.
            layout: an axis name or None per dimension.

        Returns:
            The same values, annotated.

        Raises:
            ValueError: a layout of another rank, one that TPUStrategy cannot express, or a
                dimension that an axis does not divide.
        """  # noqa: DOC502
        if tensor.shape.rank != len(layout):
            raise ValueError(
                "A layout has an axis name or None for each dimension. Received: the layout "
                f"{tuple(layout)} for a tensor of shape {tensor.shape}."
            )
        ways = partition_dimensions(layout, self.mesh)
        if math.prod(ways) == 1:
            return self.experimental_replicate_to_logical_devices(tensor)
        return self.experimental_split_to_logical_devices(tensor, ways)

    def _device_names(self, mesh: Mesh) -> list[str]:
        names = []
        for core in range(mesh.axis_size(CORE_AXES)):
            with self.extended.experimental_logical_device(core):
                names.append(self.extended.worker_devices)
        return [
            names[mesh.index_along(rank, CORE_AXES)][mesh.index_along(rank, BATCH_AXES)]
            for rank in range(mesh.size)
        ]


# --- checks and the way to a TPU -----------------------------------------------------------------


def _check_mesh(mesh: Mesh) -> None:
    if not isinstance(mesh, Mesh):
        raise ValueError(f"A mesh is an llmos_tf.Mesh, such as Mesh(data=8). Received: {mesh!r}.")
    if mesh.devices is not None:
        raise ValueError(
            "On a TPU the ranks are placed by the topology, so the mesh names no devices. "
            f"Received: {mesh!r}. Leave devices out."
        )


def _check_axes(mesh: Mesh, replicate_variables: bool) -> None:
    if mesh.axis_size("pipe") > 1:
        raise ValueError(
            f"TPUStrategy has no pipeline stages. Received: the mesh {mesh}. Use pipe=1."
        )
    if mesh.axis_size("fsdp") > 1:
        raise ValueError(
            "TPUStrategy stores every variable whole on each replica, so an fsdp axis would save "
            f"nothing. Received: the mesh {mesh}. Name these ways to split the batch data."
        )
    split = [axis for axis in CORE_AXES if mesh.axis_size(axis) > 1]
    if split and not replicate_variables:
        raise ValueError(
            f"TPUStrategy stores every variable whole on each core, so {', '.join(split)} would "
            f"split the computation but no memory. Received: the mesh {mesh} with "
            "replicate_variables=False. Give replicate_variables=True if that is what you want, "
            "or use data alone."
        )


def _default_resolver() -> tf.distribute.cluster_resolver.TPUClusterResolver:
    return tf.distribute.cluster_resolver.TPUClusterResolver(os.environ.get("TPU_NAME") or "local")


def _start(
    resolver: tf.distribute.cluster_resolver.TPUClusterResolver,
) -> tf.tpu.experimental.Topology:
    """Connects to a TPU and initializes it."""
    cluster = resolver.cluster_spec()
    for address in (address for job in cluster.jobs for address in cluster.job_tasks(job)):
        # TensorFlow itself waits without end for a worker that does not answer.
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), port), _ANSWER_SECONDS).close()
        except OSError as error:
            raise ConnectionError(f"{address} does not answer ({error})") from error
    tf.config.experimental_connect_to_cluster(resolver)
    return tf.tpu.experimental.initialize_tpu_system(resolver)


def _no_tpu(resolver: object, error: Exception) -> str:
    name = os.environ.get("TPU_NAME")
    if resolver is not None:
        looked_for = "the TPU of the resolver"
    elif name:
        looked_for = f"the TPU that TPU_NAME names, {name!r}"
    else:
        looked_for = "a TPU in this machine, because TPU_NAME is not set"
    cause = str(error).partition("\n")[0]
    return (
        f"No TPU can be used. Looked for: {looked_for}. What came back: {cause}. In a machine with "
        "a TPU, install the TensorFlow that is built for it (tensorflow-tpu). For a TPU elsewhere, "
        "set TPU_NAME to its name or grpc://host:port, or pass a "
        "tf.distribute.cluster_resolver.TPUClusterResolver. Without one, use MeshStrategy."
    )
