"""The linear grid of a model whose vectors stand in tables: one Ray task, or a rank for each GPU.

Each rank reads its own parts of the table, and gradients are averaged over ranks, so the grid is
trained as by one rank with the whole batch. Memory of a rank: 2 GiB of kept rows at most, or twice
512 MiB of a table that is larger; three times the weights, which are 12 D R K numbers for four
blocks with means (640 MB for D = 1024 and 1,000 classes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.card.linear.ranks import on_ranks, ranks_of
from pipeline.card.linear.rows import Columns, Share, batches, standard_of, trained_parts
from pipeline.embed.vectors import VectorSet
from pipeline.errors import DataError
from pipeline.evaluate.score import Score
from pipeline.heartbeat import doing
from pipeline.uri import public

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.evaluate.classifiers.linear import Grid, Schedule

JUDGED_AT_ONCE = 1 << 25  # logits: 128 MiB
Labels = npt.NDArray[np.int64]
Chosen = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LabelledTable:
    """A table of vectors with labels that count in classes shared with other tables.

    Attributes:
        vectors: n rows.
        labels: int64 [n], -1 where unknown.
        ids: uint8 [n, 16].
    """

    vectors: VectorSet
    labels: Labels
    ids: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Assignment:
    """What all ranks are told.

    Attributes:
        reference: the table with rows that train and rows that choose.
        labels: int64 [n], of its rows, 0 to K - 1; -1 where they are not used.
        training: bool [n].
        choosing: bool [n].
        asked_set: the table that is asked.
        asked_labels: int64 [q]; -1 for a class that is not in training.
        asked: bool [q].
        classes: K.
        seed: of first weights and orders.
    """

    reference: VectorSet
    labels: Labels
    training: Chosen
    choosing: Chosen
    asked_set: VectorSet
    asked_labels: Labels
    asked: Chosen
    classes: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a rank gives back.

    Attributes:
        hits: float64 [H], sums over its images that choose.
        losses: float64 [H], likewise.
        rows: int64 [q], its images that are asked.
        asked_hits: bool [q, H].
    """

    hits: npt.NDArray[np.float64]
    losses: npt.NDArray[np.float64]
    rows: Labels
    asked_hits: Chosen


def linear_scores(
    reference: LabelledTable,
    queries: LabelledTable | None = None,
    gpu: bool = False,
    workers: int = 0,
    seed: int = 0,
) -> tuple[Score, dict[str, Any]]:
    """Top-1 of the best head of the grid (`evaluate/classifiers/linear.py`); needs a joined Ray.

    The grid takes what the table has: of models without patches, or of which `cls` alone was kept,
    it has fewer heads.

    Args:
        reference: what trains and chooses, without images that are also asked.
        queries: what is asked; None: a fifth of the reference, see `split.held_out`.
        gpu: ranks have a GPU each.
        workers: ranks; 0: one for each GPU of the cluster, without GPUs one in all.
        seed: of first weights and orders.

    Returns:
        `linear_top1`, and what is worth saying: `head` and `rate` of the best one, `heads` with the
        accuracy of all, `ranks`, and counts of images as `split.Counts` has them.

    Raises:
        DataError: no labelled image is left to train or to ask, or the tables are of two models.
    """
    from pipeline.evaluate.classifiers.linear import NAME
    from pipeline.evaluate.classifiers.split import LabelledRows, Split

    asked_set = queries or reference
    _check(reference.vectors, asked_set.vectors)
    rows = [LabelledRows(x.labels, x.ids) for x in (reference, queries) if x is not None]
    split = Split.of(rows[0], rows[1] if queries else None)
    details: dict[str, Any] = split.details()
    ids = asked_set.ids[split.asked]
    known = np.unique(reference.labels[split.training])
    if len(known) == 1:
        hits = asked_set.labels[split.asked] == known[0]
        return Score.of_hits(NAME, hits, ids), details | {"only_class": int(known[0])}
    assignment = Assignment(
        reference.vectors,
        _numbered(reference.labels, known),
        split.training,
        split.choosing,
        asked_set.vectors,
        _numbered(asked_set.labels, known),
        split.asked,
        len(known),
        seed,
    )
    parts = trained_parts(reference.vectors, split.training)
    ranks = min(ranks_of(gpu, workers), len(parts))
    with doing(f"linear grid of {split.counts.trained_on:,} images"):
        outcomes = on_ranks(train_and_judge, assignment, ranks, gpu)
    hits, more = _best(assignment, outcomes, ranks)
    return Score.of_hits(NAME, hits, ids), details | more


