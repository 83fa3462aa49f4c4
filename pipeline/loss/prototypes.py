"""Cross entropy of student logits against teacher targets, a few rows at a time.

The gradient of a cross entropy is known in closed form, so it is written in the forward pass, in
the logits' own dtype, and no fp32 matrix `[rows, K]` is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.loss.target import Target

STUDENT_TEMPERATURE = 0.1


class Prediction(NamedTuple):
    """What some rows of the student's logits should be."""

    rows: slice
    target: Tensor  # [n, K] fp32, sums to any positive number a row
    weight: Tensor | float  # of each row in the sum: a number or [n]
    term: int  # the loss term the rows belong to


Predictions = Callable[[], Iterator[Prediction]]


def check_rows(loss: str, logits: Tensor, target: Target, rows: int) -> None:
    """Refuses logits that are not `[rows, K]`, with the K of the target.

    Raises:
        PipelineError: with both shapes.
    """
    prototypes = target.logits.shape[1]
    if tuple(logits.shape) != (rows, prototypes):
        raise PipelineError(
            f"{loss} got logits {list(logits.shape)} for a target {list(target.logits.shape)}, "
            f"expected [{rows}, {prototypes}]",
            "student and teacher need the same images, views and prototypes",
        )


def cross_entropy(
    logits: Tensor, predictions: Predictions, terms: int, temperature: float = STUDENT_TEMPERATURE
) -> Tensor:
    """Weighted sums of `-sum_k q_k log softmax(logits / temperature)_k`, one a term: fp32
    `[terms]`.

    A row of `logits` may occur in one prediction only. Rows that occur in none get no gradient.
    """
    sums: Tensor = _CrossEntropy.apply(logits, predictions, terms, temperature)
    return sums


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, predictions: Predictions, terms: int, temperature: float
    ) -> Tensor:
        sums = torch.zeros(terms, dtype=torch.float32, device=logits.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(logits) if needs_gradient else None
        spans: list[tuple[slice, int]] = []
        for rows, target, weight, term in predictions():
            scaled = logits[rows].float() / temperature
            mass = target.sum(dim=1, keepdim=True)
            length = torch.logsumexp(scaled, dim=1, keepdim=True)
            loss = (length * mass).squeeze(1) - torch.linalg.vecdot(target, scaled)
            sums[term] += (loss * weight).sum()
            if gradient is not None:
                scale = weight / temperature
                if isinstance(scale, Tensor):
                    scale = scale[:, None]
                probability = scaled.sub_(length).exp_().mul_(mass)
                gradient[rows] = (probability.sub_(target).mul_(scale)).to(gradient.dtype)
                spans.append((rows, term))
        ctx.gradient, ctx.spans = gradient, spans
        return sums

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = ctx.gradient
        if gradient is None:
            raise RuntimeError("cross_entropy keeps its gradient for one backward pass only")
        ctx.gradient = None
        for rows, term in ctx.spans:
            gradient[rows] *= grad_sums[term]
        return gradient, None, None, None
