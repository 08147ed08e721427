"""Strategies: the classes, their options, and the order of devices."""

import functools

import pytest
import tensorflow as tf
from small_strategies import local

from llmos_tf import collectives
from llmos_tf.mesh import Mesh
from llmos_tf.strategies import (
    DataParallelStrategy,
    MeshStrategy,
    PipelineParallelStrategy,
    TensorParallelStrategy,
    ZeroStrategy,
)

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("make", "sizes", "replicas"),
    [
        (lambda: MeshStrategy(Mesh()), {}, 1),
        (lambda: DataParallelStrategy(), {"data": 8}, 8),
        (lambda: DataParallelStrategy(["CPU:2", "/cpu:0"]), {"data": 2}, 2),
        (lambda: ZeroStrategy(1), {"data": 8}, 8),
        (lambda: ZeroStrategy(2, ["CPU:1"]), {}, 1),
        (lambda: ZeroStrategy(3, ["CPU:0", "CPU:1"]), {"fsdp": 2}, 2),
        (lambda: TensorParallelStrategy(), {"tensor": 8}, 1),
        (lambda: TensorParallelStrategy(["CPU:4"], sequence_parallel=True), {}, 1),
        (lambda: MeshStrategy(Mesh(data=2, fsdp=2, tensor=2)), {"data": 2, "fsdp": 2}, 4),
        (lambda: MeshStrategy(Mesh(data=2), devices=["CPU:5", "CPU:3"]), {"data": 2}, 2),
    ],
)
def test_the_classes(make, sizes, replicas):
    """Catches a class whose devices lie on another axis, or that counts ranks as replicas."""
    strategy = make()
    assert isinstance(strategy, tf.distribute.MirroredStrategy)
    assert isinstance(strategy, MeshStrategy)
    assert strategy.mesh.sizes.items() >= sizes.items()
    assert strategy.mesh.batch_ways == strategy.num_replicas_in_sync == replicas


def test_devices_keep_their_order_and_get_full_names():
    """Catches a rank on another device than the user's list says."""
    prefix = "/job:localhost/replica:0/task:0/device:CPU"
    names = ["CPU:5", "/cpu:2", "/device:CPU:7", f"{prefix}:1"]
    strategy = DataParallelStrategy(names)
    assert strategy.mesh.devices == tuple(f"{prefix}:{i}" for i in (5, 2, 7, 1))
    assert strategy.extended.worker_devices == strategy.mesh.devices
    with strategy.scope():
        variable = tf.Variable(0.0)
    assert tuple(c.device for c in variable.values) == strategy.mesh.devices
    assert MeshStrategy(Mesh(data=4), devices=names).mesh.devices == strategy.mesh.devices
    default = MeshStrategy(Mesh(data=2)).mesh.devices
    assert default == (f"{prefix}:0", f"{prefix}:1")


@pytest.mark.parametrize(
    "make",
    [
        DataParallelStrategy,
        functools.partial(ZeroStrategy, 1),
        TensorParallelStrategy,
        PipelineParallelStrategy,
    ],
)
def test_every_strategy_takes_the_options_of_a_mesh(make):
    """Fails if an option is known to MeshStrategy only, or is taken and forgotten."""
    strategy = make(devices=["CPU:0", "CPU:1"], rematerialise="block")
    assert strategy.extended.options.rematerialise == "block"
    with pytest.raises(TypeError, match="rematerialize"):
        make(devices=["CPU:0", "CPU:1"], rematerialize="block")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: MeshStrategy("data=2"), "takes an llmos_tf.Mesh, such as Mesh(data=2)"),
        (lambda: MeshStrategy(Mesh(data=9)), "needs 9 devices; 8 CPU devices are visible"),
        (lambda: MeshStrategy(Mesh(devices=["CPU:8"])), "There is no device 'CPU:8'"),
        (
            lambda: MeshStrategy(Mesh(devices=["CPU:1"]), devices=["CPU:0"]),
            "Give the devices once, to the mesh or to the strategy",
        ),
        (lambda: MeshStrategy(Mesh(data=2), devices=["CPU:0"]), "needs 2 devices"),
        (lambda: DataParallelStrategy(["CPU:0", "CPU:0"]), "in a mesh only once"),
        (lambda: DataParallelStrategy(["CPU:1", "/cpu:1"]), "in a mesh only once"),
        (lambda: DataParallelStrategy([]), "Received: data=0"),
        (lambda: MeshStrategy(Mesh(data=2), zero_stage=4), "zero_stage is 0, 1, 2 or 3"),
        (lambda: MeshStrategy(Mesh(fsdp=2), zero_stage=1), "along the data axis"),
        (lambda: MeshStrategy(Mesh(tensor=2), zero_stage=2), "in the mesh tensor=2"),
        (lambda: MeshStrategy(Mesh(data=2), zero_stage=3), "Mesh(fsdp=...)"),
        (lambda: ZeroStrategy(0), "stage 0 is DataParallelStrategy"),
        (lambda: ZeroStrategy(4), "Received: stage=4"),
        (lambda: MeshStrategy(Mesh(data=2), sequence_parallel=True), "Give a tensor axis"),
    ],
)
def test_a_misuse_is_named(make, named):
    """Catches an option that is ignored, or that fails deep inside TensorFlow."""
    with pytest.raises(ValueError, match=r"Received|visible|in the mesh|only once") as error:
        make()
    assert named in str(error.value)


def test_devices_in_any_order():
    """Catches members of a group in the order of their devices' names and not of the mesh.

    TensorFlow orders them so: by number, CPU:2 before CPU:10.
    """
    strategy = MeshStrategy(Mesh(data=2, tensor=2, devices=["CPU:3", "CPU:1", "CPU:0", "CPU:2"]))
    everywhere = ("data", "tensor")

    def program():
        rank = collectives.axis_index(everywhere)
        parts = 10 * rank + tf.range(4)
        found = {
            "gather": collectives.all_gather(rank[tf.newaxis], everywhere),
            "along tensor": collectives.all_gather(rank[tf.newaxis], "tensor"),
            "exchange": collectives.all_to_all(parts, everywhere),
            "scatter": collectives.reduce_scatter(parts, everywhere),
            "permute": collectives.permute(rank[tf.newaxis], everywhere),
            "broadcast": collectives.broadcast(rank[tf.newaxis], everywhere, root=1),
        }
        return {k: collectives.all_gather(v[tf.newaxis], everywhere) for k, v in found.items()}

    results = {k: local(strategy, v)[0] for k, v in strategy.run(program).items()}
    assert results == {
        "gather": [[0, 1, 2, 3]] * 4,
        "along tensor": [[0, 1], [0, 1], [2, 3], [2, 3]],
        "exchange": [[j, 10 + j, 20 + j, 30 + j] for j in range(4)],
        "scatter": [[60 + 4 * j] for j in range(4)],
        "permute": [[3], [0], [1], [2]],
        "broadcast": [[1]] * 4,
    }
