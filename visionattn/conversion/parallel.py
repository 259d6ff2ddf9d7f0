"""Several processes, started by torchrun: who is first, and the mean of their gradients."""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Return the number of this process, 0 where there is only one."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Say whether this is the process that writes and reports."""
    return rank() == 0


def averaged(parameters: Sequence[Tensor]) -> None:
    """Replace the gradients of parameters by their mean over all processes; nothing is done where there is only one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if not dist.is_initialized():
        dist.init_process_group("nccl" if parameters[0].is_cuda else "gloo")
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([x.flatten() for x in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([x.numel() for x in gradients]), strict=True):  # type: ignore[no-untyped-call]
        gradient.copy_(part.view_as(gradient))
