"""Values that change with the step: learning rate, weight decay, teacher momentum, temperature.

`Schedules.at` computes those of one step; `Plan.schedules` (plan/plan.py) takes its numbers from
the recipe.

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


@dataclass(frozen=True)
class Schedules:
    """The numbers that a run's schedules are made of; steps are optimiser steps.

    Attributes:
        steps: of the run.
        lr: at the end of the warm-up, scaled to the batch.
        min_lr: at the end of the run.
        warmup_steps: in which the learning rate rises from 0.
        weight_decay: at step 0 and at the end.
        momentum: of the teacher, at step 0 and at the end.
        temperature: of the teacher, at step 0 and after its warm-up.
        temperature_warmup_steps: of that warm-up.
        freeze_last_layer_steps: in which the head's last layer does not learn.
        freeze_backbone_steps: in which the backbone does not learn.
    """

    steps: int
    lr: float
    min_lr: float
    warmup_steps: int
    weight_decay: tuple[float, float]
    momentum: tuple[float, float]
    temperature: tuple[float, float]
    temperature_warmup_steps: int
    freeze_last_layer_steps: int
    freeze_backbone_steps: int

    def at(self, step: int) -> StepValues:
        """The values of one step (RECIPE section 6)."""
        lr = cosine(step, self.lr, self.min_lr, self.steps, warmup=self.warmup_steps)
        return StepValues(
            lr=lr,
            weight_decay=cosine(step, *self.weight_decay, self.steps),
            teacher_momentum=cosine(step, *self.momentum, self.steps),
            teacher_temperature=linear(step, *self.temperature, self.temperature_warmup_steps),
            last_layer_lr=0.0 if step < self.freeze_last_layer_steps else lr,
            backbone_lr=0.0 if step < self.freeze_backbone_steps else None,
        )


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
