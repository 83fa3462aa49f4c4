"""The scores of one contender, group by group: what a task computes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.card.card import Confusion, Result, WrongAnswer
from pipeline.card.inputs.entrants import Entrant
from pipeline.card.scoring.wrong import confusion_of, kept_wrong
from pipeline.evaluate.baselines import majority_hits
from pipeline.evaluate.classifiers.few_shot import few_shot_scores
from pipeline.evaluate.classifiers.logistic import logistic_scores
from pipeline.evaluate.features import LabelledFeatures
from pipeline.evaluate.neighbours.knn import knn_scores, predictions
from pipeline.evaluate.neighbours.nearest import Neighbours
from pipeline.evaluate.neighbours.retrieval import retrieval_scores
from pipeline.evaluate.score import Score

KS = (10, 20, 100, 200)  # DINOv2 `eval/knn.py`
SHOWN = 5  # neighbours of each


@dataclass(frozen=True)
class Scoring:
    """Numbers that scores depend on.

    Attributes:
        k: neighbours that vote in the score that decides.
        temperature: of the votes.
        seed: of all that is drawn.
    """

    k: int = 20
    temperature: float = 0.07
    seed: int = 0

    @property
    def ks(self) -> list[int]:
        """All numbers of neighbours that are scored."""
        return sorted({self.k, *KS})


@dataclass(frozen=True)
class Answers:
    """What the neighbours of the main model say.

    Attributes:
        confusion: which classes are taken for which.
        wrong: the surest wrong answers, and samples of the most frequent ones.
    """

    confusion: Confusion = field(default_factory=Confusion)
    wrong: tuple[WrongAnswer, ...] = ()


@dataclass(frozen=True)
class Scored:
    """What a task gives back: results by score name, and its seconds."""

    results: dict[str, Result]
    seconds: float


def scored(group: str, entrant: Entrant, scoring: Scoring, gpu: bool) -> Scored:
    """In a task: the scores of a group.

    Args:
        group: as `evaluate.scores` names it.
        entrant: whose.
        scoring: numbers that they depend on.
        gpu: this task has one.
    """
    begin = time.monotonic()
    reference, queries = entrant.both
    for one in (reference, queries):
        if one is not None:
            one.features = one.features.to("cuda" if gpu else "cpu")
    if group == "logistic":
        score, details = logistic_scores(reference, queries, classes_of(reference, queries))
        results = {score.name: Result.of(score, **details)}
    elif group == "few_shot":
        results = _each(few_shot_scores(reference, queries, seed=scoring.seed))
    elif group == "retrieval":
        results = _each(retrieval_scores(reference, queries, seed=scoring.seed))
    else:
        raise ValueError(f"no group of scores {group}")
    return Scored(results, time.monotonic() - begin)


def classes_of(reference: LabelledFeatures, queries: LabelledFeatures | None) -> int:
    """More than any label."""
    return max(int(one.labels.max()) for one in (reference, queries or reference)) + 1


def _each(scores: Iterable[tuple[Score, dict[str, Any]]]) -> dict[str, Result]:
    return {score.name: Result.of(score, **details) for score, details in scores}


def of_neighbours(
    entrant: Entrant, neighbours: Neighbours, scoring: Scoring
) -> tuple[dict[str, Result], Answers]:
    """k-NN by the neighbours of all queries, and who is taken for whom."""
    reference = entrant.labels(entrant.tables.reference)
    queries = entrant.labels(entrant.tables.queries or entrant.tables.reference)
    scores = knn_scores(neighbours, reference.labels, queries, scoring.ks, scoring.temperature)
    results = {score.name: Result.of(score) for score in scores}
    return results, _answers(neighbours, reference, queries, scoring)


def _answers(
    neighbours: Neighbours, reference: LabelledFeatures, queries: LabelledFeatures, scoring: Scoring
) -> Answers:
    """Who is taken for whom, and wrong answers that are worth a look."""
    answer, votes = predictions(neighbours, reference.labels, scoring.k, scoring.temperature)
    truth, answered, share = queries.labels.numpy(), answer.cpu().numpy(), votes.cpu().numpy()
    classes = int(max(reference.labels.max(), queries.labels.max())) + 1
    return Answers(
        confusion_of(truth, answered, classes),
        tuple(
            WrongAnswer(
                _hex(queries, query),
                int(truth[query]),
                int(answered[query]),
                float(share[query]),
                tuple(_voters(neighbours, reference, query)),
            )
            for query in kept_wrong(truth, answered, share)
        ),
    )


def _voters(
    neighbours: Neighbours, reference: LabelledFeatures, query: int
) -> Iterator[tuple[str, int, float]]:
    rows, cosines = neighbours.rows[query].tolist(), neighbours.similarities[query].tolist()
    for row, cosine in [pair for pair in zip(rows, cosines, strict=True) if pair[0] >= 0][:SHOWN]:
        yield _hex(reference, row), int(reference.labels[row]), float(cosine)


def _hex(rows: LabelledFeatures, row: int) -> str:
    assert rows.ids is not None
    return bytes(rows.ids[row]).hex()


def majority(entrant: Entrant, names: Sequence[str]) -> dict[str, Result]:
    """The most frequent class as an answer to every query, as each of the accuracies."""
    reference = entrant.labels(entrant.tables.reference).labelled()
    queries = entrant.labels(entrant.tables.queries or entrant.tables.reference).labelled()
    hits = majority_hits(reference.labels.numpy(), queries.labels.numpy())
    assert queries.ids is not None
    return {name: Result.of(Score.of_hits(name, hits, queries.ids)) for name in names}
