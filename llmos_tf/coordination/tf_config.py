"""What is wrong with a TF_CONFIG, in words that a user of it can act on."""

import json
from typing import Any

_PORTS = range(1, 1 << 16)


def tf_config_problem(text: str) -> str:
    """Returns what is wrong with a TF_CONFIG.

    Args:
        text: its value, not empty.

    Returns:
        A clause that continues "TF_CONFIG"; empty where nothing is wrong.
    """
    try:
        config = json.loads(text)
    except ValueError as error:
        return f"is no JSON: {error}"
    if not isinstance(config, dict):
        return "needs a cluster and a task in a JSON object"
    layer = config.get("rpc_layer", "grpc")
    if layer not in ("grpc", ""):
        return f"names the rpc_layer {layer!r}, and only grpc is supported"
    return _cluster_problem(config.get("cluster")) or _task_problem(config.get("task"))


def addresses_problem(job: str, addresses: Any) -> str:
    """Returns what is wrong with the addresses of a job.

    Args:
        job: its name.
        addresses: those of its tasks.

    Returns:
        A clause; empty where nothing is wrong.
    """
    if not isinstance(addresses, list):
        return f"needs a list of addresses host:port for the job {job!r}"
    for i, address in enumerate(addresses):
        if not isinstance(address, str):
            return f"has {job} {i} at {address!r}, which must be a string host:port"
        host, colon, port = address.rpartition(":")
        is_plain = ":" not in host or (host.startswith("[") and host.endswith("]"))
        is_port = port.isascii() and port.isdecimal() and int(port) in _PORTS
        if not colon or not host.strip("[]") or "/" in host or address.split() != [address]:
            return f"has {job} {i} at {address!r}, which must be host:port"
        if not is_plain:
            return f"has {job} {i} at {address!r}; an IPv6 address is written [address]:port"
        if not is_port:
            return f"has {job} {i} at {address!r}, whose port must be from 1 to 65535"
    return ""


def _cluster_problem(cluster: Any) -> str:
    if not isinstance(cluster, dict) or not cluster:
        return "needs a cluster and a task: its cluster must map jobs to lists of addresses"
    for job, addresses in cluster.items():
        problem = addresses_problem(job, addresses)
        if problem:
            return problem
    training = [a for job in ("chief", "worker") for a in cluster.get(job, [])]
    if not training:
        return f"needs addresses of the job 'worker'; its jobs are {', '.join(map(repr, cluster))}"
    twice = sorted({address for address in training if training.count(address) > 1})
    if twice:
        return f"has the address {twice[0]} twice; each worker needs an address of its own"
    if len(cluster.get("chief", [])) > 1:
        return "has more than one chief"
    return ""


def _task_problem(task: Any) -> str:
    if not isinstance(task, dict) or "type" not in task or "index" not in task:
        return "needs a cluster and a task with its type and index"
    kind, index = task["type"], task["index"]
    if not isinstance(kind, str):
        return f"has a task whose type must be a string such as 'worker', and is {kind!r}"
    is_number = isinstance(index, int) and not isinstance(index, bool)
    is_text = isinstance(index, str) and index.isascii() and index.isdecimal()
    if not (is_number or is_text) or int(index) < 0:
        return f"has a task whose index must be a number from 0, and is {index!r}"
    return ""
