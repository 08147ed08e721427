"""A mesh over the devices of several processes, on one machine or many."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import devices
from llmos_tf.coordination import Agreement
from llmos_tf.coordination.tf_config import addresses_problem, tf_config_problem
from llmos_tf.coordination.watch import Watch
from llmos_tf.devices import CONNECT_TIMEOUT, connect_workers
from llmos_tf.mesh import Mesh
from llmos_tf.strategies.keras_patches.fit_agreement import hook_agreement
from llmos_tf.strategies.keras_patches.saving import hook_files
from llmos_tf.strategies.mesh import MeshStrategy, mesh_over

# Seconds; as for the workers to start.
COLLECTIVE_TIMEOUT = devices.CONNECT_TIMEOUT
_EXAMPLE = (
    'TF_CONFIG=\'{"cluster": {"worker": ["host0:12345", "host1:12345"]}, '
    '"task": {"type": "worker", "index": 0}}\', with index 1 on the second host'
)


class MultiWorkerMeshStrategy(MeshStrategy):
    """Trains Keras models over the devices of several processes, with the weights of one device.

    Every process runs the same script on the same data; set up as for
    `tf.distribute.MultiWorkerMirroredStrategy`, by TF_CONFIG or a cluster resolver. It is made
    first thing in the script, because TensorFlow joins processes only before it starts its devices.

    Ranks count the devices of worker 0 first, then those of worker 1, and so on. The axes of a mesh
    lie on the ranks in the order pipe, data, fsdp, expert, context, tensor, of which the last are
    neighbours. So with two workers of four devices ``Mesh(data=2, tensor=4)`` keeps `tensor`, which
    communicates most, inside each worker, and `data` crosses. ``Mesh(data=2, fsdp=4)`` keeps `fsdp`
    inside, and in ``Mesh(fsdp=8)`` it crosses. A `tensor` axis that crosses works, slowly. Give
    ``Mesh(devices=[...])`` by full names for another order.

    What one device would do, each process does and sees: a `fit` on arrays, or on a dataset of
    global batches, of which every replica takes its rows; history, `evaluate` and `predict`.
    `model.save`, and Keras's callbacks, write files in process 0 only. `BackupAndRestore` and
    `load_model` read in every process, so that they need a disk that all see.

    The processes have the random state and the initial values of process 0, so a script needs no
    seed. But data that a script makes by itself has to be the same everywhere: seed
    `numpy.random.default_rng`. Workers that differ in their scripts are refused, and one that stops
    stops all (docs/workers.md).

    A worker's TensorFlow server listens on all interfaces of its machine, without authentication,
    whatever address TF_CONFIG gives. Close its port to others by a firewall or a network namespace.

    Args:
        mesh: the axes, over all devices of all workers; None for all of them on `data`.
        devices: full device names in rank order, for a mesh that names none; None for all.
        cluster_resolver: names the workers and this one, such as
            `tf.distribute.cluster_resolver.SlurmClusterResolver`; None reads TF_CONFIG.
        timeout: seconds to wait for the other workers to start.
        collective_timeout: seconds that a step, or an agreement before one, waits for the other
            workers before it fails with an error that names those that are missing; None waits for
            ever. The default of ten minutes allows for what a worker may do alone: compile its
            program, read slow input, run a callback.
        **options: as in `MeshStrategy`.

    Raises:
        ValueError: the cluster, the task or the mesh do not fit each other, or the workers were
            given unlike meshes or options. What `devices.connect_workers` raises comes beside it.

    Example:
        Two processes on one machine, which run ``train.py`` with
        ``strategy = MultiWorkerMeshStrategy()`` at its top::

            export CLUSTER='"cluster": {"worker": ["localhost:12345", "localhost:12346"]}'
            TF_CONFIG="{$CLUSTER, \\"task\\": {\\"type\\": \\"worker\\", \\"index\\": 0}}" \\
                python train.py &
            TF_CONFIG="{$CLUSTER, \\"task\\": {\\"type\\": \\"worker\\", \\"index\\": 1}}" \\
                python train.py

        On two hosts ``"worker": ["host0:12345", "host1:12345"]`` stands in both, and each host
        starts its own task.
    """

    def __init__(
        self,
        mesh: Mesh | None = None,
        *,
        devices: Sequence[str] | None = None,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None = None,
        timeout: float = CONNECT_TIMEOUT,
        collective_timeout: float | None = COLLECTIVE_TIMEOUT,
        **options: Any,
    ):
        if mesh is not None and not isinstance(mesh, Mesh):
            raise ValueError(
                "MultiWorkerMeshStrategy takes an llmos_tf.Mesh, such as Mesh(data=2), or None. "
                f"Received: {mesh!r}."
            )
        if cluster_resolver is None:
            cluster_resolver = _tf_config_resolver()
        workers, task = _workers_of(cluster_resolver)
        connect_workers({"worker": workers}, task, timeout)
        if devices is not None:
            mesh = mesh_over(mesh or Mesh(data=len(devices)), devices)
        super().__init__(_over_workers(mesh, len(workers)), **options)
        # `tf.distribute` shows it as `strategy.cluster_resolver`.
        self.extended._cluster_resolver = cluster_resolver
        # Made by all workers in the same order, so their names agree.
        name = f"strategy_{self.extended.collective_keys.first}"
        self.agreement = Agreement(name, collective_timeout)
        facts = {"mesh": repr(self.mesh), "TensorFlow": tf.__version__, "Keras": keras.__version__}
        facts |= {name: described(value) for name, value in options.items()}
        self.agreement.require_same("mesh, options and versions", facts)
        self.agreement.share_random_state()
        self.extended.agreement = self.agreement
        steps = self.extended.engine.count_steps()
        self.watch = Watch(self.agreement, steps.read, collective_timeout)
        hook_files()
        hook_agreement()

    @property
    def num_workers(self) -> int:
        """Number of processes."""
        return len({devices.process_of(device) for device in self.mesh.devices})


def described(option: Any) -> str:
    """Returns an option as all workers have it, without the addresses of objects.

    Args:
        option: value of an option.

    Returns:
        Its contents.
    """
    if isinstance(option, Mapping):
        axes = {key: getattr(value, "axes", value) for key, value in option.items()}
        return str({key: described(value) for key, value in axes.items()})
    return re.sub(r" at 0x[0-9a-f]+", "", repr(option))


def _tf_config_resolver() -> tf.distribute.cluster_resolver.ClusterResolver:
    """TF_CONFIG, checked: TensorFlow's errors about it do not name it."""
    text = os.environ.get("TF_CONFIG", "")
    if not text.strip():
        raise ValueError(
            "MultiWorkerMeshStrategy reads which workers there are, and which one this process "
            f"is, from the environment variable TF_CONFIG, which is not set. Set {_EXAMPLE}; or "
            "give cluster_resolver=. For the devices of one process take MeshStrategy."
        )
    problem = tf_config_problem(text)
    if problem:
        raise ValueError(f"TF_CONFIG {problem}. It is written like {_EXAMPLE}. Received: {text}")
    return tf.distribute.cluster_resolver.TFConfigClusterResolver()


