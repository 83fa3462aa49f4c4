"""Retrieval with labels: are the images of a query's class ranked before all others?

k-NN asks the nearest few; mean average precision asks where every image of the class stands. So a
backbone whose classes fall into many small groups can vote well and retrieve badly.

Similarities are those of `exact.py`: exact sums, so ties are real ones. Images that are equally
similar share one place: the precision there counts all of them, as scikit-learn's
`average_precision_score` does. For recall they count against the query: of equally similar images
those of other classes come first. So no score depends on the order of rows.

Memory: 1 GiB of work, and the reference in its exact form while that is under 2 GiB, or on a GPU
under half of what is free. Else it is made again, block by block, twice for each part of the
queries. A part is as many queries as have 2^25 images of their classes together: all of 2,000 with
1,000 classes of 1,300 images. Of features that are read from a table (`card/inputs/stored.py`),
only a block is in memory.

Shapes: N reference images, q queries of a part, R images of a query's class, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluate.blocks import in_blocks
from pipeline.evaluate.features import LabelledFeatures, as_array
from pipeline.evaluate.neighbours.exact import MIDDLE_ROWS, Frame, Placed, ranking
from pipeline.evaluate.neighbours.nearest import SameImages
from pipeline.evaluate.score import Score

QUERIES = 2000  # their 95 % interval of a mean average precision is about 0.01 wide on each side
RECALL_AT = (1, 5, 10)
AT_ONCE = 1 << 23  # similarities: 64 MiB in doubles
OWN_AT_ONCE = 1 << 25  # similarities of images of the queries' classes: 256 MiB
BLOCK_VALUES = 1 << 24  # of vectors: 64 MiB
KEPT_BYTES = 2 << 30  # of the reference in its exact form

Details = dict[str, Any]
Rows = npt.NDArray[np.int64]


def retrieval_scores(
    reference: LabelledFeatures,
    queries: LabelledFeatures | None = None,
    limit: int = QUERIES,
    recall_at: Sequence[int] = RECALL_AT,
    seed: int = 0,
) -> list[tuple[Score, Details]]:
    """Mean average precision over the full ranking, and recall among the first few.

    `retrieval_map` is the mean over queries of the average precision: the mean, over the reference
    images of the query's class, of the share of that class among all images down to each of them.
    `retrieval_recall5` is the share of queries that have at least one image of their class among
    the 5 most similar. No query retrieves an image with its own id. A query of a class that no
    other image has counts as 0 in both.

    Args:
        reference: what is ranked; rows without a label are not.
        queries: None: the reference's images are asked, each against all others.
        limit: queries at most; drawn by their ids, so that all models have the same ones.
        recall_at: numbers of images for recall.
        seed: another one draws others.

    Returns:
        each score with `queries`, `of` how many with a label, `reference`, and `without_any`, the
        queries of a class that no other image has.

    Raises:
        DataError: no labelled images to ask or to rank, no ids, or unlike widths.
    """
    asked_set = reference if queries is None else queries
    ranked, known = _labelled(reference), _labelled(asked_set)
    _check(reference, asked_set, len(ranked), len(known))
    assert reference.ids is not None and asked_set.ids is not None
    labels = asked_set.labels.cpu().numpy()
    chosen = known[_sample(asked_set.ids[known], labels[known], limit, seed)]
    asked = LabelledFeatures(
        asked_set.features[torch.from_numpy(chosen)],
        torch.from_numpy(labels[chosen]),
        asked_set.ids[chosen],
    )
    precision, before, relevant = _rankings(reference, ranked, asked)
    assert asked.ids is not None
    details = {
        "queries": len(chosen),
        "of": len(known),
        "reference": len(ranked),
        "without_any": int((relevant == 0).sum()),
    }
    scores = [Score.of_hits("retrieval_map", precision, asked.ids)]
    for k in recall_at:
        hits = (relevant > 0) & (before < k)
        scores.append(Score.of_hits(f"retrieval_recall{k}", hits, asked.ids))
    return [(score, details) for score in scores]


def _labelled(features: LabelledFeatures) -> Rows:
    return np.flatnonzero(features.labels.cpu().numpy() >= 0)


def _check(reference: LabelledFeatures, asked: LabelledFeatures, ranked: int, known: int) -> None:
    if not (ranked and known):
        raise DataError(
            f"retrieval has {ranked:,} labelled reference images and {known:,} labelled queries",
            "evaluate on images with labels",
        )
    if reference.ids is None or asked.ids is None:
        raise DataError("the images have no ids, which tell one image from another")
    if reference.features.shape[1] != asked.features.shape[1]:
        raise DataError(
            f"reference features have width {reference.features.shape[1]}, queries "
            f"{asked.features.shape[1]}",
            "embed both with the same backbone",
        )


def _sample(ids: npt.NDArray[np.uint8], labels: Rows, limit: int, seed: int) -> Rows:
    """Rows in the order of their classes, so that those of a part have few."""
    by_id = np.argsort(np.ascontiguousarray(ids).view("S16").ravel(), kind="stable")
    rows = np.random.default_rng([seed, len(ids)]).permutation(by_id)[:limit]
    return rows[np.argsort(labels[rows], kind="stable")]


@dataclass(frozen=True)
class _Classes:
    """Which reference rows are of a class.

    Attributes:
        labels: int64 [N].
        order: rows sorted by class.
        place: int64 [N], the number of each row within its class.
    """

    labels: Tensor
    order: Tensor
    sorted_labels: Tensor
    place: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> _Classes:
        sorted_labels, order = labels.sort(stable=True)
        first = torch.searchsorted(sorted_labels, sorted_labels)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device) - first
        return cls(labels, order, sorted_labels, place)

    def bounds(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Where each class begins and ends in `order`."""
        first = torch.searchsorted(self.sorted_labels, label)
        return first, torch.searchsorted(self.sorted_labels, label, right=True)


