"""Devices: list them, make virtual CPU devices, join a cluster of processes."""

import json
from collections.abc import Mapping, Sequence

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.mesh import Mesh


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
    """Returns the names of all devices to train on: the GPUs if there are any, else the CPUs."""
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return tuple(device.name for device in devices)


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
    spec = tf.DeviceSpec.from_string(device)
    return spec.job, spec.task


def connect_workers(cluster: Mapping[str, Sequence[str]], task: int) -> None:
    """Joins this process to others, so that collectives reach their devices.

    Every process calls it once, first thing, with the same cluster. Devices are then named
    ``/job:worker/replica:0/task:K/device:CPU:I``.

    Args:
        cluster: ``{"worker": ["host:port", ...]}``, as in TF_CONFIG.
        task: index of this process among the workers.

    Raises:
        ValueError: the cluster has no workers, or `task` is not one of them.
    """
    workers = list(cluster.get("worker", ()))
    if not 0 <= task < len(workers):
        raise ValueError(
            "A cluster is {'worker': ['host:port', ...]} and a task an index into it. "
            f"Received: cluster={json.dumps(dict(cluster))}, task={task}."
        )
    context = _internal.eager_context.context()
    context.configure_collective_ops(
        collective_leader="/job:worker/replica:0/task:0",
        device_filters=(f"/job:worker/task:{task}",),
    )
    server = _internal.ServerDef(
        cluster=tf.train.ClusterSpec({"worker": workers}).as_cluster_def(),
        default_session_config=context.config,
        job_name="worker",
        task_index=task,
        protocol="grpc",
    )
    context.enable_collective_ops(server)
    context.ensure_initialized()


def _this_process() -> tf.DeviceSpec:
    """The name that the devices of this process have in common."""
    spec = tf.DeviceSpec.from_string(tf.config.list_logical_devices("CPU")[0].name)
    # Outside a cluster TensorFlow lists devices without it, and shows them in variables with it.
    return tf.DeviceSpec(job=spec.job or "localhost", replica=0, task=spec.task or 0)


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
