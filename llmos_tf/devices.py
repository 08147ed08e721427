"""Devices: list them, make virtual CPU devices, join a cluster of processes."""

import contextlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.coordination.arrival import await_workers
from llmos_tf.mesh import Mesh

# Seconds: machines of a cluster may take minutes to start.
CONNECT_TIMEOUT = 600.0
# Seconds without a sign of life after which a process is taken for dead.
HEARTBEAT_TIMEOUT = 30


def configure_virtual_cpus(count: int) -> None:
    """Splits the CPU into `count` devices, to develop a many-device layout on one machine.

    Args:
        count: number of devices, named CPU:0 to CPU:count-1.

    Raises:
        ValueError: `count` is not a positive integer.
        RuntimeError: TensorFlow has started its devices already, with another count.

    Example:
        >>> llmos_tf.devices.configure_virtual_cpus(8)
    """
    if count < 1:
        raise ValueError(f"At least one virtual CPU device is needed. Received: {count}.")
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except RuntimeError as error:
        started = len(tf.config.list_logical_devices("CPU"))
        if started != count:
            raise RuntimeError(
                f"{count} virtual CPU devices were asked for, but TensorFlow has already started "
                f"with {started}. Call configure_virtual_cpus first thing in the program, before "
                "any tensor, variable or strategy is made."
            ) from error


def visible_devices() -> tuple[str, ...]:
    """Returns this process's devices to train on: the GPUs if there are any, else the CPUs."""
    own = [
        [device.name for device in tf.config.list_logical_devices(kind) if is_local(device.name)]
        for kind in ("GPU", "CPU")
    ]
    return tuple(own[0] or own[1])


def cluster_devices() -> tuple[str, ...]:
    """Returns the devices to train on of all processes, those of the first one first.

    Returns:
        Names of the GPUs if there are any, else of the CPUs.
    """
    found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    # TensorFlow lists the own ones first.
    return tuple(sorted((device.name for device in found), key=_place))


def resolve(mesh: Mesh) -> Mesh:
    """Returns the mesh with full device names, taking visible devices where it names none.

    Args:
        mesh: a mesh with or without devices.

    Returns:
        The mesh over fully named devices.

    Raises:
        ValueError: the mesh does not fit the visible devices.
    """
    if mesh.devices is not None:
        return mesh.with_devices([_full_name(device) for device in mesh.devices])
    visible = visible_devices()
    kind = tf.DeviceSpec.from_string(visible[0]).device_type
    if mesh.size > len(visible):
        raise ValueError(
            f"The mesh {mesh} needs {mesh.size} devices; {len(visible)} {kind} devices are "
            "visible. Choose smaller axes, or for development on one machine make virtual ones: "
            f"llmos_tf.devices.configure_virtual_cpus({mesh.size}), --virtual_devices={mesh.size} "
            "for the scripts."
        )
    return mesh.with_devices([_full_name(device) for device in visible[: mesh.size]])


def host(device: str | None = None) -> str:
    """Returns the full name of the device whose memory is that of the host.

    Args:
        device: a CPU device of this process; None for the first one.

    Returns:
        Its full name.

    Raises:
        ValueError: there is no such CPU device here.
    """
    own = [d.name for d in tf.config.list_logical_devices("CPU") if is_local(d.name)]
    names = {_full_name(name): name for name in own}
    wanted = _full_name(own[0] if device is None else device)
    if wanted not in names:
        raise ValueError(
            f"The host is a CPU device of this process: {', '.join(own)}. Received: {device!r}."
        )
    return wanted


def is_local(device: str) -> bool:
    """Returns whether a device belongs to this process.

    Args:
        device: full device name.

    Returns:
        False for the devices of other processes of a cluster.
    """
    here = _this_process()
    return process_of(device) == (here.job, here.task)


def process_of(device: str) -> tuple[str, int]:
    """Returns the process that a device belongs to.

    Args:
        device: full device name.

    Returns:
        Its job and task.
    """
    spec = _this_process().make_merged_spec(tf.DeviceSpec.from_string(device))
    return spec.job, spec.task