@dataclass
class _Reference:
    """The labelled images of the reference, in blocks.

    Attributes:
        features: [n, D], of all its images.
        rows: int64 [N], those with a label, rising.
        frame: what their exact form is relative to.
    """

    features: Tensor
    rows: Rows
    frame: Frame
    _kept: list[tuple[slice, Placed]] = field(default_factory=list)

    def blocks(self) -> Iterator[tuple[slice, Placed]]:
        """Which of the N, and their exact form, on the device of the features."""
        if self._kept:
            yield from self._kept
            return
        device = self.features.device
        keep = 4 * len(self.rows) * self.features.shape[1] <= _room(device)
        for part, vectors in in_blocks(self.features, self.rows, BLOCK_VALUES):
            placed = self.frame.placed(as_array(vectors), part.start).to(device)
            if keep:
                self._kept.append((part, placed))
            yield part, placed


def _room(device: torch.device) -> int:
    """Bytes that the reference may take."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else KEPT_BYTES


def _rankings(
    reference: LabelledFeatures, ranked: Rows, asked: LabelledFeatures
) -> tuple[npt.NDArray[np.float64], Rows, Rows]:
    """Of each query: average precision, how many images of other classes come before the first of
    its own, and how many there are of its own.

    Args:
        reference: whose rows are ranked.
        ranked: int64 [N], those with a label.
        asked: the queries.
    """
    assert reference.ids is not None and asked.ids is not None
    device = reference.features.device
    first = reference.features[torch.from_numpy(ranked[:MIDDLE_ROWS])]
    frame = Frame.of(as_array(first))
    known = _Reference(reference.features, ranked, frame)
    placed = frame.placed(as_array(asked.features)).to(device)
    classes = _Classes.of(reference.labels.cpu()[torch.from_numpy(ranked)].to(device))
    labels = asked.labels.to(device)
    same = SameImages.of(reference.ids[ranked], asked.ids)
    parts = []
    for part in _parts(classes, labels):
        query, row = same.within(part.start, part.stop)
        part_of = _Part(placed[part], labels[part], (query.to(device), row.to(device)))
        parts.append(part_of.counted(known, classes))
    precision, before, relevant = (torch.cat(x).cpu().numpy() for x in zip(*parts, strict=True))
    return precision, before, relevant


def _parts(classes: _Classes, labels: Tensor) -> Iterator[slice]:
    """Queries that are counted together: so few that their own classes fit into memory."""
    first, end = classes.bounds(labels)
    sizes = (end - first).tolist()
    start, largest = 0, 1
    for i, size in enumerate(sizes):
        largest = max(largest, size)
        if i > start and (i + 1 - start) * largest > OWN_AT_ONCE:
            yield slice(start, i)
            start, largest = i, max(1, size)
    yield slice(start, len(sizes))


@dataclass(frozen=True)
class _Part:
    """Some queries: vectors, labels int64 [q], and pairs (query, row) of one image."""

    placed: Placed
    labels: Tensor
    apart: tuple[Tensor, Tensor]

    def counted(self, known: _Reference, classes: _Classes) -> tuple[Tensor, Tensor, Tensor]:
        """As `_rankings`."""
        own = self._own(known, classes)  # sorted; infinite where a query has fewer
        relevant = own.isfinite().sum(1)
        # Images of other classes by how many of the own class they are not below.
        others = torch.zeros(len(own), own.shape[1] + 1, dtype=torch.int64, device=own.device)
        step = max(1, AT_ONCE // len(own))
        for block, vectors in known.blocks():
            for start in range(block.start, block.stop, step):
                rows = slice(start, min(start + step, block.stop))
                inside = slice(rows.start - block.start, rows.stop - block.start)
                similarities = ranking(self.placed, vectors[inside])
                similarities[self.labels[:, None] == classes.labels[None, rows]] = -torch.inf
                query, row = self._apart(rows)
                similarities[query, row - rows.start] = -torch.inf
                above = torch.searchsorted(own, similarities, right=True)
                others.scatter_add_(1, above, torch.ones_like(above))
        before = others.gather(1, relevant[:, None])[:, 0]
        few = max(1, AT_ONCE // own.shape[1])
        precision = [
            _precision(*part)
            for part in zip(torch.split(own, few), torch.split(others, few), strict=True)
        ]
        return torch.cat(precision), before, relevant

    def _apart(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The pairs of one image whose row is among these."""
        query, row = self.apart
        inside = (row >= rows.start) & (row < rows.stop)
        return query[inside], row[inside]

    def _own(self, known: _Reference, classes: _Classes) -> Tensor:
        """Similarities of the images of each query's class, rising, [q, R]."""
        first, end = classes.bounds(self.labels)
        width = max(1, int((end - first).max()))
        own = torch.full((len(self.labels), width), torch.inf, dtype=torch.float64)
        own = own.to(first.device)
        asked = [
            (label, (self.labels == label).nonzero()[:, 0]) for label in torch.unique(self.labels)
        ]
        width = known.features.shape[1]
        for block, vectors in known.blocks():
            of_block = classes.labels[block]
            for label, which in asked:
                inside = (of_block == label).nonzero()[:, 0]
                for rows in torch.split(inside, max(1, AT_ONCE // max(len(which), width))):
                    places = classes.place[block.start + rows]
                    own[which[:, None], places] = ranking(self.placed[which], vectors[rows])
        query, row = self.apart
        alike = classes.labels[row] == self.labels[query]
        own[query[alike], classes.place[row[alike]]] = torch.inf
        return own.sort(dim=1).values


def _precision(own: Tensor, others: Tensor) -> Tensor:
    """Average precision of each query [q].

    Args:
        own: similarities of its class [q, R], rising, infinite where there are fewer.
        others: [q, R + 1], how many images of other classes are not below so many of these.
    """
    relevant = own.isfinite().sum(1)
    as_high = others.flip(1).cumsum(1).flip(1)[:, 1:]
    own_as_high = relevant[:, None] - torch.searchsorted(own, own.contiguous())
    share = own_as_high.double() / (own_as_high + as_high).clamp(min=1)
    return share.masked_fill(~own.isfinite(), 0).sum(1) / relevant.clamp(min=1)
