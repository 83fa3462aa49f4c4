"""DINOv2's linear evaluation (`eval/linear.py`) on stored vectors: every head of its grid at once.

A head is a linear layer. The grid has a head for each of 13 learning rates, of the CLS tokens of
the last block or of the last four, with the mean of the last block's patches or without: 52. All
see the same batches. They learn by SGD with momentum 0.9, no weight decay, and a learning rate that
falls to zero along a cosine; weights begin at N(0, 0.01), biases at 0.

What differs from the reference, and what follows:

* Vectors are stored, one of each image in its centre crop. The reference embeds random crops and
  mirrored images on the fly, which is worth some tenths of a point and costs a pass of the network
  for each epoch. Scores of models are comparable with each other, not with published ones.
* Vectors are standardised, see `standard.py`, so that the rates suit any model.
* The best head is chosen on a tenth of the training images. The reference chooses it on the images
  that it then reports, which flatters by the luck of the best of 52.
* Small sets are seen more often than ten times: at least MIN_STEPS batches.

Shapes: B images of a batch, D width, F numbers of an image's inputs, w those that a head takes,
R learning rates, K classes, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.loss.collectives import all_sum

NAME = "linear_top1"
# For a batch of 256; proportional to the batch. DINOv2 eval/linear.py, paper section 7.1.
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
RATE_BATCH = 256
MOMENTUM = 0.9
DEVIATION = 0.01  # of the first weights
EPOCHS = 10
BATCH = 1024  # 128 on each of 8 GPUs
MIN_STEPS = 1000
MAX_STEPS = 12_500  # 10 epochs of 1,250 batches: all of ImageNet ten times


@dataclass(frozen=True)
class Inputs:
    """What the heads of one group take of an image.

    Attributes:
        name: for people, `last 4 blocks + mean of patches`.
        start: of their numbers among the F.
        stop: behind the last of them.
    """

    name: str
    start: int
    stop: int


def inputs_of(dim: int, blocks: int, has_mean: bool) -> tuple[Inputs, ...]:
    """The groups of heads for vectors [block, ..., last block, mean of its patches], F numbers.

    Args:
        dim: D.
        blocks: stored CLS tokens; 1 for models that have no more.
        has_mean: models without patches have none, so half as many heads.
    """
    cls = blocks * dim
    last = [("last block", cls - dim)]
    if blocks > 1:
        last.append((f"last {blocks} blocks", 0))
    ends = [("", cls)] + [(" + mean of patches", cls + dim)] * has_mean
    return tuple(Inputs(name + more, start, stop) for name, start in last for more, stop in ends)


@dataclass(frozen=True)
class Schedule:
    """How long it takes.

    Attributes:
        batch: images of a step, of all ranks together.
        steps: of SGD.
    """

    batch: int
    steps: int

    @classmethod
    def of(cls, images: int, ranks: int = 1) -> Schedule:
        """Ten epochs in batches of 1,024, as the reference; of few images, smaller batches and more
        epochs. The batch is a multiple of the ranks.
        """
        batch = min(BATCH, max(32, 2 ** int(math.log2(max(1, images / 16)))))
        batch = -(-batch // ranks) * ranks
        steps = -(-EPOCHS * images // batch)
        return cls(batch, min(MAX_STEPS, max(MIN_STEPS, steps)))

    def factor(self, step: int) -> float:
        """Of the learning rates: a cosine from 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class Head:
    """One head of the grid: its inputs, and its learning rate for a batch of 256."""

    inputs: Inputs
    rate: float

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.inputs.name}, rate {self.rate:g}"


