"""Cross entropy of student logits against teacher targets.

The gradient of a cross entropy is known in closed form, so it is written down, in the logits' own
dtype, and no fp32 matrix `[rows, K]` is kept for the backward pass. K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.loss.form import Kernels, fused
from pipeline.loss.target import Target, slices

STUDENT_TEMPERATURE = 0.1


SECOND = "cross_entropy keeps what its gradient is made of for one backward pass only"
OF_GRADIENT = "the gradient of cross_entropy has no gradient of its own (create_graph=True)"


class Prediction(NamedTuple):
    """What some rows of the student's logits should be."""

    rows: slice
    target: Tensor  # [n, K] fp32, sums to any positive number a row
    weight: Tensor  # [n], of each row in the sum
    term: int  # the loss term the rows belong to


@dataclass(frozen=True)
class Span:
    """Rows of the student's logits that one target predicts, crop-major.

    I images, C crops of each, and a target of G * I rows: row `first + c * I + i` of the logits is
    crop c of image i, and meets the sum of the target's rows `g * I + i` of all g. A masked patch
    is an image of one crop here.
    """

    target: Target
    weight: Tensor  # [I] fp32, of each image in the sum; 0: its rows count in nothing
    terms: tuple[int, ...]  # [C], the loss term of each crop
    first: int = 0
    others: bool = False  # crop c meets the rows of g != c only

    @property
    def crops(self) -> int:
        """Rows of the target for each image, G."""
        return len(self.target.row) // max(len(self.weight), 1)

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.first + len(self.terms) * len(self.weight)

    def dense(self) -> Span:
        """The same with rows one behind the other in memory, as kernels read them."""
        target = replace(self.target, logits=self.target.logits.contiguous())
        return replace(self, target=target, weight=self.weight.contiguous())

    def predictions(self) -> Iterator[Prediction]:
        """The rows in parts, with their probabilities; each target is made once."""
        images, logits = len(self.weight), self.target.logits
        for part in slices(images, logits.shape[1], logits.device):

            def crop(number: int, first: int = 0, part: slice = part) -> slice:
                start = first + number * images
                return slice(start + part.start, start + part.stop)

            each = [self.target.probabilities(crop(number)) for number in range(self.crops)]
            every: Tensor | None = None
            for number, term in enumerate(self.terms):
                if self.others and number < len(each):
                    one, *more = each[:number] + each[number + 1 :]
                    target = sum(more, start=one)
                else:
                    if every is None:
                        every = each[0]
                        for other in each[1:]:
                            every.add_(other)  # crops of their own come first
                    target = every
                yield Prediction(crop(number, self.first), target, self.weight[part], term)


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
    logits: Tensor,
    spans: Sequence[Span],
    terms: int,
    temperature: float = STUDENT_TEMPERATURE,
    overwrite: bool = False,
    kernels: Kernels = "auto",
) -> Tensor:
    """Weighted sums of `-sum_k q_k log softmax(logits / temperature)_k`, one a term: fp32
    `[terms]`.

    Args:
        logits: `[N, K]`. Rows that are in no span get no gradient.
        spans: without rows in common.
        terms: number of sums.
        temperature: of the student.
        overwrite: put the gradient where the logits are. Nobody may read them afterwards, and they
            are no leaf of the graph.
        kernels: what computes, see `fused`.

    Raises:
        PipelineError: Triton is asked for and cannot be had.
    """
    form = _Fused if fused(kernels, logits) else _CrossEntropy
    sums: Tensor = form.apply(logits, spans, terms, temperature, overwrite)  # type: ignore[no-untyped-call]
    return sums


def between(spans: Sequence[Span], rows: int) -> Iterator[slice]:
    """The rows of `rows` that are in no span."""
    start = 0
    for span in sorted(spans, key=lambda span: span.first):
        if span.first > start:
            yield slice(start, span.first)
        start = max(start, span.stop)
    if rows > start:
        yield slice(start, rows)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        spans: Sequence[Span],
        terms: int,
        temperature: float,
        overwrite: bool,
    ) -> Tensor:
        sums = torch.zeros(terms, dtype=torch.float32, device=logits.device)
        gradient: Tensor | None = None
        if ctx.needs_input_grad[0]:
            gradient = logits.detach() if overwrite else torch.empty_like(logits)
            for rows in between(spans, len(logits)):
                gradient[rows] = 0
        parts: list[tuple[slice, int]] = []
        for rows, target, weight, term in (each for span in spans for each in span.predictions()):
            scaled = logits[rows].float() / temperature
            mass = target.sum(dim=1, keepdim=True)
            length = torch.logsumexp(scaled, dim=1, keepdim=True)
            loss = (length * mass).squeeze(1) - torch.linalg.vecdot(target, scaled)
            sums[term] += (loss * weight).sum()
            if gradient is not None:
                probability = scaled.sub_(length).exp_().mul_(mass)
                gradient[rows] = probability.sub_(target).mul_((weight / temperature)[:, None])
                parts.append((rows, term))
        ctx.gradient, ctx.parts = gradient, parts
        return sums

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor, None, None, None, None]:
        gradient = ctx.gradient
        if gradient is None or torch.is_grad_enabled():
            raise RuntimeError(SECOND if gradient is None else OF_GRADIENT)
        ctx.gradient = None
        # Where the host knows the numbers at no cost, a factor of 1 saves a pass over the matrix.
        factors = grad_sums.tolist() if grad_sums.device.type == "cpu" else list(grad_sums)
        for rows, term in ctx.parts:
            if isinstance(factors[term], Tensor) or factors[term] != 1.0:
                gradient[rows] *= factors[term]
        return gradient, None, None, None, None


class _Fused(torch.autograd.Function):
    """The same in Triton. The gradient is made in the backward pass, where its factors are known:
    made in the forward pass it would be read and written once more. Logits and target are held
    until then, which is less than logits and gradient; the backward pass begins with this.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        spans: Sequence[Span],
        terms: int,
        temperature: float,
        overwrite: bool,
    ) -> Tensor:
        from pipeline.loss import row_kernels

        rows = logits.detach().contiguous()
        sums = torch.zeros(terms, dtype=torch.float32, device=logits.device)
        kept = []
        spans = [span.dense() for span in spans]
        for span in spans:
            of_crops, numbers = row_kernels.forward(rows, span, temperature)
            kept.append(numbers)
            for term in sorted(set(span.terms)):
                first = span.terms.index(term)
                stop = first + span.terms.count(term)
                sums[term] += of_crops[first:stop].sum()
        ctx.kept = (rows, list(zip(spans, kept, strict=True)), temperature, overwrite)
        return sums

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor, None, None, None, None]:
        from pipeline.loss import row_kernels

        if ctx.kept is None or torch.is_grad_enabled():
            raise RuntimeError(SECOND if ctx.kept is None else OF_GRADIENT)
        logits, spans, temperature, overwrite = ctx.kept
        ctx.kept = None
        gradient = logits if overwrite else torch.empty_like(logits)
        for rows in between([span for span, _ in spans], len(logits)):
            gradient[rows] = 0
        upstream = grad_sums.contiguous()
        for span, kept in spans:
            row_kernels.backward(logits, gradient, span, temperature, kept, upstream)
        if overwrite:  # torch does not see what kernels write: who kept the logits is to be told
            torch.autograd.graph.increment_version(logits)
        return gradient, None, None, None, None
