"""Every private TensorFlow name that the project uses, with its reason."""

import itertools
from typing import Any

import tensorflow as tf

# The coordination service, by which processes notice that another has died, and agree on things.
from tensorflow.compiler.xla.tsl.protobuf.coordination_config_pb2 import CoordinatedJob

# The message that describes a process of a cluster; `tf.distribute.Server` starts its own server
# instead of joining the eager runtime to the cluster.
from tensorflow.core.protobuf.tensorflow_server_pb2 import ServerDef

# `tf.distribute` has no public base for a strategy that creates its own kind of variable or runs a
# program its own way: MirroredExtended is what MirroredStrategy keeps behind `.extended`.
# The type of per-replica values, which an iterator shows as its `element_spec`, has no public name.
from tensorflow.python.distribute import (
    distribute_lib,
    distribute_utils,
)
from tensorflow.python.distribute.mirrored_strategy import MirroredExtended
from tensorflow.python.distribute.values import (
    MirroredVariable,
    PerReplica,
    PerReplicaSpec,
    SyncOnReadVariable,
)

# `tf.config` can list and split devices, but only the context can join a cluster of processes for
# collectives (MultiWorkerMirroredStrategy does the same) or canonicalize a device's name.
from tensorflow.python.eager import context as eager_context

# `tf.GradientTape.stop_recording` needs the tape at hand; creating a variable inside a user's tape
# must not be recorded by it. No public function tells whether there is a tape at all.
from tensorflow.python.eager.record import could_possibly_record, stop_recording

# `tf.type_spec_from_value` is public; the base class of a user-defined CompositeTensor is not.
from tensorflow.python.framework.composite_tensor import CompositeTensor

# `tf.Variable` goes through the creators of the scope that is entered, and makes a variable of the
# mesh there; an exported model has plain ones.
# A variable that has a handle and no memory stands for one of the mesh in a trace for one device.
from tensorflow.python.ops.resource_variable_ops import ResourceVariable, UninitializedVariable
from tensorflow.python.types.distribute import (
    DistributedDatasetInterface,
    DistributedIteratorInterface,
)

__all__ = [
    "CompositeTensor",
    "CoordinatedJob",
    "DistributedDataset",
    "DistributedIteratorInterface",
    "MirroredExtended",
    "MirroredVariable",
    "PerReplica",
    "PerReplicaSpec",
    "ReplicaContext",
    "ResourceVariable",
    "ServerDef",
    "SyncOnReadVariable",
    "connected_cluster",
    "could_possibly_record",
    "default_strategy",
    "eager_context",
    "in_synced_reads",
    "is_without_memory",
    "lost_workers",
    "op_seeds",
    "regroup",
    "rename",
    "reserve_collective_keys",
    "select_replica",
    "stop_recording",
    "synced_reads",
    "variable_without_memory",
]

# `fit` knows a distributed dataset by the name and the module of one of its base classes.
DistributedDataset = type(
    "DistributedDataset",
    (DistributedDatasetInterface,),
    {"__module__": "tensorflow.python.distribute.input_lib"},
)

ReplicaContext = distribute_lib.ReplicaContext
regroup = distribute_utils.regroup
select_replica = distribute_utils.select_replica

# Reads of metric variables in a replica are summed over replicas while this is entered.
synced_reads = distribute_lib.variable_sync_on_read_context
in_synced_reads = distribute_lib.in_variable_sync_on_read_context
# TensorFlow identifies a group of collective ops by an integer that is global to the process, and
# a cluster needs the same integers in the same order everywhere. Every strategy takes a block of
# its own, so that two strategies of one process never meet (DESIGN: fact 9).
_COLLECTIVE_KEY_BLOCKS = itertools.count(1 << 18, 1 << 18)


def default_strategy() -> Any:
    """Returns the strategy of code that is under no strategy's scope, which has no public name."""
    return distribute_lib._get_default_strategy()


def variable_without_memory(like: tf.Variable) -> tf.Variable:
    """Returns a variable of the shape, type and name of another one that holds nothing."""
    with tf.init_scope(), tf.device("CPU:0"):
        return UninitializedVariable(
            trainable=like.trainable,
            shape=like.shape,
            dtype=like.dtype,
            name=like.name.split(":")[0],
        )


def is_without_memory(variable: tf.Variable) -> bool:
    """Returns whether a variable was made by `variable_without_memory`."""
    return isinstance(variable, UninitializedVariable)


def reserve_collective_keys() -> int:
    """Returns the first of 2**18 collective group keys that no other strategy uses."""
    return next(_COLLECTIVE_KEY_BLOCKS)


def connected_cluster() -> tuple[list[str], int] | None:
    """Returns the addresses of the processes this one has joined and its index, or None."""
    server = eager_context.context()._collective_ops_server_def
    if server is None:
        return None
    (job,) = server.cluster.job
    return [job.tasks[task] for task in sorted(job.tasks)], server.task_index


def lost_workers(count: int) -> list[int]:
    """Returns which of the processes of a cluster the coordination service has lost."""
    states = eager_context.context().get_task_states([("worker", count)])
    return [task for task, state in enumerate(states) if state is not None]


def op_seeds() -> Any:
    """Returns the generator by which TensorFlow gives eager ops their seeds, a `random.Random`."""
    return eager_context.context()._rng


def rename(variable: tf.Variable, name: str) -> None:
    """Gives another name to a variable that is made; in public it has the one it was made by."""
    variable._handle_name = f"{name}:0"
