"""The TPU strategy without a TPU: graphs that are built and not run, refusals, and no hang."""

import doctest
import itertools
import math
import socket
import time

import numpy as np
import pytest
import tensorflow as tf

from llmos_tf.mesh import Mesh
from llmos_tf.strategies import TPUMeshStrategy
from llmos_tf.strategies.tpu import device_assignment, partition_dimensions

pytestmark = pytest.mark.fast

V3_8 = (2, 2, 1, 2)
V3_32 = (4, 4, 1, 2)


def topology_of(shape):
    """A slice with eight cores a host."""
    cores = np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), axis=1)
    return tf.tpu.experimental.Topology(
        mesh_shape=shape, device_coordinates=cores.reshape(-1, 8, 4)
    )


def test_layouts_as_partition_dimensions():
    """Catches the sizes of two dimensions exchanged, or an axis of size 1 that is refused."""
    for layout, mesh, dims in [
        ((None, "tensor"), Mesh(data=2, tensor=4), [1, 4]),
        (("tensor", None, None), Mesh(tensor=2), [2, 1, 1]),
        ((None, None), Mesh(tensor=4), [1, 1]),
        ((), Mesh(tensor=4), []),
        ((None, "context", "tensor"), Mesh(data=2, context=2, tensor=4), [1, 2, 4]),
        (("expert", None, "tensor"), Mesh(expert=3, tensor=2), [3, 1, 2]),
        # An axis of size 1 splits nothing, whichever it is.
        (("data", "context", "tensor"), Mesh(tensor=4), [1, 1, 4]),
    ]:
        assert partition_dimensions(layout, mesh) == dims


@pytest.mark.parametrize(
    ("layout", "mesh", "said"),
    [
        ((None, "tensor"), Mesh(context=2, tensor=4), "Name each of context, tensor once"),
        (("tensor", "context"), Mesh(context=2, tensor=4), "in this order"),
        (("tensor", "tensor"), Mesh(tensor=2), r"Received: the layout \('tensor', 'tensor'\)"),
        (("data", "tensor"), Mesh(data=2, tensor=4), "Write None for that dimension"),
        ((None, "fsdp"), Mesh(fsdp=2), "Write None"),
        ((None, "model"), Mesh(tensor=2), "Received: 'model'"),
    ],
)
def test_layouts_that_tpu_strategy_cannot_express(layout, mesh, said):
    """Catches a layout that puts parts on other cores than the mesh says, or nowhere."""
    with pytest.raises(ValueError, match=said):
        partition_dimensions(layout, mesh)


class ConstructedTPU(tf.distribute.cluster_resolver.TPUClusterResolver):
    """Names the devices of a topology, as a TPU's metadata does."""

    def __init__(self, topology):
        super().__init__("local")
        self.topology = topology

    def get_tpu_system_metadata(self):
        hosts, per_host = self.topology.num_tasks, self.topology.num_tpus_per_task
        devices = [
            tf.config.LogicalDevice(f"/job:worker/replica:0/task:{host}/device:TPU:{i}", "TPU")
            for host, i in itertools.product(range(hosts), range(per_host))
        ]
        return tf.tpu.experimental.TPUSystemMetadata(
            num_cores=hosts * per_host,
            num_hosts=hosts,
            num_of_cores_per_host=per_host,
            topology=self.topology,
            devices=devices,
        )


def strategy_of(mesh, shape, **options):
    topology = topology_of(shape)
    return TPUMeshStrategy(mesh, ConstructedTPU(topology), topology=topology, **options)


@pytest.fixture
def no_start(monkeypatch):
    """Starting a TPU is an error."""

    def fail(resolver):
        raise AssertionError(f"{resolver} was started")

    monkeypatch.setattr(tf.config, "experimental_connect_to_cluster", fail)
    monkeypatch.setattr(tf.tpu.experimental, "initialize_tpu_system", fail)


