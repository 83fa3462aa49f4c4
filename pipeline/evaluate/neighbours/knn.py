"""Weighted k-nearest-neighbour classification: how good features are before anything is trained.

The law of the reference (DINOv2 `eval/knn.py`, after Wu et al. 2018): cosine similarity, weights
softmax(similarity / temperature) over the largest k asked for, votes summed over the k nearest and
not normalised again for smaller k. So the weights of a smaller k are those of its own softmax times
one positive number for each query, and the class that wins is the same.

Neighbours are looked for once, by `nearest` in memory or over many machines by `card/nearest.py`.
All that follows needs [Q, k], and nothing is as wide as there are classes: any number is fine.

Shapes: N reference images, Q queries, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluate.features import Ids, LabelledFeatures
from pipeline.evaluate.neighbours.nearest import Neighbours, SameImages, nearest
from pipeline.evaluate.score import Score

TEMPERATURE = 0.07  # DINOv2 eval/knn.py
KS = (10, 20, 100, 200)  # DINOv2 eval/knn.py
VOTES_AT_ONCE = 1 << 21  # neighbours: about 200 MiB of work


class Asked(Protocol):
    """Queries with labels int64 [Q], -1 where unknown, and ids uint8 [Q, 16]."""

    @property
    def labels(self) -> Tensor: ...  # noqa: D102
    @property
    def ids(self) -> Ids | None: ...  # noqa: D102


def predictions(
    neighbours: Neighbours,
    reference_labels: Tensor,
    k: int = 20,
    temperature: float = TEMPERATURE,
) -> tuple[Tensor, Tensor]:
    """The class that wins the vote of the k nearest, and its share of the votes.

    The votes of one class are added in the order of the neighbours. Of classes with equal votes the
    lowest number wins.

    Args:
        neighbours: of each query, k or more where there are so many rows.
        reference_labels: int64 [N], of the rows that `neighbours` names.
        k: neighbours that vote; cut to those there are.
        temperature: of the softmax that makes weights of similarities.

    Returns:
        int64 [Q], -1 where a query has no neighbour, and float64 [Q] from 0 to 1.

    Raises:
        DataError: a neighbour has no label.
    """
    answers, shares = [], []
    width = max(1, neighbours.rows.shape[1])
    for block in _blocks(len(neighbours.rows), max(1, VOTES_AT_ONCE // width)):
        answer, share = _winners(neighbours, block, reference_labels, k, temperature)
        answers.append(answer)
        shares.append(share)
    if not answers:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    return torch.cat(answers), torch.cat(shares)


def _winners(
    neighbours: Neighbours, block: slice, reference_labels: Tensor, k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    rows = neighbours.rows[block, :k]
    there = rows >= 0
    labels = reference_labels.to(rows.device)[rows.clamp(min=0)]
    if bool((labels[there] < 0).any()):
        raise DataError(
            "some of the nearest images have no label, so they have no class to vote for",
            "look for neighbours among labelled images only",
        )
    similarities = neighbours.similarities[block, :k].double()
    similarities = similarities.masked_fill(~there, -torch.inf)
    # Softmax of a row of -inf is not a number: such a query has no votes.
    weights = (similarities / temperature).softmax(1).masked_fill(~there, 0)
    # Neighbours of one class side by side, each class a group with one sum of votes. The sort is
    # stable: within a class they stay in the order of their similarity.
    labels, order = labels.masked_fill(~there, -1).sort(dim=1, stable=True)
    weights = weights.gather(1, order)
    begins = torch.ones_like(labels)
    begins[:, 1:] = (labels[:, 1:] != labels[:, :-1]).long()
    group = begins.cumsum(1) - 1
    votes = torch.zeros_like(weights).scatter_add(1, group, weights)
    class_of = torch.full_like(labels, -1).scatter(1, group, labels)
    winner = votes.argmax(1, keepdim=True)  # the first of equals, so the lowest class
    answer, share = class_of.gather(1, winner)[:, 0], votes.gather(1, winner)[:, 0]
    return answer.masked_fill(~there.any(1), -1), share


def knn_scores(
    neighbours: Neighbours,
    reference_labels: Tensor,
    queries: Asked,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
) -> list[Score]:
    """Top-1 accuracy of the vote of the k nearest, for each k: `knn20_top1`.

    Args:
        neighbours: of all queries, at least max(ks) where there are so many rows. No query may have
            itself among them.
        reference_labels: int64 [N]; those of `neighbours` are known.
        queries: their labels and ids. Rows without a label are not counted. A query without a
            neighbour, or of a class that no reference image has, is counted as wrong.
        ks: numbers of neighbours to vote.
        temperature: of the weights.

    Returns:
        one score for each different k, in rising order, with the hit of each labelled query.

    Raises:
        DataError: no query has a label, ids are missing, or too few neighbours were looked for.
    """
    if queries.ids is None:
        raise DataError("the queries have no ids, which tell one image from another")
    _check_width(neighbours, int((reference_labels >= 0).sum()), max(ks))
    known = queries.labels >= 0
    if not bool(known.any()):
        raise DataError(
            f"none of the {len(known):,} queries has a label", "evaluate on labelled images"
        )
    device = neighbours.rows.device
    asked = Neighbours(neighbours.similarities[known.to(device)], neighbours.rows[known.to(device)])
    truth, ids = queries.labels[known].to(device), queries.ids[known.cpu().numpy()]
    scores = []
    for k in sorted(set(ks)):
        answer, _ = predictions(asked, reference_labels, k, temperature)
        scores.append(Score.of_hits(f"knn{k}_top1", (answer == truth).cpu().numpy(), ids))
    return scores


def _check_width(neighbours: Neighbours, voters: int, k: int) -> None:
    """Fewer neighbours than k are all there are where a query has all voters but itself."""
    width = neighbours.rows.shape[1]
    if width < min(k, voters - 1):
        raise DataError(
            f"a vote of {k} neighbours was asked for, and only {width} were looked for",
            f"look for {k} neighbours",
        )


def _blocks(rows: int, at_once: int) -> Iterator[slice]:
    for start in range(0, rows, at_once):
        yield slice(start, start + at_once)


def knn_classify(
    reference: LabelledFeatures,
    queries: LabelledFeatures,
    k: int | Sequence[int] = 20,
    temperature: float = TEMPERATURE,
) -> dict[int, float]:
    """Top-1 accuracy of the weighted vote, for each k.

    Args:
        reference: those that vote; rows without a label do not.
        queries: those that are asked; rows without a label are not counted. Where both have ids,
            no image votes for one with its own id. A query that nobody is left to vote for is
            counted as wrong.
        k: one number or several. With several, weights are taken over the largest, as the
            reference does.
        temperature: of the weights.

    Returns:
        accuracy in [0, 1] by k.

    Raises:
        DataError: no labelled reference or query, or what `nearest` refuses.
    """
    ks = [k] if isinstance(k, int) else list(k)
    voters, asked, neighbours = _searched(reference, queries, max(ks))
    truth = asked.labels.to(neighbours.rows.device)
    hits = {
        number: predictions(neighbours, voters.labels, number, temperature)[0] == truth
        for number in ks
    }
    return {number: int(right.sum()) / len(right) for number, right in hits.items()}


def knn_score(
    reference: LabelledFeatures, queries: LabelledFeatures, k: int, temperature: float = TEMPERATURE
) -> Score:
    """As `knn_classify` of one k, with the hit of each labelled query.

    Raises:
        DataError: no labelled reference or query, queries without ids, or what `nearest` refuses.
    """
    voters, asked, neighbours = _searched(reference, queries, k)
    return knn_scores(neighbours, voters.labels, asked, [k], temperature)[0]


def _searched(
    reference: LabelledFeatures, queries: LabelledFeatures, k: int
) -> tuple[LabelledFeatures, LabelledFeatures, Neighbours]:
    """The labelled images that vote and that are asked, and the k nearest of these among those."""
    voters, asked = reference.labelled(), queries.labelled()
    if not (len(voters.labels) and len(asked.labels)):
        raise DataError(
            f"k-NN has {len(voters.labels)} labelled reference images and "
            f"{len(asked.labels)} labelled queries",
            hint="evaluate on shards with a label column",
        )
    # where both sets are one, equal ids keep each image from voting for itself
    same = None if voters.ids is None or asked.ids is None else SameImages.of(voters.ids, asked.ids)
    return voters, asked, Neighbours(*nearest(voters.features, asked.features, k, same))
