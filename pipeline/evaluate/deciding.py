"""The scores of an evaluation while training, and which of them chooses the best checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.errors import DataError
from pipeline.evaluate.classifiers.few_shot import few_shot_scores
from pipeline.evaluate.classifiers.logistic import logistic_scores
from pipeline.evaluate.features import LabelledFeatures
from pipeline.evaluate.neighbours.knn import TEMPERATURE, knn_score
from pipeline.evaluate.neighbours.retrieval import retrieval_scores
from pipeline.evaluate.score import Score
from pipeline.evaluate.unlabelled import rank_me

RANK_ME = "rank_me"  # needs no labels
FEW_SHOT = "few_shot"
FEWEST = 0.5  # of the labelled images must have another one of their class


@dataclass(frozen=True)
class TrainingScores:
    """What an evaluation while training computes.

    Attributes:
        values: by the name of the score.
        decided_by: the one by which checkpoints are compared; "" where none is to be trusted
            with it: without labels of use, unless `rank_me` was asked for.
        note: why labels, or the score that was asked for, were not used; or empty.
        guarded: the score that is compared with the start, image by image; None without labels.
    """

    values: dict[str, float]
    decided_by: str
    note: str = ""
    guarded: Score | None = None

    @classmethod
    def unlabelled(
        cls, features: LabelledFeatures, decide_by: str = "", note: str = ""
    ) -> TrainingScores:
        """What needs no labels."""
        decided_by = RANK_ME if decide_by == RANK_ME else ""
        return cls({RANK_ME: deciding_score(RANK_ME, features, features)}, decided_by, note)


def training_scores(
    reference: LabelledFeatures,
    queries: LabelledFeatures,
    k: int,
    decide_by: str = "",
    temperature: float = TEMPERATURE,
    guarded: str = "",
) -> TrainingScores:
    """The k-NN, the scores that decide and are guarded, and `rank_me`; without labels of use, that
    alone.

    Args:
        reference: those that vote or are learnt from.
        queries: those that are asked; the reference itself: each of its images by the others.
        k: neighbours of the k-NN.
        decide_by: the score that decides; default: the k-NN.
        temperature: of its votes.
        guarded: the score that is compared with the start; default: the one that decides, the k-NN
            where that is `rank_me`.

    Raises:
        DataError: two sets of which one has no labels.
    """
    why = why_unusable(queries.labels) if queries is reference else ""
    if not why and _are_one_class(reference.labels, queries.labels):
        why = "all labelled images of both sets are of one class"
    if why:
        return TrainingScores.unlabelled(queries, decide_by, f"labels are not used: {why}")
    usual = f"knn{k}_top1"
    scores = {usual: image_score(usual, reference, queries, temperature)}
    values = {usual: scores[usual].value, RANK_ME: deciding_score(RANK_ME, reference, queries)}
    notes = []
    for name in (decide_by, guarded):
        if not name or name in values:
            continue
        try:
            scores[name] = image_score(name, reference, queries, temperature)
            values[name] = scores[name].value
        except DataError as error:  # it needs more images than the k-NN
            notes.append(f"{name} is not computed: {error.what}")
    decided_by = decide_by if decide_by in values else usual
    compared = next(scores[name] for name in (guarded, decide_by, usual) if name in scores)
    return TrainingScores(values, decided_by, "; ".join(notes), compared)


def deciding_score(
    name: str,
    reference: LabelledFeatures,
    queries: LabelledFeatures,
    temperature: float = TEMPERATURE,
) -> float:
    """One score by its name; all of them are better where they are higher.

    Args:
        name: `rank_me`, which is that of the queries, or as for `image_score`.
        reference: those that vote or are learnt from.
        queries: those that are asked; the reference itself: each of its images by the others.
        temperature: of the votes of a k-NN.

    Raises:
        DataError: nothing is labelled, or nothing is left to learn from or to ask.
    """
    if name == RANK_ME:
        # features that are all 0 have none; the evaluation goes on, for its alarm says what that is
        return rank_me(queries.features) if queries.features.any() else 0.0
    return image_score(name, reference, queries, temperature).value


def image_score(
    name: str,
    reference: LabelledFeatures,
    queries: LabelledFeatures,
    temperature: float = TEMPERATURE,
) -> Score:
    """One score by its name, with what each labelled query adds to it.

    Args:
        name: `knn20_top1` with any number, `logistic_top1`, `few_shot5_top1` with any number, or
            `retrieval_map`.
        reference: those that vote or are learnt from.
        queries: those that are asked, with ids; the reference itself: each of its images by the
            others.
        temperature: of the votes of a k-NN.

    Raises:
        DataError: nothing is labelled, or nothing is left to learn from or to ask.
    """
    classes = max(int(reference.labels.max()), int(queries.labels.max())) + 1
    others = None if queries is reference else queries
    if name == "logistic_top1":
        return logistic_scores(reference, others, classes)[0]
    if name == "retrieval_map":
        scores = retrieval_scores(reference, others)
        return next(score for score, _ in scores if score.name == name)
    if name.startswith(FEW_SHOT):
        shots = int(name.removeprefix(FEW_SHOT).removesuffix("_top1"))
        return few_shot_scores(reference, others, [shots])[0][0]
    return knn_score(
        reference, queries, int(name.removeprefix("knn").removesuffix("_top1")), temperature
    )


def _are_one_class(*labels: torch.Tensor) -> bool:
    """Whether all labels that are known are the same: then every answer is right."""
    known = torch.cat([one[one >= 0] for one in labels])
    return len(known) > 0 and bool((known == known[0]).all())


def why_unusable(labels: torch.Tensor) -> str:
    """Why labels of one set say nothing about a backbone; empty where they do.

    Args:
        labels: int64 [N], -1 where unknown.
    """
    counts = labels[labels >= 0].bincount()
    counts = counts[counts > 0]
    labelled = int(counts.sum())
    if len(counts) < 2:
        one = f"all {labelled:,} labelled images are of one class"
        return one if labelled else "no image has a label"
    others = int(counts[counts > 1].sum())
    if others < FEWEST * labelled:
        return f"only {others:,} of {labelled:,} labelled images have another one of their class"
    return ""
