"""PyTorch on one device, and with DDP, FSDP2 or tensor parallelism over several processes."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from llmos_tf.scripts.peers import torch_process
from llmos_tf.scripts.peers.timing import TakeSteps, timed
from llmos_tf.scripts.peers.torch_model import TorchGPT, cross_entropy, make_model
from llmos_tf.scripts.peers.workload import Job


def make(job: Job) -> TakeSteps:
    """Makes the run.

    Args:
        job: a ``torch``, ``torch-ddp``, ``torch-fsdp`` or ``torch-tensor`` one.

    Returns:
        What takes its steps.
    """
    device = torch_process.start(job)
    model: nn.Module = make_model(job.workload).to(device)
    is_tensor_parallel = job.kind == "torch-tensor"
    if job.kind == "torch-fsdp":
        _shard(model, job)
    elif is_tensor_parallel:
        _cut(model, job)
    optimizer = torch_process.Optimizer(model.parameters(), job)
    if job.kind == "torch-ddp":
        # Gradients that are views of its buckets are not copied into them.
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if job.options.get("compile"):
        model.compile()
    is_split = bool(job.rendezvous) and not is_tensor_parallel
    x, y = torch_process.batch(job, device, is_split)

    def step() -> float:
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return torch_process.mean_over_processes(loss) if is_split else loss.item()

    if not is_tensor_parallel:
        return timed(step)

    def step_on_cut_logits() -> float:
        with loss_parallel():
            loss = cross_entropy(model(x), y)
            loss.backward()
        optimizer.step()
        return loss.detach().full_tensor().item()

    return timed(step_on_cut_logits)


def _mesh(job: Job) -> dist.DeviceMesh:
    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (job.devices,))


def _shard(model: TorchGPT, job: Job) -> None:
    """FSDP2, block by block; what is left belongs to the whole model."""
    mesh = _mesh(job)
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _cut(model: TorchGPT, job: Job) -> None:
    """Heads, feed-forward columns and vocabulary over the processes; logits stay cut."""
    mesh = _mesh(job)
    plan = {
        "token_embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for name in model.blocks:
        plan |= {
            f"blocks.{name}.attention.query_key_value": ColwiseParallel(),
            f"blocks.{name}.attention.output": RowwiseParallel(),
            f"blocks.{name}.up": ColwiseParallel(),
            f"blocks.{name}.down": RowwiseParallel(),
        }
    parallelize_module(model, mesh, plan)
    # Each was given a parameter of its own.
    model.tie()
