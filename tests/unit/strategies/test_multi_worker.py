"""`MultiWorkerMeshStrategy` in one process: what is wrong with a cluster is said at once.

What it does over two processes is in tests/multiprocess.
"""

import json
import socket
import time

import pytest
import tensorflow as tf

from llmos_tf import Mesh, devices
from llmos_tf.strategies import MultiWorkerMeshStrategy
from llmos_tf.strategies.multi_worker import _workers_of

pytestmark = pytest.mark.fast

CLUSTER = {"worker": ["localhost:1", "localhost:2"]}


def resolver(cluster, kind, index):
    spec = tf.train.ClusterSpec(cluster)
    return tf.distribute.cluster_resolver.SimpleClusterResolver(spec, "", kind, index)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "TF_CONFIG, which is not set"),
        ("{'cluster': 1}", "TF_CONFIG is no JSON"),
        ("[]", "needs a cluster and a task"),
        (json.dumps({"cluster": CLUSTER}), "needs a cluster and a task"),
        (
            json.dumps({"cluster": CLUSTER, "task": {"type": "worker"}}),
            "needs a cluster and a task",
        ),
        (json.dumps({"task": {"type": "worker", "index": 0}}), "needs a cluster and a task"),
        (
            json.dumps({"cluster": CLUSTER, "task": {"type": "worker", "index": 2}}),
            "the task worker 2 of the cluster.*worker 0, worker 1",
        ),
        (
            json.dumps({"cluster": CLUSTER, "task": {"type": "evaluator", "index": 0}}),
            "the task evaluator 0 of the cluster",
        ),
    ],
)
def test_a_wrong_tf_config(monkeypatch, config, words):
    """Fails if a wrong TF_CONFIG is taken, or ends in an error that does not name it."""
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match=words):
        MultiWorkerMeshStrategy(Mesh(data=2))


def test_no_mesh():
    """Fails if another thing than a mesh is found out only once all workers are there."""
    with pytest.raises(ValueError, match=r"takes an llmos_tf\.Mesh.*Received: 4"):
        MultiWorkerMeshStrategy(4)


def test_a_cluster_resolver():
    """Fails if a resolver is not asked, or a chief is not the first worker."""
    cluster = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}
    assert _workers_of(resolver(cluster, "chief", 0)) == (["a:1", "b:1", "c:1"], 0)
    assert _workers_of(resolver(cluster, "worker", 1)) == (["a:1", "b:1", "c:1"], 2)
    with pytest.raises(ValueError, match="chief 0, worker 0, worker 1"):
        MultiWorkerMeshStrategy(cluster_resolver=resolver(cluster, "ps", 0))


def test_devices_that_have_started():
    """Fails if TensorFlow's own error, which does not say what to do, reaches the user."""
    tf.constant(0)
    with pytest.raises(RuntimeError, match="first thing in the program"):
        MultiWorkerMeshStrategy(Mesh(data=2), cluster_resolver=resolver(CLUSTER, "worker", 0))


def addresses(count):
    """Addresses of this machine where nobody listens."""
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return [f"localhost:{port}" for port in ports]


def listening(address):
    return socket.create_server(("", int(address.partition(":")[2])))


def test_a_worker_that_does_not_start():
    """Fails if a missing worker is waited for without end, or is not named."""
    workers = addresses(3)
    start = time.monotonic()
    with listening(workers[1]), pytest.raises(TimeoutError) as error:
        devices._await_workers(workers, 0, 0.5)
    assert time.monotonic() - start < 5
    assert f"the workers 2 ({workers[2]}), which" in str(error.value)


def test_workers_that_start():
    """Fails if workers that are there are not seen."""
    workers = addresses(2)
    with listening(workers[1]):
        devices._await_workers(workers, 0, 30)


def test_a_port_that_is_taken():
    """Fails if a process takes another program's port for its own."""
    (worker,) = addresses(1)
    words = f"cannot listen at its address {worker}"
    with listening(worker), pytest.raises(RuntimeError, match=words):
        devices._await_workers([worker], 0, 1)