def test_a_strategy_places_ranks_where_the_mesh_says(no_start):
    """Catches replicas or logical cores counted otherwise than ranks, or a TPU started twice."""
    mesh = Mesh(data=4, context=2, tensor=4)
    strategy = strategy_of(mesh, V3_32, replicate_variables=True)
    topology = strategy.cluster_resolver.topology
    assert isinstance(strategy, tf.distribute.TPUStrategy)
    assert strategy.num_replicas_in_sync == mesh.batch_ways == 4
    assert strategy.mesh.sizes == mesh.sizes
    assignment = device_assignment(mesh, topology)
    for rank in range(mesh.size):
        where = mesh.coordinate(rank)
        name = assignment.tpu_device(where["data"], 4 * where["context"] + where["tensor"])
        assert strategy.mesh.devices[rank] == f"/job:worker/replica:0{name}"
    assert len(set(strategy.mesh.devices)) == 32


def traced(strategy, fn):
    """The ops of a step, by type, as TensorFlow builds it for a TPU."""

    @tf.function(autograph=False)
    def step():
        return strategy.run(fn)

    graph = step.get_concrete_function().graph
    return {
        kind: list(ops)
        for kind, ops in itertools.groupby(
            sorted(graph.get_operations(), key=lambda op: op.type), key=lambda op: op.type
        )
    }


def test_a_step_is_built_with_the_placement_and_the_split(no_start):
    """Catches a placement that does not reach the TPU program, or parts in another order."""
    mesh = Mesh(data=4, context=2, tensor=4)
    strategy = strategy_of(mesh, V3_32, replicate_variables=True)

    def step():
        x = strategy.split(tf.ones((8, 3, 12)), ("context", None, "tensor"))
        return strategy.split(tf.reduce_sum(x), ())

    ops = traced(strategy, step)
    (meta,) = ops["TPUReplicateMetadata"]
    assert meta.get_attr("num_replicas") == 4
    assert meta.get_attr("num_cores_per_replica") == 8
    assert meta.get_attr("use_spmd_for_xla_partitioning")
    topology = strategy.cluster_resolver.topology
    cores = device_assignment(mesh, topology).core_assignment
    assert list(meta.get_attr("device_assignment")) == cores.ravel().tolist()
    split, replicated = (op.get_attr("sharding") for op in ops["XlaSharding"])
    # OpSharding: type (field 1) 3 is tiled, then the ways of each dimension (3), then the
    # logical core of each part (4).
    assert split == bytes([0x08, 3, 0x1A, 3, 2, 1, 4, 0x22, 8, *range(8)])
    assert replicated == b""


def test_data_alone_needs_no_partitioner(no_start):
    """Catches the partitioner and its other variable class on where nothing is partitioned."""
    strategy = strategy_of(Mesh(data=8), V3_8)

    def step():
        return tf.ones(())

    (meta,) = traced(strategy, step)["TPUReplicateMetadata"]
    assert not meta.get_attr("use_spmd_for_xla_partitioning")
    assert meta.get_attr("num_replicas") == strategy.num_replicas_in_sync == 8


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (("tensor",), r"the layout \('tensor',\) for a tensor of shape \(4, 6\)"),
        ((None,), r"the layout \(None,\) for a tensor of shape \(4, 6\)"),
        ((None, "tensor"), "divisible"),
    ],
)
def test_a_split_that_does_not_fit_the_tensor(no_start, layout, said):
    """Catches an annotation on another dimension than meant, or one that cuts unevenly."""
    strategy = strategy_of(Mesh(data=2, tensor=4), V3_8, replicate_variables=True)

    def step():
        return strategy.split(tf.ones((4, 6)), layout)

    with pytest.raises(ValueError, match=said):
        traced(strategy, step)


@pytest.mark.parametrize(
    ("mesh", "options", "said"),
    [
        (Mesh(fsdp=8), {}, "fsdp=8. Name these ways to split the batch data"),
        (Mesh(fsdp=8), {"replicate_variables": True}, "whole on each replica"),
        (Mesh(pipe=2, data=4), {"replicate_variables": True}, "no pipeline stages"),
        (Mesh(data=4, tensor=2), {}, "so tensor would split.*replicate_variables=True if"),
        (Mesh(expert=2, context=4), {}, "so expert, context would split"),
        (Mesh(data=16), {}, "needs 16 cores"),
        (Mesh(data=8, devices=[f"TPU:{i}" for i in range(8)]), {}, "Leave devices out"),
        ("data=8", {}, "Received: 'data=8'"),
    ],
)
def test_what_a_tpu_cannot_honour_is_refused(no_start, mesh, options, said):
    """Catches variables that are replicated in silence where the mesh says that they are cut."""
    with pytest.raises(ValueError, match=said):
        strategy_of(mesh, V3_8, **options)


