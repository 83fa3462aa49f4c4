"""One forward pass of student and teacher, with what it saw: for loops of one's own.

G global and V views in all of B images, K prototypes, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.pair import Pair
from pipeline.train.objective import Objective
from pipeline.train.step import ask_student, ask_teacher
from pipeline.views.batch import Views


@dataclass(frozen=True)
class Forward:
    """What a forward pass gives."""

    loss: Tensor  # 0-d, with gradients: what is optimised
    parts: dict[str, Tensor]  # the unweighted terms: dino_global, dino_local, ibot, koleo
    cls: Tensor  # [G, B, D] the teacher's CLS tokens
    teacher_logits: Tensor  # [G, B, K], without gradients
    student_logits: Tensor  # [V, B, K], global views first


def forward(
    pair: Pair,
    views: Views,
    objective: Objective,
    teacher_temperature: float = 0.04,
    generator: torch.Generator | None = None,
) -> Forward:
    """Student and teacher on views, and the loss between them; nothing is moved.

    A loop of one's own goes on with `loss.backward()`, its optimiser, `objective.commit()` for the
    centres and `ema_update(pair, momentum)`; `train_step` is all of that.

    Args:
        pair: the networks.
        views: of one micro batch.
        objective: losses and centres; DINO needs a weight above 0 there.
        teacher_temperature: of the targets.
        generator: source of the student's stochastic depth.

    Raises:
        PipelineError: views without masks where iBOT has a weight.
    """
    patches = objective.masked(views)
    answer, masked = ask_teacher(pair, views, patches, objective)
    target = next(objective.targets(iter([(answer, masked)]), teacher_temperature))
    student = ask_student(pair.student, views, patches, objective, generator)
    terms = objective.losses(student, target, views, patches)
    scored = objective.scores_cls
    rows = len(views.global_views) * scored
    return Forward(
        terms.total,
        terms.parts,
        _by_view(answer.cls, views.images),
        _by_view(answer.dino[:rows], views.images),
        _by_view(student.dino[: rows + len(views.local_views) * scored], views.images),
    )


def _by_view(rows: Tensor, images: int) -> Tensor:
    """`[V B, D]`, crop-major, as `[V, B, D]`."""
    return rows.view(len(rows) // images, images, rows.shape[-1])