def connect_workers(
    cluster: Mapping[str, Sequence[str]], task: int, timeout: float = CONNECT_TIMEOUT
) -> None:
    """Joins this process to others, so that collectives reach their devices.

    Every process calls it once, first thing, with the same cluster; again with the same arguments
    it does nothing. Devices are then named ``/job:worker/replica:0/task:K/device:CPU:I``. When a
    process dies later, the others' collectives fail, within half a minute, instead of waiting.

    Args:
        cluster: ``{"worker": ["host:port", ...]}``, as in TF_CONFIG.
        task: index of this process among the workers.
        timeout: seconds to wait for the others to start.

    Raises:
        ValueError: the cluster has no workers, or `task` is not one of them.
        RuntimeError: TensorFlow has started its devices already, or joined another cluster; or the
            port of this process is taken.
        TimeoutError: some of the others did not start in time.
    """  # noqa: DOC502
    workers = list(cluster.get("worker", ()))
    if _has_joined(workers, task):
        return
    context = _internal.eager_context.context()
    _configure(context, task, len(workers))
    await_workers(workers, task, timeout)
    server = _internal.ServerDef(
        cluster=tf.train.ClusterSpec({"worker": workers}).as_cluster_def(),
        default_session_config=context.config,
        job_name="worker",
        task_index=task,
        protocol="grpc",
    )
    with _own_sigterm():
        context.enable_collective_ops(server)
        context.ensure_initialized()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keeps what SIGTERM does; the coordination service only notes it, and the process goes on."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _has_joined(workers: list[str], task: int) -> bool:
    """Whether this process has joined these already."""
    if not 0 <= task < len(workers):
        raise ValueError(
            "A cluster is {'worker': ['host:port', ...]} and a task an index into it. "
            f"Received: cluster={json.dumps({'worker': workers})}, task={task}."
        )
    joined = _internal.connected_cluster()
    if joined not in (None, (workers, task)):
        raise RuntimeError(
            f"This process has joined the workers {joined[0]} as task {joined[1]}. A process can "
            f"join one cluster only. Received: {workers}, task {task}."
        )
    return joined is not None


def _configure(context: Any, task: int, num_workers: int) -> None:
    """What has to be said before TensorFlow starts its devices."""
    leader = "/job:worker/replica:0/task:0"
    try:
        context.configure_collective_ops(
            collective_leader=leader, device_filters=(f"/job:worker/task:{task}",)
        )
    except RuntimeError as error:
        raise RuntimeError(
            "TensorFlow has already started its devices, and a process can join others only "
            "before that. Make the strategy (or call connect_workers) first thing in the program, "
            "before any tensor, variable, dataset, model or other strategy, and before "
            "tf.config.list_logical_devices. Seeds and virtual CPU devices may be set before."
        ) from error
    context.configure_coordination_service(
        "standalone",
        service_leader=leader,
        heartbeat_timeout_in_ms=HEARTBEAT_TIMEOUT * 1000,
        coordinated_jobs=[_internal.CoordinatedJob(name="worker", num_tasks=num_workers)],
    )


def _this_process() -> tf.DeviceSpec:
    """The name that the devices of this process have in common."""
    joined = _internal.connected_cluster()
    if joined is not None:
        return tf.DeviceSpec(job="worker", replica=0, task=joined[1])
    # TensorFlow lists devices without it, and shows them in variables with it.
    return tf.DeviceSpec(job="localhost", replica=0, task=0)


def _place(name: str) -> tuple[int, int]:
    """A device's process and its number there."""
    spec = tf.DeviceSpec.from_string(name)
    return spec.task or 0, spec.device_index


def _full_name(device: str) -> str:
    """CPU:1 or /cpu:1 to /job:.../device:CPU:1."""
    here = _this_process()

    def full(name: str) -> str:
        text = name if name.startswith("/") else f"/device:{name}"
        return here.make_merged_spec(tf.DeviceSpec.from_string(text)).to_string()

    known = {full(d.name) for d in tf.config.list_logical_devices()}
    name = full(device)
    if is_local(name) and name not in known:
        raise ValueError(
            f"There is no device {device!r}. The visible devices are: {', '.join(sorted(known))}."
        )
    return name