def test_a_resolver_or_topology_of_another_kind_is_named(no_start):
    """Catches a TPU's name taken for a resolver, which fails far inside TensorFlow."""
    with pytest.raises(ValueError, match=r"TPUClusterResolver\('my-tpu'\)\. Received: 'my-tpu'"):
        TPUMeshStrategy(Mesh(data=8), "my-tpu")
    topology = topology_of(V3_8)
    with pytest.raises(ValueError, match="Received: 8"):
        TPUMeshStrategy(Mesh(data=8), ConstructedTPU(topology), topology=8)


def test_a_tpu_is_connected_and_initialized_once(monkeypatch):
    """Catches a system that is initialized before it is connected, or a mesh checked after."""
    calls = []
    topology = topology_of(V3_8)

    def initialize(resolver):
        calls.append(("initialize", resolver))
        return topology

    monkeypatch.setattr(
        tf.config, "experimental_connect_to_cluster", lambda r: calls.append(("connect", r))
    )
    monkeypatch.setattr(tf.tpu.experimental, "initialize_tpu_system", initialize)
    resolver = ConstructedTPU(topology)
    strategy = TPUMeshStrategy(Mesh(data=8), resolver)
    assert calls == [("connect", resolver), ("initialize", resolver)]
    assert strategy.cluster_resolver is resolver
    with pytest.raises(ValueError, match="fsdp"):
        TPUMeshStrategy(Mesh(fsdp=8), resolver)
    assert len(calls) == 2


def test_without_a_tpu_the_error_says_what_to_do(monkeypatch):
    """Catches a raw error of TensorFlow about a missing kernel."""
    monkeypatch.delenv("TPU_NAME", raising=False)
    start = time.monotonic()
    with pytest.raises(
        RuntimeError, match="a TPU in this machine, because TPU_NAME is not"
    ) as error:
        TPUMeshStrategy(Mesh(data=8))
    assert time.monotonic() - start < 20
    for way_out in ("tensorflow-tpu", "TPU_NAME to its name", "TPUClusterResolver", "MeshStrategy"):
        assert way_out in str(error.value)
    assert "\n" not in str(error.value)


def test_a_worker_that_is_not_there_is_named(monkeypatch, no_start):
    """Catches TensorFlow called for a worker that is not there, for which it waits without end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("TPU_NAME", f"grpc://{address}")
    with pytest.raises(
        RuntimeError, match=f"that TPU_NAME names, 'grpc://{address}'.*{address} does"
    ):
        TPUMeshStrategy(Mesh(data=8))
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver(f"grpc://{address}")
    with pytest.raises(RuntimeError, match=f"the TPU of the resolver.*{address} does not answer"):
        TPUMeshStrategy(Mesh(data=8), resolver)


def test_a_worker_is_waited_for_only_seconds(monkeypatch, no_start):
    """Catches a wait without end for an address that swallows what is sent to it."""
    asked = []

    def swallow(address, timeout=None):
        asked.append((address, timeout))
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", swallow)
    resolver = tf.distribute.cluster_resolver.TPUClusterResolver("grpc://10.1.2.3:8470")
    with pytest.raises(RuntimeError, match=r"10\.1\.2\.3:8470 does not answer \(timed out\)"):
        TPUMeshStrategy(Mesh(data=8), resolver)
    ((address, timeout),) = asked
    assert address == ("10.1.2.3", "8470")
    assert 0 < timeout <= 10


def test_a_name_that_cannot_be_looked_up_is_named(monkeypatch):
    """Catches an error of urllib outside of Google's cloud for a TPU that is given by name."""

    def unknown(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unknown)
    monkeypatch.setenv("TPU_NAME", "my-tpu")
    with pytest.raises(RuntimeError, match=r"names, 'my-tpu'.*Name or service not known"):
        TPUMeshStrategy(Mesh(data=8))


def test_examples():
    """Catches a docstring that no longer says what happens."""
    runner = doctest.DocTestRunner()
    names = {"Mesh": Mesh, "partition_dimensions": partition_dimensions}
    for example in doctest.DocTestFinder().find(partition_dimensions, globs=names):
        runner.run(example)
    assert runner.summarize(verbose=False) == (0, 1)
