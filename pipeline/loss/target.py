"""Teacher targets: what the student is asked to predict, balanced over the prototypes.

A target is a softmax of the teacher's logits with two sets of offsets, one number a prototype and
one a row: `q = exp(logits / temperature + prototype - row)`. Both ways of centring have this form,
so probabilities are made a few rows at a time and `[rows, K]` never exists in fp32. N rows, K
prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.loss.collectives import all_logsumexp, all_sum, world_size

CHUNK = 2**24  # numbers in fp32 at once: 64 MiB


def slices(rows: int, width: int) -> Iterator[slice]:
    """Cut `rows` rows of `width` numbers into slices of at most `CHUNK` numbers."""
    step = max(1, CHUNK // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass(frozen=True)
class Target:
    """Teacher probabilities `[N, K]`, kept as logits and offsets."""

    logits: Tensor  # [N, K], any float dtype
    temperature: float
    prototype: Tensor  # [K] fp32
    row: Tensor  # [N] fp32

    def log_probabilities(self, rows: slice) -> Tensor:
        """fp32 `[n, K]` of some rows."""
        scaled = self.logits[rows].float() / self.temperature
        return scaled.add_(self.prototype).sub_(self.row[rows, None])

    def probabilities(self, rows: slice = slice(None)) -> Tensor:
        """fp32 `[n, K]` of some rows; each sums to 1."""
        return self.log_probabilities(rows).exp_()

    def entropy(self) -> Tensor:
        """Mean entropy of the rows in nats, 0-d; near 0 or near log K says collapse."""
        total = self.row.new_zeros(())
        for rows in slices(*self.logits.shape):
            log_q = self.log_probabilities(rows)
            total -= (log_q.exp() * log_q).sum()
        return total / max(len(self.row), 1)

    def prototypes_used(self) -> Tensor:
        """Number of prototypes that are the most likely one of some row, 0-d."""
        used = torch.zeros_like(self.prototype)
        for rows in slices(*self.logits.shape):
            used.index_fill_(0, self.log_probabilities(rows).argmax(dim=1), 1.0)
        return used.sum()


@torch.no_grad()
def softmax_targets(logits: Sequence[Tensor], centre: Tensor, temperature: float) -> list[Target]:
    """`softmax((logits - centre) / temperature)` of each micro batch (DINOv2
    loss/dino_clstoken_loss.py).

    Raises:
        PipelineError: logits that are no list of `[N, K]`, a centre that is not `[K]`, or a
            temperature that is not above 0.
    """
    prototypes = _prototypes(logits, temperature)
    if tuple(centre.shape) != (prototypes,):
        raise PipelineError(
            f"a centre {list(centre.shape)} for logits of {prototypes} prototypes",
            f"give one of [{prototypes}], such as Centre({prototypes}).use()",
        )
    offset = -centre.float() / temperature
    return [Target(x, temperature, offset, _row_sums(x, offset, temperature)) for x in logits]


@torch.no_grad()
def sinkhorn_targets(
    logits: Sequence[Tensor], temperature: float, iterations: int = 3
) -> list[Target]:
    """Sinkhorn-Knopp over the rows of all micro batches and all workers together.

    Equal to alternately scaling `exp(logits / temperature)` to equal prototype and equal row sums
    (SwAV; DINOv2 loss/ibot_patch_loss.py), but on logarithms, so that large logits neither overflow
    nor give empty rows. Every worker must call it, also one without rows.

    Raises:
        PipelineError: logits that are no list of `[N, K]`, or a temperature that is not above 0.
    """
    prototypes = _prototypes(logits, temperature)
    offset = logits[0].new_zeros(prototypes, dtype=torch.float32)
    rows = [x.new_zeros(len(x), dtype=torch.float32) for x in logits]
    for _ in range(iterations):
        sums = torch.stack(
            [_column_sums(x, row, temperature) for x, row in zip(logits, rows, strict=True)]
        )
        total = all_logsumexp(torch.logsumexp(sums, dim=0))
        offset = -total - math.log(prototypes)
        rows = [_row_sums(x, offset, temperature) for x in logits]
    return [Target(x, temperature, offset, row) for x, row in zip(logits, rows, strict=True)]


def _prototypes(logits: Sequence[Tensor], temperature: float) -> int:
    """K of logits `[N, K]` of each micro batch."""
    shapes = [list(x.shape) for x in logits]
    if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
        got = list(logits.shape) if isinstance(logits, Tensor) else shapes
        raise PipelineError(
            f"teacher logits {got}, expected a list of [N, K], one a micro batch, of one K",
            "put the logits of a single micro batch into a list: [logits]",
        )
    if not temperature > 0:
        raise PipelineError(f"a teacher temperature of {temperature}", "use one above 0, e.g. 0.04")
    return shapes[0][1]


def _row_sums(logits: Tensor, offset: Tensor, temperature: float) -> Tensor:
    """`log(sum_k exp(logits / temperature + offset))`, `[N]`."""
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for rows in slices(*logits.shape):
        scaled = (logits[rows].float() / temperature).add_(offset)
        out[rows] = torch.logsumexp(scaled, dim=1)
    return out


def _column_sums(logits: Tensor, row: Tensor, temperature: float) -> Tensor:
    """`log(sum_n exp(logits / temperature - row))`, `[K]`; -inf without rows."""
    rows, prototypes = logits.shape
    out = torch.full((prototypes,), -math.inf, device=logits.device)
    if rows:
        for columns in slices(prototypes, rows):
            scaled = (logits[:, columns].float() / temperature).sub_(row[:, None])
            out[columns] = torch.logsumexp(scaled, dim=0)
    return out


class Centre:
    """Moving average of the teacher's mean logits, applied one step late as in the reference.

    The mean of step i enters the average when step i + 1 asks for it, so the mean in between is
    part of the state.
    """

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        self.momentum = momentum
        self.value = torch.zeros(prototypes)
        self.pending: Tensor | None = None

    @torch.no_grad()
    def use(self) -> Tensor:
        """Take in the pending mean and return the centre `[K]` of this step."""
        if self.pending is not None:
            self.value = self.value.lerp(self.pending.to(self.value.device), 1 - self.momentum)
            self.pending = None
        return self.value

    @torch.no_grad()
    def see(self, logits: Sequence[Tensor]) -> None:
        """Keep this step's mean: the mean over micro batches and workers of each one's mean.

        The iBOT centre of the reference is such a mean of means. A part without rows does not
        count.

        Raises:
            PipelineError: logits that are no list of `[N, K]` with the K of the centre.
        """
        prototypes = _prototypes(logits, 1.0)
        if prototypes != len(self.value):
            raise PipelineError(
                f"logits of {prototypes} prototypes for a centre of {len(self.value)}",
                f"use Centre({prototypes})",
            )
        sums = [x.mean(dim=0, dtype=torch.float32) for x in logits if len(x)]
        device = logits[0].device
        mean = torch.stack(sums).sum(dim=0) if sums else torch.zeros_like(self.value, device=device)
        parts = torch.full((1,), float(len(sums)), device=device)
        total = all_sum(torch.cat([mean, parts])) if world_size() > 1 else torch.cat([mean, parts])
        self.value = self.value.to(device)
        # Nobody had a row: the pending mean is the centre itself, which changes nothing.
        self.pending = torch.where(total[-1] > 0, total[:-1] / total[-1].clamp(min=1), self.value)

    def state_dict(self) -> dict[str, Tensor]:
        """The centre, and the pending mean where there is one."""
        state = {"value": self.value}
        return state if self.pending is None else state | {"pending": self.pending}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`."""
        self.value = state["value"].clone()
        pending = state.get("pending")
        self.pending = None if pending is None else pending.clone()
