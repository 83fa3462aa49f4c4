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
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.loss.collectives import all_logsumexp
from pipeline.loss.form import Kernels, fused

CHUNK = 2**24  # numbers in fp32 at once: 64 MiB
CACHED = 2**20  # the same on a CPU: 4 MiB, which stay in its cache from one operation to the next


def slices(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Cut `rows` rows of `width` numbers into slices of few enough numbers for a device."""
    most = min(CHUNK, CACHED) if device.type == "cpu" else CHUNK
    step = max(1, most // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def row_slices(logits: Tensor) -> Iterator[slice]:
    """The same of the rows of a matrix."""
    return slices(len(logits), logits.shape[1], logits.device)


class Facts(NamedTuple):
    """What one read of the logits says of the targets made of them."""

    row: Tensor  # [N] log of the sum of exponentials
    entropy: Tensor  # [N] in nats
    likeliest: Tensor  # int64 [N], the prototype
    total: Tensor | None  # [K] sum of the logits of rows that count, where it was asked for


@dataclass(frozen=True)
class Target:
    """Teacher probabilities `[N, K]`, kept as logits and offsets."""

    logits: Tensor  # [N, K], any float dtype
    temperature: float
    prototype: Tensor  # [K] fp32
    row: Tensor  # [N] fp32
    weight: Tensor | None = None  # [N] fp32: 1 for a row that counts, 0 for another; None: all do
    facts: Facts | None = None  # where they are known already

    def weights(self) -> Tensor:
        """`[N]`: 1 for a row that counts, 0 for another."""
        return torch.ones_like(self.row) if self.weight is None else self.weight

    def log_probabilities(self, rows: slice) -> Tensor:
        """fp32 `[n, K]` of some rows."""
        scaled = self.logits[rows].float() / self.temperature
        return scaled.add_(self.prototype).sub_(self.row[rows, None])

    def probabilities(self, rows: slice = slice(None)) -> Tensor:
        """fp32 `[n, K]` of some rows; each sums to 1."""
        return self.log_probabilities(rows).exp_()

    def entropy(self) -> Tensor:
        """Mean entropy of the rows that count in nats, 0-d; near 0 or near log K says collapse."""
        total, weights = self.row.new_zeros(()), self.weights()
        if self.facts is not None:
            total = (self.facts.entropy * weights).sum()
        else:
            for rows in row_slices(self.logits):
                log_q = self.log_probabilities(rows)
                total -= ((log_q.exp() * log_q).sum(dim=1) * weights[rows]).sum()
        return total / weights.sum().clamp(min=1)

    def mean(self) -> tuple[Tensor, Tensor]:
        """Mean logits of the rows that count, fp32 `[1, K]`, and `[1]`: 1 where there are any, else
        0. What `Centre.see` takes of one micro batch.
        """
        if self.facts is None or self.facts.total is None:
            mean = mean_of(self.logits, self.weight)
            return mean[None, :-1], mean[-1:]
        count = self.weights().sum()
        return (self.facts.total / count.clamp(min=1))[None], (count > 0).float()[None]

    def prototypes_used(self) -> Tensor:
        """Number of prototypes that are the most likely one of some row that counts, 0-d."""
        prototypes = len(self.prototype)
        used = self.prototype.new_zeros(prototypes + 1)  # the last place is for other rows
        if self.facts is not None:
            likeliest = self.facts.likeliest
        else:
            parts = row_slices(self.logits)
            each = [self.log_probabilities(rows).argmax(dim=1) for rows in parts]
            likeliest = torch.cat(each) if each else torch.zeros_like(self.row, dtype=torch.long)
        if self.weight is not None:
            likeliest = likeliest.masked_fill(self.weight == 0, prototypes)
        used.index_fill_(0, likeliest, 1.0)
        return used[:prototypes].sum()


Weights = Sequence[Tensor | None]  # of each micro batch: [N], see `Target.weight`


@torch.no_grad()
def softmax_targets(
    logits: Sequence[Tensor],
    centre: Tensor,
    temperature: float,
    weights: Weights | None = None,
    kernels: Kernels = "auto",
) -> list[Target]:
    """`softmax((logits - centre) / temperature)` of each micro batch (DINOv2
    loss/dino_clstoken_loss.py).

    Args:
        logits: `[N, K]` of each micro batch.
        centre: `[K]`.
        temperature: of the teacher.
        weights: of each micro batch: `[N]`, 1 for a row that counts and 0 for another, or None.
        kernels: what computes, see `fused`.

    Raises:
        PipelineError: logits that are no list of `[N, K]`, a centre that is not `[K]`, or a
            temperature that is not above 0.
    """
    prototypes = prototypes_of(logits, temperature)
    if tuple(centre.shape) != (prototypes,):
        raise PipelineError(
            f"a centre {list(centre.shape)} for logits of {prototypes} prototypes",
            f"give one of [{prototypes}], such as Centre({prototypes}).use()",
        )
    offset = -centre.float() / temperature
    counted = weights_of(logits, weights)
    if fused(kernels, logits[0]):
        return [
            _fused_target(x, temperature, offset, weight, means=True)
            for x, weight in zip(logits, counted, strict=True)
        ]
    rows = [_row_sums(x, offset, temperature) for x in logits]
    return _targets(logits, temperature, offset, rows, counted)


@torch.no_grad()
def sinkhorn_targets(
    logits: Sequence[Tensor],
    temperature: float,
    iterations: int = 3,
    weights: Weights | None = None,
    kernels: Kernels = "auto",
) -> list[Target]:
    """Sinkhorn-Knopp over the rows of all micro batches and all workers together.

    Equal to alternately scaling `exp(logits / temperature)` to equal prototype and equal row sums
    (SwAV; DINOv2 loss/ibot_patch_loss.py), but on logarithms, so that large logits neither overflow
    nor give empty rows. Every worker must call it, also one without rows. Rows of weight 0 are as
    if they were not there.

    Args:
        logits: `[N, K]` of each micro batch.
        temperature: of the teacher.
        iterations: times that prototypes and rows are scaled.
        weights: of each micro batch: `[N]`, 1 for a row that counts and 0 for another, or None.
        kernels: what computes, see `fused`.

    Raises:
        PipelineError: logits that are no list of `[N, K]`, or a temperature that is not above 0.
    """
    prototypes = prototypes_of(logits, temperature)
    counted, triton = weights_of(logits, weights), fused(kernels, logits[0])
    targets: list[Target] = []
    offset = torch.zeros(prototypes, device=logits[0].device)
    rows = [torch.zeros(len(x), device=x.device) for x in logits]
    for _ in range(iterations):
        sums = torch.cat(
            [
                _column_sums(x, _without(row, weight), temperature, triton)
                for x, row, weight in zip(logits, rows, counted, strict=True)
            ]
        )
        total = all_logsumexp(torch.logsumexp(sums, dim=0))
        # Where no row counts on any worker, targets are used by nobody, and must be finite.
        total = torch.where(total == -math.inf, 0.0, total)
        offset = -total - math.log(prototypes)
        if triton:
            each = zip(logits, counted, strict=True)
            targets = [_fused_target(x, temperature, offset, weight) for x, weight in each]
            rows = [target.row for target in targets]
        else:
            rows = [_row_sums(x, offset, temperature) for x in logits]
    return targets or _targets(logits, temperature, offset, rows, counted)


def _fused_target(
    logits: Tensor,
    temperature: float,
    offset: Tensor,
    weight: Tensor | None,
    means: bool = False,
) -> Target:
    """A target whose facts are known, `means` of the logits among them."""
    from pipeline.loss.target_kernels import facts

    seen = facts(logits, offset, temperature, weight, means)
    return Target(logits, temperature, offset, seen.row, weight, seen)


def _targets(
    logits: Sequence[Tensor],
    temperature: float,
    offset: Tensor,
    rows: Sequence[Tensor],
    weights: Weights,
) -> list[Target]:
    each = zip(logits, rows, weights, strict=True)
    return [Target(x, temperature, offset, row, weight) for x, row, weight in each]


def weights_of(logits: Sequence[Tensor], weights: Weights | None) -> Weights:
    """One for each micro batch, `[N]` or None."""
    each = [None] * len(logits) if weights is None else list(weights)
    shapes = [None if weight is None else list(weight.shape) for weight in each]
    rows = [len(x) for x in logits]
    fits = len(shapes) == len(rows) and all(
        shape in (None, [count]) for shape, count in zip(shapes, rows, strict=True)
    )
    if not fits:
        raise PipelineError(
            f"weights {shapes} for micro batches of {rows} rows",
            "give one weight a row for each micro batch, or None where all rows count",
        )
    return each


def _without(row: Tensor, weight: Tensor | None) -> Tensor:
    """Offsets of rows, infinite where a row does not count: nothing of it is in a sum then."""
    return row if weight is None else row.masked_fill(weight == 0, math.inf)


def prototypes_of(logits: Sequence[Tensor], temperature: float) -> int:
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
    for rows in row_slices(logits):
        scaled = (logits[rows].float() / temperature).add_(offset)
        out[rows] = torch.logsumexp(scaled, dim=1)
    return out


def _column_sums(logits: Tensor, row: Tensor, temperature: float, triton: bool) -> Tensor:
    """`log(sum_n exp(logits / temperature - row))`, `[parts, K]`: of one or more parts of the rows;
    -inf without rows.
    """
    if triton:
        from pipeline.loss.target_kernels import column_sums

        return column_sums(logits, row, temperature)
    rows, prototypes = logits.shape
    out = torch.full((1, prototypes), -math.inf, device=logits.device)
    if rows:
        for columns in slices(prototypes, rows, logits.device):
            scaled = (logits[:, columns].float() / temperature).sub_(row[:, None])
            out[0, columns] = torch.logsumexp(scaled, dim=0)
    return out


def mean_of(logits: Tensor, weight: Tensor | None) -> Tensor:
    """fp32 `[K + 1]`: the mean of the rows that count and a 1, or zeros where there are none."""
    if not len(logits):
        prototypes = logits.shape[1]
        return torch.zeros(prototypes + 1, device=logits.device)
    if weight is None:
        mean = logits.mean(dim=0, dtype=torch.float32)
        return torch.cat([mean, mean.new_ones(1)])
    count = weight.sum()
    total = torch.zeros(logits.shape[1], device=logits.device)
    for rows in row_slices(logits):
        # no matrix product: its rounding on a GPU may be that of TF32
        total += (weight[rows, None] * logits[rows].float()).sum(dim=0)
    return torch.cat([total / count.clamp(min=1), (count > 0).float()[None]])
