"""Features of another network as targets: standardised, then compared by cosine or smooth L1.

Each number of a feature has mean 0 and deviation 1, so that none outweighs the others by its scale:
Wei et al. 2022 (arXiv:2205.14141) normalise a teacher's features before smooth L1, Ranzinger et al.
2024 (arXiv:2410.01680) compare ways to do it. AM-RADIO (arXiv:2312.06709) learns the summary of an
image by cosine, its patches by cosine and smooth L1.

N rows, D numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import PipelineError
from pipeline.loss.collectives import all_sum

FeatureLoss = Literal["cosine", "smooth_l1"]
FORMS: tuple[FeatureLoss, ...] = ("cosine", "smooth_l1")
# of the median: what hardly ever changes is no signal, and is not blown up to be one
LEAST_DEVIATION = 0.01


def feature_loss(
    student: Tensor, target: Tensor, weights: Tensor | None = None, form: FeatureLoss = "cosine"
) -> Tensor:
    """Mean over the rows that count, 0-d fp32: `1 - cos(s, t)`, or the mean over the D numbers of
    smooth L1 with a threshold of 1.

    Args:
        student: `[N, D]`, with gradients.
        target: `[N, D]`, standardised.
        weights: `[N]`, 1 for a row that counts and 0 for another; None: all count. Where none
            counts the loss is 0, still connected to `student`.
        form: `cosine` or `smooth_l1`.

    Raises:
        PipelineError: an unknown form, or shapes that do not fit each other.
    """
    wrong = student.ndim != 2 or student.shape != target.shape
    if wrong or (weights is not None and weights.shape != student.shape[:1]):
        shown = "" if weights is None else f" and weights {list(weights.shape)}"
        raise PipelineError(
            f"feature_loss got features {list(student.shape)} for targets "
            f"{list(target.shape)}{shown}",
            "give both [N, D], and one weight for each row",
        )
    with torch.autocast(student.device.type, enabled=False):
        s, t = student.float(), target.float()
        if form == "cosine":
            each = 1 - F.cosine_similarity(s, t, dim=-1, eps=1e-6)
        elif form == "smooth_l1":
            each = F.smooth_l1_loss(s, t, reduction="none", beta=1.0).mean(-1)
        else:
            raise PipelineError(f"unknown feature loss {form!r}", f"use {' or '.join(FORMS)}")
        if weights is None:
            return each.mean()
        return (each * weights).sum() / weights.sum().clamp(min=1)


class Standard:
    """Running mean and deviation of each of D numbers, over all rows of all workers so far.

    Batches are joined by their counts, means and sums of squares (Chan, Golub, LeVeque 1979), in
    float64: the order of micro batches and workers does not matter. A teacher that does not change
    has one mean and one deviation, so nothing is forgotten.
    """

    def __init__(self, width: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.squares = torch.zeros(width, dtype=torch.float64)  # of deviations from the mean

    def measure(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """What `joined` takes of rows `[N, D]`, `[1 + 2 D]`: how many count, and the sums of their
        differences from the mean here, and of the squares of these.

        Args:
            rows: of one micro batch on this worker.
            weights: `[N]`, 1 for a row that counts and 0 for another; None: all count.
        """
        apart = rows.double() - self.mean.to(rows.device)
        if weights is None:
            count = torch.full((1,), float(len(rows)), dtype=torch.float64, device=rows.device)
        else:
            counts = weights.to(apart)[:, None]
            count, apart = counts.sum(0), apart * counts
        return torch.cat([count, apart.sum(0), apart.square().sum(0)])

    def joined(self, measures: Sequence[Tensor]) -> Standard:
        """This with the rows of a step, of all workers; each of them must call it."""
        total = all_sum(torch.stack(list(measures)).sum(0))
        count, apart, squares = total[0], *total[1:].chunk(2)
        here, mean, before = (x.to(total.device) for x in (self.count, self.mean, self.squares))
        joined, every = Standard(len(mean)), here + count
        shift = apart / every.clamp(min=1)
        joined.count, joined.mean = every, mean + shift
        joined.squares = before + squares - every * shift.square()
        return joined

    def apply(self, rows: Tensor) -> Tensor:
        """Rows `[N, D]` with mean 0 and deviation 1 in each number, fp32."""
        deviation = (self.squares / self.count.clamp(min=1)).clamp(min=0).sqrt()
        deviation = deviation.clamp(min=LEAST_DEVIATION * deviation.median())
        scale = torch.where(deviation > 0, 1 / deviation, torch.ones_like(deviation))
        mean, scale = (x.to(rows.device, torch.float32) for x in (self.mean, scale))
        return (rows.float() - mean) * scale

    def state_dict(self) -> dict[str, Tensor]:
        """Count, mean and sum of squares."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`.

        Raises:
            PipelineError: it is of features of another width.
        """
        if state["mean"].shape != self.mean.shape:
            raise PipelineError(
                f"the checkpoint's features are {len(state['mean'])} wide, "
                f"the teacher's {len(self.mean)}",
                "name the teacher in distill.teacher that the run began with",
            )
        self.count, self.mean, self.squares = (
            state[name].clone() for name in ("count", "mean", "squares")
        )
