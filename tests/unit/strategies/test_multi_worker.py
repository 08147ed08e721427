"""`MultiWorkerMeshStrategy` in one process: what is wrong with a cluster is said at once.

What it does over two processes is in tests/multiprocess.
"""

import json
import socket
import time

import keras
import pytest
import tensorflow as tf

from llmos_tf import Mesh
from llmos_tf.coordination import arrival
from llmos_tf.strategies import MultiWorkerMeshStrategy
from llmos_tf.strategies.multi_worker import _workers_of, described

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


TASK = {"type": "worker", "index": 0}


@pytest.mark.parametrize(
    ("cluster", "task", "words"),
    [
        ([], TASK, "its cluster must map jobs"),
        ({}, TASK, "its cluster must map jobs"),
        ({"worker": "localhost:1"}, TASK, "a list of addresses host:port for the job 'worker'"),
        ({"worker": {"0": "localhost:1"}}, TASK, "a list of addresses"),
        ({"worker": []}, TASK, "needs addresses of the job 'worker'"),
        ({"workers": ["localhost:1"]}, TASK, "its jobs are 'workers'"),
        ({"worker": [1234]}, TASK, "worker 0 at 1234"),
        ({"worker": [None]}, TASK, "worker 0 at None"),
        ({"worker": ["localhost"]}, TASK, "worker 0 at 'localhost', which must be host:port"),
        ({"worker": ["localhost:"]}, TASK, "whose port"),
        ({"worker": [":1234"]}, TASK, "which must be host:port"),
        ({"worker": ["localhost:port"]}, TASK, "whose port must be from 1 to 65535"),
        ({"worker": ["localhost:0"]}, TASK, "whose port"),
        ({"worker": ["localhost:65536"]}, TASK, "whose port"),
        ({"worker": ["localhost:-1"]}, TASK, "whose port"),
        ({"worker": ["grpc://localhost:1"]}, TASK, "which must be host:port"),
        ({"worker": [" localhost:1"]}, TASK, "which must be host:port"),
        ({"worker": ["::1:1234"]}, TASK, r"written \[address\]:port"),
        ({"worker": ["localhost:1", "localhost:1"]}, TASK, "address localhost:1 twice"),
        ({"chief": ["a:1", "b:1"], "worker": ["c:1"]}, TASK, "more than one chief"),
        ({"worker": ["a:1"], "ps": ["b"]}, TASK, "ps 0 at 'b'"),
        (CLUSTER, "worker", "a task with its type and index"),
        (CLUSTER, {"type": 3, "index": 0}, "type must be a string"),
        (CLUSTER, {"type": "worker", "index": -1}, "index must be a number from 0"),
        (CLUSTER, {"type": "worker", "index": 1.5}, "index must be a number from 0"),
        (CLUSTER, {"type": "worker", "index": True}, "index must be a number from 0"),
        (CLUSTER, {"type": "worker", "index": None}, "index must be a number from 0"),
        (CLUSTER, {"type": "worker", "index": "one"}, "index must be a number from 0"),
        (CLUSTER, {"type": "", "index": 0}, "TF_CONFIG.*cluster="),
        (CLUSTER, {"type": "chief", "index": 0}, "TF_CONFIG.*cluster="),
        (CLUSTER, {"type": "worker", "index": "7"}, "TF_CONFIG.*cluster="),
    ],
)
def test_a_malformed_tf_config(monkeypatch, cluster, task, words):
    """Fails if a malformed TF_CONFIG ends in an error that does not name it."""
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": task}))
    with pytest.raises(ValueError, match=words) as error:
        MultiWorkerMeshStrategy()
    assert "TF_CONFIG" in str(error.value)


def test_another_rpc_layer(monkeypatch):
    """Fails if a protocol is asked for that is not the one that is used."""
    config = {"cluster": CLUSTER, "task": TASK, "rpc_layer": "grpc+verbs"}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(ValueError, match="TF_CONFIG names the rpc_layer"):
        MultiWorkerMeshStrategy()


def test_options_are_compared_by_their_contents():
    """Fails if two objects of the same contents are taken for unlike options."""

    def layouts():
        mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), ["cpu:0"] * 2)
        layout_map = keras.distribution.LayoutMap(mesh)
        layout_map["kernel"] = (None, "model")
        return layout_map

    assert described(layouts()) == described(layouts()) == "{'kernel': \"(None, 'model')\"}"
    assert described(object()) == described(object())
    assert described({"a": ("tensor",)}) != described({"a": (None,)})


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


def test_a_worker_that_does_not_start(monkeypatch, caplog):
    """Fails if a missing worker is waited for without end or a word, or is not named."""
    monkeypatch.setattr(arrival, "FIRST_NOTICE", 0.1)
    workers = addresses(3)
    start = time.monotonic()
    with listening(workers[1]), pytest.raises(TimeoutError) as error:
        arrival.await_workers(workers, 0, 0.5)
    assert time.monotonic() - start < 5
    assert f"the workers 2 ({workers[2]}), which" in str(error.value)
    (notice,) = caplog.messages
    assert f"Worker 0 ({workers[0]}) is waiting for worker 2 ({workers[2]})" in notice


def test_workers_that_start():
    """Fails if workers that are there are not seen."""
    workers = addresses(2)
    with listening(workers[1]):
        arrival.await_workers(workers, 0, 30)


def test_a_port_that_is_taken():
    """Fails if a process takes another program's port for its own."""
    (worker,) = addresses(1)
    words = f"cannot listen at its address {worker}"
    with listening(worker), pytest.raises(RuntimeError, match=words):
        arrival.await_workers([worker], 0, 1)