def _check(reference: VectorSet, queries: VectorSet) -> None:
    one, other = (Columns.of(vectors) for vectors in (reference, queries))
    if one != other or reference.facts["digest"] != queries.facts["digest"]:
        raise DataError(
            f"{public(reference.uri)} holds {_said(reference)}, {public(queries.uri)} "
            f"{_said(queries)}",
            "embed both sets with the same model and embed.outputs",
        )


def _said(vectors: VectorSet) -> str:
    columns = Columns.of(vectors)
    mean = " with means" if columns.mean else ""
    return f"{columns.blocks} blocks of {columns.dim}{mean} of {vectors.facts['model']}"


def _numbered(labels: Labels, known: Labels) -> Labels:
    """Labels as places among the known classes, -1 for others."""
    places = np.searchsorted(known, labels).clip(max=len(known) - 1)
    return np.where(known[places] == labels, places, -1)


# ---- On a rank.


def train_and_judge(assignment: Assignment, rank: int, ranks: int, device: str) -> Outcome:
    """Trains the grid with the other ranks, and judges this rank's part of the images."""
    import torch

    from pipeline.evaluate.classifiers.linear import Grid, train

    reference = assignment.reference
    columns = Columns.of(reference)
    standard = standard_of(reference, columns, assignment.training).to(device)
    share = Share(reference, columns, standard, rank, ranks, device)
    schedule = schedule_of(assignment, ranks)
    grid = Grid(columns.inputs(), assignment.classes, schedule.batch, assignment.seed, device)
    mine = batches(
        share, assignment.labels, assignment.training, schedule.batch // ranks, assignment.seed
    )
    train(grid, mine, schedule)
    hits = torch.zeros(len(grid.heads), dtype=torch.float64, device=device)
    losses = torch.zeros_like(hits)
    # Where no class has two images, those that train choose.
    choosing = assignment.choosing if assignment.choosing.any() else assignment.training
    for _, part_hits, part_losses in _judged(grid, share, assignment.labels, choosing):
        hits += part_hits.sum(0)
        losses += part_losses.double().sum(0)
    asked_share = Share(assignment.asked_set, columns, standard, rank, ranks, device)
    judged = _judged(grid, asked_share, assignment.asked_labels, assignment.asked)
    asked = [(rows, part_hits.cpu().numpy()) for rows, part_hits, _ in judged]
    none = (np.zeros(0, np.int64), np.zeros((0, len(grid.heads)), np.bool_))
    rows, asked_hits = (np.concatenate(each) for each in zip(none, *asked, strict=True))
    return Outcome(hits.cpu().numpy(), losses.cpu().numpy(), rows, asked_hits)


def schedule_of(assignment: Assignment, ranks: int) -> Schedule:
    """For the images that train."""
    from pipeline.evaluate.classifiers.linear import Schedule

    return Schedule.of(int(assignment.training.sum()), ranks)


def _judged(
    grid: Grid, share: Share, labels: Labels, wanted: Chosen
) -> Iterator[tuple[Labels, Tensor, Tensor]]:
    """Rows of this rank, hits bool [n, H] and losses [n, H]; a class that is unknown is a miss."""
    import torch

    truth = torch.from_numpy(labels)
    most = max(1, JUDGED_AT_ONCE // (len(grid.heads) * grid.classes))
    for part in share.parts():
        vectors, numbers = share.read(part, wanted)
        for at in range(0, len(numbers), most):
            rows = numbers[at : at + most]
            x, y = vectors[at : at + most], truth[rows].to(share.device)
            hits, losses = grid.judge(x, y.clamp(min=0))
            yield rows, hits & (y >= 0)[:, None], losses


def _best(
    assignment: Assignment, outcomes: Sequence[Outcome], ranks: int
) -> tuple[Chosen, dict[str, Any]]:
    """Hits bool [Q] of the best head, in the order of the rows, and what a card says."""
    import torch

    from pipeline.evaluate.classifiers.linear import RATES, Choosing, Head, details_of

    choosing = Choosing(
        torch.from_numpy(np.sum([one.hits for one in outcomes], 0)),
        torch.from_numpy(np.sum([one.losses for one in outcomes], 0)),
        int((assignment.choosing if assignment.choosing.any() else assignment.training).sum()),
    )
    rows = np.concatenate([one.rows for one in outcomes])
    hits = np.concatenate([one.asked_hits for one in outcomes])[np.argsort(rows)]
    heads = [
        Head(group, rate) for group in Columns.of(assignment.reference).inputs() for rate in RATES
    ]
    schedule = schedule_of(assignment, ranks)
    more = details_of(heads, choosing, torch.from_numpy(hits), schedule)
    return hits[:, choosing.best()], more | {"ranks": ranks}
