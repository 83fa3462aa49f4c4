"""How long a plan trains: its FLOPs over the speed of matrix products here. It is a guess."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pipeline.plan.plan import Plan
from pipeline.train.speed.bottleneck import count
from pipeline.train.speed.cost import Cost
from pipeline.train.speed.peaks import peak_flops

HOUR_S = 3600.0
# Share of the peak of matrix products that a whole step reaches
EFFICIENCY = {"cuda": 0.35, "cpu": 0.15}


def seconds_of(plan: Plan, cost: Cost) -> float:
    """Of training; 0 where the speed of the devices is not known."""
    images = plan.config.optim.global_batch_size * plan.steps
    speed = flops_per_s(plan)
    return cost.flops_per_image * images / speed if speed else 0.0


def flops_per_s(plan: Plan) -> float:
    """Of all workers together; 0 where it is not known."""
    if plan.device == "cuda" and not torch.cuda.is_available():
        return 0.0  # the GPUs are on other nodes
    dtype = torch.bfloat16 if plan.precision == "bfloat16" else torch.float32
    return peak_flops(plan.device, dtype, plan.threads) * plan.workers * EFFICIENCY[plan.device]


def in_words(seconds: float) -> str:
    """`40 seconds`, `12 minutes`, `33 hours` or `5 days`."""
    units: Mapping[str, float] = {"day": 24 * HOUR_S, "hour": HOUR_S, "minute": 60.0, "second": 1.0}
    for unit, size in units.items():
        if seconds >= 2 * size:
            return count(round(seconds / size), unit)
    return count(max(1, round(seconds)), "second")
