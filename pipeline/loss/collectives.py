"""The three sums over workers the losses need; each is the identity where training runs on one
worker.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of workers of the run, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_sum(x: Tensor) -> Tensor:
    """The sum of `x` over the workers, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_logsumexp(x: Tensor) -> Tensor:
    """`log(sum(exp(x)))` over the workers, element by element, without overflow."""
    if world_size() == 1:
        return x
    if x.device.type == "cpu":  # few workers: one message of all numbers is faster than two sums
        every = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(every, x.contiguous())
        return torch.logsumexp(torch.stack(every), dim=0)
    largest = x.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    # -inf on every worker (nobody has a row) must stay -inf and not become NaN.
    shift = torch.where(torch.isfinite(largest), largest, torch.zeros_like(largest))
    return shift + all_sum((x - shift).exp()).log()
