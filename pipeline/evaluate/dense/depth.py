"""Depth from patches by two small heads, and what an image adds to their errors.

Depths are in units of the files; 0 is unknown. Shapes: n images, B of them in a batch, h x w
patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.evaluate.dense.fit import UPSAMPLING, Schedule, fit, moments

BINS = 256
FLOOR = 0.1  # added to each bin before they are normalised (DINOv2 `depth/models`, "linear")
HIDDEN = 256
VARIANCE, MEAN = 1.0, 0.15  # SigLoss: sqrt(var(g) + .15 mean(g)^2), g the difference of logarithms
GRADIENT_WEIGHT = 0.5  # DINOv2, settings of the depth heads
SCALES = (1, 2, 4, 8)  # of the gradient loss (Li and Snavely 2018, "MegaDepth", section 4.2)
EPSILON = 1e-3
# The floor of the bins has the weight of 26 full ones, so that weights must grow far: on made
# scenes the relative error is 0.62 after 300 steps, 0.32 after 1,000. The reference takes 38,400.
LINEAR = Schedule(steps=1000, batch=16, lr=1e-1, weight_decay=1e-3)
SMALL = Schedule(steps=600, batch=16, lr=1e-2, weight_decay=1e-2)


@dataclass(frozen=True)
class Seen:
    """What a head gets of images.

    Attributes:
        tokens: [B, h, w, D].
        cls: [B, D], or of another width.
    """

    tokens: Tensor
    cls: Tensor

    def rows(self, rows: Tensor) -> Seen:
        """Some of the images."""
        return Seen(self.tokens[rows], self.cls[rows])


@dataclass(frozen=True)
class Range:
    """From the smallest to the largest depth that a head can answer."""

    low: float
    high: float

    @classmethod
    def of(cls, depths: Tensor) -> Range:
        """Of known depths: from the 0.1th to the 99.9th percentile, so that one wrong pixel does
        not stretch the bins.
        """
        known = depths[depths > 0]
        sample = known[:: max(1, len(known) // 1_000_000)].double()  # torch takes up to 16 million
        low, high = torch.quantile(sample, sample.new_tensor([0.001, 0.999]))
        return cls(float(low), float(high))


class LinearDepth:
    """A linear layer on patch and CLS to 256 bins, as DINOv2's "linear" on the last block.

    The layer comes before the upsampling by four: both are linear, so the order changes no value,
    and a sixteenth of the products is computed. Features are of mean 0 and deviation 1, which the
    reference does not do: it changes how fast the layer is fitted, not what it can say.
    """

    def __init__(self, seen: Seen, span: Range, generator: torch.Generator) -> None:
        device, width = seen.tokens.device, seen.tokens.shape[-1]
        self.patch, self.cls = moments(seen.tokens), moments(seen.cls)
        drawn = 0.01 * torch.randn(BINS, width + seen.cls.shape[-1], generator=generator)
        self.weight = drawn.to(device).requires_grad_()
        self.bias = torch.zeros(BINS, device=device, requires_grad=True)
        self.bins = torch.linspace(span.low, span.high, BINS, device=device)

    @property
    def weights(self) -> list[Tensor]:
        """What is fitted."""
        return [self.weight, self.bias]

    def __call__(self, seen: Seen, times: int = UPSAMPLING) -> Tensor:
        """Depth float32 [B, times * h, times * w]."""
        width = seen.tokens.shape[-1]
        patches, cls = _standard(seen.tokens, self.patch), _standard(seen.cls, self.cls)
        logits = F.linear(patches, self.weight[:, :width]) + F.linear(
            cls, self.weight[:, width:], self.bias
        ).unsqueeze(1).unsqueeze(1)
        shares = torch.relu(_upsampled(logits.permute(0, 3, 1, 2), times)) + FLOOR
        return torch.einsum("bkhw,k->bhw", shares, self.bins) / shares.sum(1)


class SmallDepth:
    """Patch to 256, ReLU, to 1, sigmoid, over the range: the small head of a common lesson."""

    def __init__(self, seen: Seen, span: Range, generator: torch.Generator) -> None:
        device, width = seen.tokens.device, seen.tokens.shape[-1]
        self.patch, self.span = moments(seen.tokens), span
        first = torch.randn(HIDDEN, width, generator=generator) * (2 / width) ** 0.5
        last = torch.randn(1, HIDDEN, generator=generator) * (1 / HIDDEN) ** 0.5
        self.weights = [
            one.to(device).requires_grad_()
            for one in (first, torch.zeros(HIDDEN), last, torch.zeros(1))
        ]

    def __call__(self, seen: Seen, times: int = UPSAMPLING) -> Tensor:
        """Depth float32 [B, times * h, times * w]."""
        first, first_bias, last, last_bias = self.weights
        hidden = torch.relu(F.linear(_standard(seen.tokens, self.patch), first, first_bias))
        share = torch.sigmoid(F.linear(hidden, last, last_bias)).permute(0, 3, 1, 2)
        return self.span.low + (self.span.high - self.span.low) * _upsampled(share, times)[:, 0]


Head = LinearDepth | SmallDepth


def fitted(
    kind: Callable[[Seen, Range, torch.Generator], Head],
    seen: Seen,
    depths: Tensor,
    schedule: Schedule,
) -> Head:
    """A head that is fitted by the losses of DINOv2: SigLoss and half of the gradient loss.

    Args:
        kind: `LinearDepth` or `SmallDepth`.
        seen: n images.
        depths: float32 [n, h, w], 0 where unknown: in the middle of each patch, where the bilinear
            scores between patches are those of the patches, for a sixteenth of the cost.
        schedule: of the fit.
    """
    generator = schedule.generator()
    head = kind(seen, Range.of(depths), generator)

    def loss(rows: Tensor) -> Tensor:
        rows = rows.to(depths.device)
        truth, answer = depths[rows], head(seen.rows(rows), times=1)
        return scale_loss(answer, truth) + GRADIENT_WEIGHT * gradient_loss(answer, truth)

    fit(head.weights, len(depths), loss, schedule, generator)
    return head


def scale_loss(answer: Tensor, truth: Tensor) -> Tensor:
    """SigLoss (Eigen et al. 2014, with the root and weights of AdaBins) of depths [B, h, w]."""
    known = truth > 0
    g = torch.log(answer[known].clamp(min=EPSILON)) - torch.log(truth[known].clamp(min=EPSILON))
    if len(g) < 2:
        return (answer * 0).sum()
    return (VARIANCE * g.var() + MEAN * g.mean().square() + 1e-12).sqrt()


def gradient_loss(answer: Tensor, truth: Tensor) -> Tensor:
    """How much steps between pixels differ in logarithms, at four scales, of depths [B, h, w].

    Li and Snavely 2018, "MegaDepth", equation 3: sums over pixels of the absolute difference of
    horizontal and vertical steps, over the known pixels.
    """
    total = (answer * 0).sum()
    g = torch.log(answer.clamp(min=EPSILON)) - torch.log(truth.clamp(min=EPSILON))
    for scale in SCALES:
        part, known = g[:, ::scale, ::scale], (truth > 0)[:, ::scale, ::scale]
        count = known.sum().clamp(min=1)
        for axis in (1, 2):
            steps = part.diff(dim=axis).abs()
            length = known.shape[axis]
            both = known.narrow(axis, 0, length - 1) & known.narrow(axis, 1, length - 1)
            total = total + torch.where(both, steps, 0).sum() / count
    return total


def depth_errors(answer: Tensor, truth: Tensor) -> tuple[float, float, float, float]:
    """Sums over the known pixels of an image: squared error, relative error, pixels with delta
    below 1.25, and pixels (Eigen et al. 2014, section 4.2).

    Args:
        answer: float32 [H, W], above 0.
        truth: likewise; 0 where unknown.
    """
    known = truth > 0
    p, t = answer[known].double(), truth[known].double()
    close = torch.maximum(p / t, t / p) < 1.25
    sums = ((p - t).square().sum(), ((p - t).abs() / t).sum(), close.sum(), known.sum())
    squared, relative, near, pixels = (float(one) for one in sums)
    return squared, relative, near, pixels


def _standard(x: Tensor, moments_: tuple[Tensor, Tensor]) -> Tensor:
    return (x.float() - moments_[0]) / moments_[1]


def _upsampled(x: Tensor, times: int) -> Tensor:
    return F.interpolate(x, scale_factor=times, mode="bilinear")
