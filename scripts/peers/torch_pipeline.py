"""PyTorch with a pipeline: a stage in each process, by `torch.distributed.pipelining`'s 1F1B."""

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from llmos_tf.scripts.peers import torch_process
from llmos_tf.scripts.peers.timing import TakeSteps, timed
from llmos_tf.scripts.peers.torch_model import cross_entropy, make_model
from llmos_tf.scripts.peers.workload import Job


def make(job: Job) -> TakeSteps:
    """Makes the run.

    Args:
        job: a ``torch-pipe`` one.

    Returns:
        What takes its steps.
    """
    device = torch_process.start(job)
    num_layers, last = job.workload.config.num_layers, job.devices - 1
    blocks = np.array_split(np.arange(num_layers), job.devices)[job.rank].tolist()
    model = make_model(job.workload, blocks).to(device)
    stage = PipelineStage(model, job.rank, job.devices, device)
    # The mean of equal microbatches' means is the batch's.
    schedule = Schedule1F1B(stage, job.options["microbatches"], cross_entropy, scale_grads=True)
    optimizer = torch_process.Optimizer(model.parameters(), job)
    x, y = torch_process.batch(job, device, is_split=False)
    # The first and the last stage have a copy each of the tied embedding.
    ends = dist.new_group([0, last])
    table = None
    if job.rank in (0, last):
        table = (model.token_embedding if job.rank == 0 else model.head).weight

    def step() -> float:
        losses: list[torch.Tensor] = []
        schedule.step(
            *([x] if job.rank == 0 else []),
            target=y if job.rank == last else None,
            losses=losses,
            return_outputs=False,
        )
        if table is not None:
            dist.all_reduce(table.grad, group=ends)
        optimizer.step()
        loss = torch.stack(losses).mean() if job.rank == last else torch.zeros((), device=device)
        dist.broadcast(loss, src=last)
        return loss.item()

    return timed(step)
