"""Values that change with the step: learning rate, weight decay, teacher momentum, temperature.

`Plan.at` (plan/plan.py) asks for those of a step with the numbers of a recipe.

Pure arithmetic on Python floats; nothing here imports torch. A schedule is a function of the step
alone, so a resumed run needs no schedule state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepValues:
    """Everything the optimiser and the teacher need to know at one step."""

    lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float
    last_layer_lr: float
    backbone_lr: float | None = None  # where it differs from lr: 0 while the backbone is frozen


def cosine(
    step: int,
    base: float,
    end: float,
    steps: int,
    warmup: int = 0,
    start: float = 0.0,
    freeze: int = 0,
) -> float:
    """Value at `step` of a linear warm-up followed by a half cosine (DINOv2 utils/utils.py,
    CosineScheduler).

    The first `freeze` steps are 0, then `warmup` steps rise from `start` to `base` (both ends
    included), then the cosine falls from `base` towards `end`, which is reached at step `steps` and
    kept from there on.
    """
    if step >= steps:
        return end
    if step < freeze:
        return 0.0
    step -= freeze
    if step < warmup:
        return start + (base - start) * step / (warmup - 1) if warmup > 1 else start
    done = (step - warmup) / (steps - warmup - freeze)
    return end + 0.5 * (base - end) * (1.0 + math.cos(math.pi * done))


def linear(step: int, start: float, end: float, steps: int) -> float:
    """Value at `step` of a line: `start` at step 0, `end` at step `steps - 1` and after."""
    if step >= steps - 1:
        return end if step > 0 or steps <= 0 else start
    return start + (end - start) * step / (steps - 1)
