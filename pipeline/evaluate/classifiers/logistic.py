"""Logistic regression on stored vectors: the quick form of a linear evaluation.

What it minimises is scikit-learn's: C * sum of the cross-entropies + |W|^2 / 2, the intercept not
penalised. DINOv2 (`eval/log_regression.py`) tries 45 values of C, evenly spaced between 1e-6 and
1e5 on a log scale; the one with the most hits on a tenth of the training images is fitted again on
all of them. Here the path is shorter: decades of C from the strongest penalty on, each begun where
the one before ended, until the loss on the tenth rises; then half a decade to both sides of the
best. The loss decides and not the hits, of which a tenth of a small set has too few. Vectors are
standardised, so that C means the same for vectors of any scale.

Shapes: N training images, Q asked images, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.evaluate.blocks import finite
from pipeline.evaluate.classifiers.split import LabelledRows, Split
from pipeline.evaluate.classifiers.standard import ROWS_AT_ONCE, Standard
from pipeline.evaluate.features import LabelledFeatures
from pipeline.evaluate.score import Score

NAME = "logistic_top1"
PENALTIES = tuple(10.0**n for n in range(-6, 4))  # C
HALF = 10**0.5
ALONE = 1.0  # C where no image can choose; scikit-learn's default
STEPS = 300  # of L-BFGS at most; scikit-learn: 100, DINOv2: 1000
TOLERANCE = 1e-5  # derivative of the mean loss in the coordinates of `Problem.fit`
ROUGHLY = 1e-4  # the same while C is chosen
# Numbers of a block: 256 MiB on a GPU; on a CPU 4 MiB, which stay in its cache between products.
AT_ONCE = {"cpu": 1 << 20}
AT_ONCE_ELSEWHERE = 1 << 26


def logistic_scores(
    reference: LabelledFeatures, queries: LabelledFeatures | None, classes: int
) -> tuple[Score, dict[str, Any]]:
    """Top-1 of multinomial logistic regression on CLS vectors.

    The maths is done where the vectors are. Beside them it keeps one copy in float32, and logits of
    256 MiB at most. Vectors of a large table are read from it (`card/inputs/stored.py`).

    Args:
        reference: N and more rows; those with a label train, without those that are also asked.
        queries: rows with a label are asked. None: a fifth of the reference, see `split.held_out`.
        classes: more than any label. A class may have no image in training; its queries are wrong.

    Returns:
        `logistic_top1`, and what is worth saying: C, loss and accuracy of each C that was tried,
        counts of images as `split.Counts` has them, and `converged`.

    Raises:
        DataError: no labelled image is left to train or to ask, vectors have no ids, or are not
            finite.
    """
    asked_set = reference if queries is None else queries
    split = Split.of(
        LabelledRows.of(reference), None if queries is None else LabelledRows.of(queries)
    )
    device = reference.features.device
    # Those that choose come last, so that both kinds of fits see a slice and no copy.
    rows = torch.from_numpy(split.training).nonzero()[:, 0]
    chosen_on = torch.from_numpy(split.choosing).nonzero()[:, 0]
    training = len(rows)
    rows = torch.cat([rows, chosen_on])
    standard = Standard.of(reference.features, rows)
    x = standard.of_rows(reference.features, rows)
    known, y = torch.unique(reference.labels[rows], return_inverse=True)
    asked = torch.from_numpy(split.asked).nonzero()[:, 0]
    truth = asked_set.labels[asked]
    details: dict[str, Any] = split.details()
    if len(known) == 1:
        answers = known.expand(len(asked))
        details["only_class"] = int(known)
    else:
        fit, tried = _chosen(Problem.of(x, y.to(device), len(known)), training)
        details |= {"c": fit.c, "converged": fit.converged}
        details["by_c"] = {f"{c:.3g}": asdict(one) for c, one in sorted(tried.items())}
        guess = _in_blocks(
            asked_set.features, asked, lambda part: fit.answers(standard(part.to(device)))
        )
        answers = known[guess]
    hits = (answers == truth).numpy()
    ids = LabelledRows.of(asked_set).ids[split.asked]
    return Score.of_hits(NAME, hits, ids), details


@dataclass(frozen=True)
class Fit:
    """A fitted model.

    Attributes:
        c: the inverse of the penalty.
        weights: float64 [D + 1, K], the last row the intercepts.
        converged: no step made it better, before the steps were over.
    """

    c: float
    weights: Tensor
    converged: bool

    def answers(self, x: Tensor) -> Tensor:
        """Classes int64 of standardised vectors [n, D]."""
        return _logits(x, self.weights.float()).argmax(1)


@dataclass(frozen=True)
class Problem:
    """Vectors to be told apart.

    Attributes:
        x: float32 [N, D], standardised.
        y: int64 [N], on the device of x, less than `classes`.
        classes: K.
        axes: float64 [D, D], a column for each principal axis of x.
        spread: float64 [D], mean square of x along each of them.
    """

    x: Tensor
    y: Tensor
    classes: int
    axes: Tensor
    spread: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, classes: int) -> Problem:
        """With the axes of all of x."""
        zeros = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        moments = sum(((part.T @ part).double() for part in torch.split(x, ROWS_AT_ONCE)), zeros)
        spread, axes = torch.linalg.eigh(moments / len(x))
        return cls(x, y, classes, axes, spread.clamp(min=0))

    def first(self, rows: int) -> Problem:
        """Of the first rows alone, no copy."""
        return replace(self, x=self.x[:rows], y=self.y[:rows])

    def fit(self, c: float, start: Tensor | None = None, tolerance: float = TOLERANCE) -> Fit:
        """Fits by L-BFGS with a strong Wolfe line search, without a random number.

        The steps are taken in coordinates in which the curvature at equal probabilities is one in
        all directions: vectors of a network have a few long axes and many short ones, and without
        it the many would take hundreds of steps. It moves the path, not the minimum.

        Args:
            c: inverse of the penalty.
            start: weights float64 [D + 1, K] to begin with; None: zeros.
            tolerance: largest derivative at the end.
        """
        penalty = 1 / (c * len(self.x))
        curvature = self.spread / self.classes + penalty
        wide = functional.pad(self.axes * curvature.rsqrt() @ self.axes.T, (0, 1, 0, 1))
        wide[-1, -1] = self.classes**0.5  # of the intercepts
        if start is None:
            steps = wide.new_zeros(len(wide), self.classes)
        else:
            steps = torch.linalg.solve(wide, start)
        steps.requires_grad_()
        optimizer: Any = torch.optim.LBFGS(
            [steps],
            max_iter=STEPS,
            max_eval=2 * STEPS,
            tolerance_grad=tolerance,
            tolerance_change=TOLERANCE**2,  # of the loss
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            with torch.no_grad():
                value, gradient = _mean_loss(self.x, self.y, wide @ steps, penalty)
                steps.grad = wide @ gradient
            return value

        optimizer.step(loss)
        taken = optimizer.state[steps]
        converged = taken["n_iter"] < STEPS and taken["func_evals"] < 2 * STEPS
        return Fit(c, wide @ steps.detach(), converged)


@dataclass(frozen=True)
class Quality:
    """Of a fit on images that choose: mean cross-entropy, and share of hits."""

    loss: float
    accuracy: float


def _chosen(problem: Problem, train: int) -> tuple[Fit, dict[float, Quality]]:
    """The fit of all rows with the C that has the least loss on those after the first `train`, and
    what each C had there.
    """
    if train == len(problem.x):
        return problem.fit(ALONE), {}
    part, x, y = problem.first(train), problem.x[train:], problem.y[train:]
    tried: dict[float, Quality] = {}
    fits: dict[float, Fit] = {}

    def try_out(c: float, start: Tensor | None) -> None:
        fits[c] = part.fit(c, start, ROUGHLY)
        tried[c] = _quality(fits[c], x, y)

    def best() -> float:
        return min(tried, key=lambda c: tried[c].loss)

    last: Tensor | None = None
    for c in PENALTIES:
        try_out(c, last)
        last = fits[c].weights
        if best() != c:
            break
    middle = best()
    for c in (middle / HALF, middle * HALF):
        try_out(c, fits[middle].weights)
    c = best()
    return problem.fit(c, fits[c].weights), tried


def _quality(fit: Fit, x: Tensor, y: Tensor) -> Quality:
    hits, loss = 0, 0.0
    for at in range(0, len(x), ROWS_AT_ONCE):
        logits = _logits(x[at : at + ROWS_AT_ONCE], fit.weights.float())
        labels = y[at : at + ROWS_AT_ONCE]
        hits += int((logits.argmax(1) == labels).sum())
        loss += float(functional.cross_entropy(logits.double(), labels, reduction="sum"))
    return Quality(loss / len(x), hits / len(x))


def _mean_loss(x: Tensor, y: Tensor, weights: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy with the penalty, float64 0-d, and its gradient [D + 1, K].

    Products are in float32, sums over blocks of images in float64.
    """
    total = weights.new_zeros(())
    gradient = torch.zeros_like(weights)
    single = weights.float()
    part = max(1, AT_ONCE.get(x.device.type, AT_ONCE_ELSEWHERE) // max(weights.shape))
    for at in range(0, len(x), part):
        vectors, labels = x[at : at + part], y[at : at + part, None]
        logs = _logits(vectors, single).log_softmax(1)
        total -= logs.gather(1, labels).sum(dtype=torch.float64)
        errors = logs.exp_()
        errors.scatter_add_(1, labels, errors.new_full(labels.shape, -1.0))
        gradient[:-1] += (errors.T @ vectors).T
        gradient[-1] += errors.sum(0, dtype=torch.float64)
    inner = weights[:-1]
    gradient /= len(x)
    gradient[:-1] += penalty * inner
    return total / len(x) + 0.5 * penalty * inner.square().sum(), gradient


def _logits(x: Tensor, weights: Tensor) -> Tensor:
    return torch.addmm(weights[-1], x, weights[:-1])


def _in_blocks(x: Tensor, rows: Tensor, answers: Callable[[Tensor], Tensor]) -> Tensor:
    """Answers int64 on the CPU to rows of x, a few at a time."""
    parts = torch.split(rows.to(x.device), ROWS_AT_ONCE)
    return torch.cat([answers(finite(x[part])).cpu() for part in parts])
