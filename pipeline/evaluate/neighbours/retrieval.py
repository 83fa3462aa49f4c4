"""Retrieval with labels: are the images of a query's class ranked before all others?

k-NN asks the nearest few; mean average precision asks where every image of the class stands. So a
backbone whose classes fall into many small groups can vote well and retrieve badly.

Similarities are those of `exact.py`: exact sums, so ties are real ones. Images that are equally
similar share one place: the precision there counts all of them, as scikit-learn's
`average_precision_score` does. For recall they count against the query: of equally similar images
those of other classes come first. So no score depends on the order of rows.

Memory: the features, once more as much for their exact form, and under 1 GiB of work. At 1.28 M
images of width 1024 that is 10.5 GB. Time grows with images x queries, so many queries are sampled.

Shapes: N reference images, q queries of a part, R images of a query's class, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluate.features import LabelledFeatures, as_array
from pipeline.evaluate.neighbours.exact import MIDDLE_ROWS, Frame, Placed, ranking
from pipeline.evaluate.neighbours.nearest import SameImages
from pipeline.evaluate.score import Score

QUERIES = 2000  # their 95 % interval of a mean average precision is about 0.01 wide on each side
RECALL_AT = (1, 5, 10)
QUERIES_AT_ONCE = 1024
AT_ONCE = 1 << 23  # similarities, or places of images of the class: 64 MiB in doubles

Details = dict[str, Any]


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
    ranked = reference.labelled()
    asked = ranked if queries is None else queries.labelled()
    _check(ranked, asked)
    assert ranked.ids is not None and asked.ids is not None
    of = len(asked.labels)
    chosen = _sample(asked.ids, asked.labels, limit, seed)
    asked = LabelledFeatures(asked.features[chosen], asked.labels[chosen], asked.ids[chosen])
    precision, before, relevant = _rankings(ranked, asked)
    assert asked.ids is not None
    details = {
        "queries": len(chosen),
        "of": of,
        "reference": len(ranked.labels),
        "without_any": int((relevant == 0).sum()),
    }
    scores = [Score.of_hits("retrieval_map", precision, asked.ids)]
    for k in recall_at:
        hits = (relevant > 0) & (before < k)
        scores.append(Score.of_hits(f"retrieval_recall{k}", hits, asked.ids))
    return [(score, details) for score in scores]


def _check(ranked: LabelledFeatures, asked: LabelledFeatures) -> None:
    if not (len(ranked.labels) and len(asked.labels)):
        raise DataError(
            f"retrieval has {len(ranked.labels):,} labelled reference images and "
            f"{len(asked.labels):,} labelled queries",
            "evaluate on images with labels",
        )
    if ranked.ids is None or asked.ids is None:
        raise DataError("the images have no ids, which tell one image from another")
    if ranked.features.shape[1] != asked.features.shape[1]:
        raise DataError(
            f"reference features have width {ranked.features.shape[1]}, queries "
            f"{asked.features.shape[1]}",
            "embed both with the same backbone",
        )


def _sample(
    ids: npt.NDArray[np.uint8], labels: Tensor, limit: int, seed: int
) -> npt.NDArray[np.int64]:
    """Rows in the order of their classes, so that those of a part have few."""
    by_id = np.argsort(np.ascontiguousarray(ids).view("S16").ravel(), kind="stable")
    rows = np.random.default_rng([seed, len(ids)]).permutation(by_id)[:limit]
    return rows[np.argsort(labels.cpu().numpy()[rows], kind="stable")]


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


def _rankings(
    ranked: LabelledFeatures, asked: LabelledFeatures
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of each query: average precision, how many images of other classes come before the first of
    its own, and how many there are of its own.
    """
    assert ranked.ids is not None and asked.ids is not None
    device = ranked.features.device
    frame = Frame.of(as_array(ranked.features[:MIDDLE_ROWS]))
    known = frame.placed(as_array(ranked.features)).to(device)
    placed = frame.placed(as_array(asked.features))
    classes = _Classes.of(ranked.labels.to(device))
    labels = asked.labels.to(device)
    same = SameImages.of(ranked.ids, asked.ids)
    parts = []
    for part in _parts(classes, labels):
        apart = same.within(part.start, part.stop)
        part_of = _Part(
            placed[part].to(device), labels[part], (apart[0].to(device), apart[1].to(device))
        )
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
        if i > start and ((i + 1 - start) * largest > AT_ONCE or i - start == QUERIES_AT_ONCE):
            yield slice(start, i)
            start, largest = i, max(1, size)
    yield slice(start, len(sizes))


@dataclass(frozen=True)
class _Part:
    """Some queries: vectors, labels int64 [q], and pairs (query, row) of one image."""

    placed: Placed
    labels: Tensor
    apart: tuple[Tensor, Tensor]

    def counted(self, known: Placed, classes: _Classes) -> tuple[Tensor, Tensor, Tensor]:
        """As `_rankings`."""
        own = self._own(known, classes)  # sorted; infinite where a query has fewer
        relevant = own.isfinite().sum(1)
        # Images of other classes by how many of the own class they are not below.
        others = torch.zeros(len(own), own.shape[1] + 1, dtype=torch.int64, device=own.device)
        step = max(1, AT_ONCE // len(own))
        for start in range(0, len(known), step):
            rows = slice(start, min(start + step, len(known)))
            similarities = ranking(self.placed, known[rows])
            similarities[self.labels[:, None] == classes.labels[None, rows]] = -torch.inf
            query, row = self.apart
            inside = (row >= rows.start) & (row < rows.stop)
            similarities[query[inside], row[inside] - start] = -torch.inf
            above = torch.searchsorted(own, similarities, right=True)
            others.scatter_add_(1, above, torch.ones_like(above))
        before = others.gather(1, relevant[:, None])[:, 0]
        as_high = others.flip(1).cumsum(1).flip(1)[:, 1:]
        own_as_high = relevant[:, None] - torch.searchsorted(own, own.contiguous())
        share = own_as_high.double() / (own_as_high + as_high).clamp(min=1)
        total = share.masked_fill(~own.isfinite(), 0).sum(1)
        return total / relevant.clamp(min=1), before, relevant

    def _own(self, known: Placed, classes: _Classes) -> Tensor:
        """Similarities of the images of each query's class, rising, [q, R]."""
        first, end = classes.bounds(self.labels)
        width = max(1, int((end - first).max()))
        own = torch.full((len(self.labels), width), torch.inf, dtype=torch.float64)
        own = own.to(first.device)
        for label in sorted(set(self.labels.tolist())):
            which = (self.labels == label).nonzero()[:, 0]
            rows = classes.order[int(first[which[0]]) : int(end[which[0]])]
            if len(rows):
                own[which, : len(rows)] = ranking(self.placed[which], known[rows])
        query, row = self.apart
        alike = classes.labels[row] == self.labels[query]
        own[query[alike], classes.place[row[alike]]] = torch.inf
        return own.sort(dim=1).values
