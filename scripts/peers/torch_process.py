"""A process of a PyTorch run: its device, its threads, its part of the batch, its optimizer."""

import datetime
import math
import os
import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from llmos_tf.scripts.peers.workload import Job


def start(job: Job) -> torch.device:
    """Sets up this process, and joins it to the others where there are any.

    Args:
        job: what the process is told.

    Returns:
        Its device: a GPU if there are any, else the CPU, on which all processes together use as
        many threads as there are cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(job.threads_per_device or max(1, cores // job.devices))
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", job.rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if job.rendezvous:
        if sys.platform == "linux":
            # All processes are here, and the host's own name may not resolve.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "nccl" if has_gpu else "gloo",
            init_method=f"file://{job.rendezvous}",
            rank=job.rank,
            world_size=job.devices,
            timeout=datetime.timedelta(minutes=10),
        )
    return device


def batch(job: Job, device: torch.device, is_split: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns this process's part of the batch.

    Args:
        job: what the process is told.
        device: where it goes.
        is_split: whether each process has rows of its own, or all have all of them.

    Returns:
        Tokens, and the tokens that follow as `cross_entropy` takes them.
    """
    x, y = job.workload.batch()
    if is_split:
        rows = len(x) // job.devices
        mine = slice(job.rank * rows, (job.rank + 1) * rows)
        x, y = x[mine], y[mine]
    return torch.from_numpy(x).to(device), torch.from_numpy(y).long().to(device)


class Optimizer:
    """AdamW with Keras's epsilon: fused, which was the fastest of its forms on the CPU too.

    PyTorch adds epsilon after it has corrected the second moment's bias, Keras before.

    Args:
        parameters: what it updates.
        job: has the hyper-parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], job: Job):
        self._values, self._steps = job.workload.optimizer, 0
        # The fused form takes either distributed tensors or plain ones.
        by_type: dict[type, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_type.setdefault(type(parameter.data), []).append(parameter)
        self._optimizer = torch.optim.AdamW(
            [{"params": group} for group in by_type.values()],
            lr=self._values["learning_rate"],
            betas=(self._values["beta_1"], self._values["beta_2"]),
            weight_decay=self._values["weight_decay"],
            fused=True,
        )

    def step(self) -> None:
        """Updates the parameters, and forgets their gradients."""
        self._steps += 1
        correction = math.sqrt(1 - self._values["beta_2"] ** self._steps)
        for group in self._optimizer.param_groups:
            group["eps"] = self._values["epsilon"] / correction
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def mean_over_processes(loss: torch.Tensor) -> float:
    """Returns the mean of the processes' losses.

    Args:
        loss: this process's, a scalar.

    Returns:
        The same number everywhere.
    """
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return float(loss) / dist.get_world_size()
