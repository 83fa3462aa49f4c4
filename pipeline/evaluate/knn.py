"""Weighted k-nearest-neighbour classification: how good features are before anything is trained.

The law of the reference (DINOv2 `eval/knn.py`, after Wu et al. 2018): cosine similarity, weights
softmax(similarity / temperature) over the largest k asked for, votes summed over the k nearest and
not normalised again for smaller k.

Shapes: N reference images, Q queries, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import DataError

TEMPERATURE = 0.07  # DINOv2 eval/knn.py
SIMILARITIES_AT_ONCE = 1 << 26  # 256 MiB in float32
RAW_SIDE = 16  # pixels


Ids = npt.NDArray[np.uint8]  # [N, 16], see `data.columns.image_id`


class Labelled(Protocol):
    """Images uint8 [N, S, S, C] with labels int64 [N], -1 where unknown, and ids uint8 [N, 16]."""

    @property
    def images(self) -> npt.NDArray[np.uint8]: ...  # noqa: D102
    @property
    def labels(self) -> npt.NDArray[np.int64]: ...  # noqa: D102
    @property
    def ids(self) -> Ids: ...  # noqa: D102


@dataclass
class LabelledFeatures:
    """N images: `features` [N, D], `labels` int64 [N], -1 where unknown, `ids` where known."""

    features: Tensor
    labels: Tensor
    ids: Ids | None = None

    def labelled(self) -> LabelledFeatures:
        """The rows that have a label."""
        known = self.labels >= 0
        ids = None if self.ids is None else self.ids[known.numpy()]
        return LabelledFeatures(self.features[known], self.labels[known], ids)


@dataclass(frozen=True)
class SameImages:
    """Places where a query and a reference row are the same image, sorted by query.

    Attributes:
        queries: int64 [n], rows of the queries.
        rows: int64 [n], the reference row of each.
    """

    queries: Tensor
    rows: Tensor

    @classmethod
    def of(cls, reference: Ids, queries: Ids) -> SameImages:
        """The places where ids are equal."""
        known, asked = (np.ascontiguousarray(x).view("S16").ravel() for x in (reference, queries))
        order = np.argsort(known, kind="stable")
        first = np.searchsorted(known, asked, "left", sorter=order)
        counts = np.searchsorted(known, asked, "right", sorter=order) - first
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = order[np.repeat(first, counts) + within]
        return cls(
            torch.from_numpy(np.repeat(np.arange(len(asked)), counts)), torch.from_numpy(rows)
        )

    def within(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """The places of the queries from `start` to `end`, counted from `start`."""
        low, high = torch.searchsorted(self.queries, torch.tensor((start, end))).tolist()
        return self.queries[low:high] - start, self.rows[low:high]


def nearest(
    reference: Tensor,
    queries: Tensor,
    k: int,
    *,
    leave_one_out: bool = False,
    same: SameImages | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine similarities and row numbers of the k most similar reference rows, best first.

    Args:
        reference: [N, D], any scale; the work is done where it is.
        queries: [Q, D]; taken a few at a time, so that [Q, N] never exists.
        k: cut to the number of rows there are.
        leave_one_out: queries are the reference rows, and none may find itself.
        same: no query finds these rows: a place that has none left has similarity -inf.

    Returns:
        float32 [Q, k] and int64 [Q, k].

    Raises:
        DataError: nothing to search in, widths that differ, or leave_one_out with other rows.
    """
    others = len(reference) - leave_one_out
    if others < 1 or k < 1:
        raise DataError(f"cannot take the {k} nearest of {max(others, 0)} images")
    if reference.shape[1] != queries.shape[1]:
        raise DataError(
            f"reference features have width {reference.shape[1]}, queries {queries.shape[1]}",
            hint="embed both with the same backbone",
        )
    if leave_one_out and len(queries) != len(reference):
        raise DataError(
            f"leave_one_out needs the reference as queries: {len(queries)} for {len(reference)}"
        )
    k = min(k, others)
    # In float64: with LayerScale 1e-5 the cosines of an untrained backbone differ by 1e-9, which
    # float32 rounds away, and the accuracy before training would look like chance.
    transposed = functional.normalize(reference.double(), dim=1).T
    part = max(1, SIMILARITIES_AT_ONCE // len(reference))
    values, rows = [], []
    for start in range(0, len(queries), part):
        block = queries[start : start + part].to(reference.device).double()
        similarities = functional.normalize(block, dim=1) @ transposed
        if leave_one_out:
            similarities.diagonal(start).fill_(-torch.inf)
        if same is not None:
            similarities[same.within(start, start + len(block))] = -torch.inf
        top = similarities.topk(k, dim=1)
        values.append(top.values)
        rows.append(top.indices)
    if not values:
        empty = transposed.new_zeros(0, k).float()
        return empty, empty.long()
    return torch.cat(values).float(), torch.cat(rows)


def knn_votes(
    similarities: Tensor,
    labels: Tensor,
    classes: int,
    ks: Sequence[int],
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:
    """Class votes from sorted neighbours.

    Args:
        similarities: [Q, max(ks)], best first.
        labels: int64 [Q, max(ks)], the neighbours' labels.
        classes: C.
        ks: numbers of neighbours to vote.
        temperature: of the softmax over all max(ks) neighbours.

    Returns:
        for each k the votes [Q, C]; those of the largest k sum to 1 over the classes.
    """
    weights = (similarities / temperature).softmax(1)
    empty = weights.new_zeros(len(weights), classes)
    return {k: empty.scatter_add(1, labels[:, :k], weights[:, :k]) for k in ks}


def knn_classify(
    reference: LabelledFeatures,
    queries: LabelledFeatures,
    classes: int,
    k: int | Sequence[int] = 20,
    temperature: float = TEMPERATURE,
    *,
    leave_one_out: bool = False,
) -> dict[int, float]:
    """Top-1 accuracy of the weighted vote, for each k.

    Args:
        reference: those that vote; rows without a label do not.
        queries: those that are asked; rows without a label are not counted. Where both have ids,
            no image votes for one with its own id. A query that nobody is left to vote for is
            counted as wrong.
        classes: C, more than any label.
        k: one number or several. With several, weights are taken over the largest, as the
            reference does.
        temperature: of the weights.
        leave_one_out: queries are the reference rows, and none votes for itself.

    Returns:
        accuracy in [0, 1] by k.

    Raises:
        DataError: no labelled reference or query, or what `nearest` refuses.
    """
    ks = [k] if isinstance(k, int) else list(k)
    voters, asked = reference.labelled(), queries.labelled()
    if not (len(voters.labels) and len(asked.labels)):
        raise DataError(
            f"k-NN has {len(voters.labels)} labelled reference images and "
            f"{len(asked.labels)} labelled queries",
            hint="evaluate on shards with a label column",
        )
    same = None if voters.ids is None or asked.ids is None else SameImages.of(voters.ids, asked.ids)
    similarities, rows = nearest(
        voters.features, asked.features, max(ks), leave_one_out=leave_one_out, same=same
    )
    labels = voters.labels.to(rows.device)[rows]
    correct = dict.fromkeys(ks, 0)
    part = max(1, SIMILARITIES_AT_ONCE // classes)  # the votes are [Q, C]
    for start in range(0, len(rows), part):
        block = slice(start, start + part)
        votes = knn_votes(similarities[block], labels[block], classes, ks, temperature)
        truth = asked.labels[block].to(rows.device)
        any_vote = similarities[block, 0].isfinite()
        for number, vote in votes.items():
            correct[number] += int(((vote.argmax(1) == truth) & any_vote).sum())
    return {number: hits / len(rows) for number, hits in correct.items()}


def raw_pixels(
    reference: Iterable[Labelled],
    queries: Iterable[Labelled],
    k: int = 20,
    temperature: float = TEMPERATURE,
) -> float:
    """Accuracy of the same vote on the pixels themselves, the floor that features must beat.

    Images, given in batches, are averaged down to 16 x 16, and the reference's mean image is taken
    off, without which all cosines would be near 1.
    """
    (small, labels, known), (asked, truth, ids) = _downscaled(reference), _downscaled(queries)
    mean = small.mean(0)
    classes = int(max(labels.max(), truth.max())) + 1
    voters = LabelledFeatures(small - mean, labels, known)
    return knn_classify(
        voters, LabelledFeatures(asked - mean, truth, ids), classes, k, temperature
    )[k]


def _downscaled(parts: Iterable[Labelled]) -> tuple[Tensor, Tensor, Ids]:
    small, labels, ids = [], [], []
    for part in parts:
        pixels = torch.from_numpy(np.array(part.images)).permute(0, 3, 1, 2).float()
        small.append(functional.adaptive_avg_pool2d(pixels, RAW_SIDE).flatten(1) / 255)
        labels.append(torch.from_numpy(part.labels))
        ids.append(part.ids)
    return torch.cat(small), torch.cat(labels), np.concatenate(ids)
