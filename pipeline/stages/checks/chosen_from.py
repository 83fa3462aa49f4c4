"""Of how many evaluations a run's weights are the best: the best of many looks too good."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.card.inputs.sets import Sets
from pipeline.card.scoring.request import Request
from pipeline.card.words import UNLABELLED
from pipeline.embed.beginnings import checkpoint_of
from pipeline.train.checkpoint.best import read_best
from pipeline.train.checkpoint.files import step_of
from pipeline.uri import is_uri, parent


def with_choices(request: Request) -> Request:
    """The request, whose checkpoints know of how many evaluations they are the best: those of the
    models, and those that a training began with.
    """
    starts = {one.name: one.start for one in request.networks}
    networks = []
    for one in request.networks:
        checkpoint = starts.get(one.of, "") if one.role == "init" else checkpoint_of(one.spec)
        count = evaluations_of(checkpoint, request.score, request.sets)
        networks.append(replace(one, best_of=count))
    return replace(request, networks=tuple(networks))


def evaluations_of(checkpoint: str, score: str, sets: Sets | None) -> int:
    """Evaluations, on the images that are asked, that a checkpoint is the best of. 1: it is no
    checkpoint, or was not chosen by this score, or on other images.

    Args:
        checkpoint: its place; other weights, or "", where it is none.
        score: that decides on the card.
        sets: that it is scored on.
    """
    if not checkpoint or sets is None or score in UNLABELLED:
        return 1
    folder, name = parent(checkpoint if is_uri(checkpoint) else Path(checkpoint))
    if (step := step_of(name)) is None:
        return 1
    best = read_best(folder)
    if best is None or (best.step, best.name) != (step, f"eval/{score}"):
        return 1
    asked = sets.queries or sets.reference
    return max(1, len(best.evaluated)) if best.asked == asked.digest_of_all else 1