class Grid:
    """All heads, trained together; those of the same inputs as one matrix product.

    Args:
        inputs: groups of heads.
        classes: K.
        batch: images of a step, of all ranks together; rates are proportional to it.
        seed: of the first weights.
        device: where they are.
    """

    def __init__(
        self,
        inputs: Sequence[Inputs],
        classes: int,
        batch: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.inputs, self.classes = tuple(inputs), classes
        rates = torch.tensor(RATES, device=device) * (batch / RATE_BATCH)
        self._rates = rates.repeat_interleave(classes)
        generator = torch.Generator().manual_seed(seed)
        self.weights = []  # [w + 1, R * K] for each group, the last row the biases
        for group in self.inputs:
            shape = (group.stop - group.start + 1, len(RATES) * classes)
            weights = torch.randn(shape, generator=generator) * DEVIATION
            weights[-1] = 0
            self.weights.append(weights.to(device))
        self._speeds = [torch.zeros_like(weights) for weights in self.weights]
        self._gradients = [torch.empty_like(weights) for weights in self.weights]

    @property
    def heads(self) -> tuple[Head, ...]:
        """All H, in the order in which `judge` has them."""
        return tuple(Head(group, rate) for group in self.inputs for rate in RATES)

    @torch.no_grad()
    def step(self, x: Tensor, labels: Tensor, batch: int, factor: float) -> None:
        """One step of SGD with the mean gradient of the batch.

        Args:
            x: this rank's part of the batch, float32 [b, F].
            labels: int64 [b], 0 to K - 1.
            batch: B, images of the parts of all ranks together.
            factor: of the learning rates.
        """
        for group, weights, speed, gradient in zip(
            self.inputs, self.weights, self._speeds, self._gradients, strict=True
        ):
            columns = x[:, group.start : group.stop]
            errors = self._logits(columns, weights).softmax(2)
            errors[torch.arange(len(x), device=x.device), :, labels] -= 1
            flat = errors.flatten(1).div_(batch)
            torch.mm(columns.T, flat, out=gradient[:-1])
            torch.sum(flat, 0, out=gradient[-1])
            # As torch.optim.SGD: the speed is not scaled by the rate.
            speed.mul_(MOMENTUM).add_(all_sum(gradient))
            weights.addcmul_(speed, self._rates, value=-factor)

    @torch.no_grad()
    def judge(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Hits bool [b, H] and cross-entropies float32 [b, H] of images [b, F]."""
        hits, losses = [], []
        for group, weights in zip(self.inputs, self.weights, strict=True):
            logits = self._logits(x[:, group.start : group.stop], weights)
            hits.append(logits.argmax(2) == labels[:, None])
            truth = labels[:, None].expand(-1, len(RATES))
            losses.append(functional.cross_entropy(logits.mT, truth, reduction="none"))
        return torch.cat(hits, 1), torch.cat(losses, 1)

    def _logits(self, columns: Tensor, weights: Tensor) -> Tensor:
        """[b, R, K]."""
        logits = torch.addmm(weights[-1], columns, weights[:-1])
        return logits.view(len(columns), len(RATES), self.classes)


def train(grid: Grid, batches: Iterable[tuple[Tensor, Tensor]], schedule: Schedule) -> None:
    """Trains all heads.

    Args:
        grid: of the same weights on all ranks.
        batches: endless; this rank's part of each batch: float32 [b, F] and labels int64 [b].
        schedule: the same on all ranks.
    """
    for step, (x, labels) in zip(range(schedule.steps), batches, strict=False):
        grid.step(x, labels, schedule.batch, schedule.factor(step))


@dataclass(frozen=True)
class Choosing:
    """Sums over the images that choose the head, added up over ranks.

    Attributes:
        hits: float64 [H].
        losses: float64 [H].
        images: how many.
    """

    hits: Tensor
    losses: Tensor
    images: int

    def __add__(self, other: Choosing) -> Choosing:
        return Choosing(
            self.hits + other.hits, self.losses + other.losses, self.images + other.images
        )

    def best(self) -> int:
        """The head with the most hits; of equal ones that with the least loss. A head that learnt
        so fast that its loss is no number is the last one.
        """
        lost = (~torch.isfinite(self.losses)).tolist()
        hits, losses = self.hits.tolist(), self.losses.tolist()
        return min(range(len(hits)), key=lambda h: (lost[h], -hits[h], losses[h]))


def details_of(
    heads: Sequence[Head], choosing: Choosing, hits: Tensor, schedule: Schedule
) -> dict[str, Any]:
    """What a card says of the grid.

    Args:
        heads: H.
        choosing: what they were chosen by.
        hits: bool [Q, H], of the images that are asked.
        schedule: of the training.

    Returns:
        `head` and `rate` of the best one; `heads`, for each the accuracy on the images that choose
        and on those that are asked; `best_of_asked`, what the best of all would score there, which
        is what the reference reports.
    """
    best = choosing.best()
    asked = hits.double().mean(0)
    return {
        "head": heads[best].inputs.name,
        "rate": heads[best].rate,
        "steps": schedule.steps,
        "batch": schedule.batch,
        "best_of_asked": float(asked.max()),
        "heads": [
            {
                "inputs": head.inputs.name,
                "rate": head.rate,
                "chosen_on": float(choosing.hits[h]) / max(1, choosing.images),
                "asked": float(asked[h]),
            }
            for h, head in enumerate(heads)
        ],
    }