def _workers_of(resolver: tf.distribute.cluster_resolver.ClusterResolver) -> tuple[list[str], int]:
    """Addresses of all workers, a chief first, and the index of this one."""
    spec = resolver.cluster_spec().as_dict()
    kind, index = resolver.task_type, resolver.task_id
    for job in ("chief", "worker"):
        problem = addresses_problem(job, spec.get(job, []))
        if problem:
            raise ValueError(f"The cluster {problem}. Received: cluster={spec}.")
    workers = [(job, i, a) for job in ("chief", "worker") for i, a in enumerate(spec.get(job, ()))]
    mine = [k for k, (job, i, _) in enumerate(workers) if (job, i) == (kind, index)]
    if not mine:
        known = ", ".join(f"{job} {i}" for job, i, _ in workers) or "none"
        raise ValueError(
            f"This process is the task {kind} {index} of the cluster, which is none of those that "
            f"train: {known}. Give each process the type and index of one of them, by TF_CONFIG or "
            "the cluster resolver (other jobs, such as evaluator and ps, have no part in a mesh). "
            f"Received: cluster={spec}."
        )
    return [address for _, _, address in workers], mine[0]


def _over_workers(mesh: Mesh | None, num_workers: int) -> Mesh:
    """The mesh over the devices of all workers."""
    everywhere = devices.cluster_devices()
    if mesh is None:
        return Mesh(data=len(everywhere), devices=everywhere)
    if mesh.devices is None and mesh.size == len(everywhere):
        return mesh.with_devices(everywhere)
    if mesh.devices is None:
        kind = tf.DeviceSpec.from_string(everywhere[0]).device_type
        raise ValueError(
            f"The mesh {mesh} has {mesh.size} devices, and the {num_workers} workers have "
            f"{len(everywhere)} {kind} devices, {len(devices.visible_devices())} of them here. "
            "Choose axes of that product, or name the devices: Mesh(..., devices=[...])."
        )
    mesh = devices.resolve(mesh)
    if len({devices.process_of(device) for device in mesh.devices}) < num_workers:
        raise ValueError(
            f"The mesh needs a device of each of the {num_workers} workers. Received: {mesh!r}."
        )
    return mesh
