"""For a dry run: what an evaluation would score, on how many images, and what that takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from pipeline.card.files import card_folder
from pipeline.config.config import Config
from pipeline.config.embedding import NEEDS_LABELS
from pipeline.context import size_of
from pipeline.embed.embedders import open_embedder
from pipeline.embed.vectors import open_vectors
from pipeline.stages.checks.known_sets import KnownSet
from pipeline.stages.checks.start import voting
from pipeline.stages.evaluation import (
    dense_of,
    groups_of,
    is_own,
    networks,
    only_dense,
    sets_of,
    vectors_given,
)
from pipeline.storage.run_folder import RunFolder
from pipeline.uri import public

log = logging.getLogger("pipeline")
NUMBER = 4  # bytes of a number of a vector


def say_evaluation(config: Config, folder: RunFolder, known: Mapping[str, KnownSet]) -> None:
    """Says contenders, scores, images and memory of the evaluate stage by itself.

    Raises:
        PipelineError: a model or a dense set is not there.
    """
    models = networks(config, folder)
    log.info("evaluate    %s", "; ".join(_named(one.role, one.name) for one in models))
    log.info("evaluate    scores: %s", ", ".join(_possible(config, folder, known)))
    if (dense := dense_of(config)) is not None:
        asked = f", {len(dense.queries.rows):,} asked" if dense.queries else ", a part of it asked"
        log.info(
            "evaluate    %s: %s images with %s%s",
            public(dense.reference.uri),
            f"{len(dense.reference.rows):,}",
            " and ".join(dense.reference.targets),
            asked,
        )
    if only_dense(config, folder):
        return
    if vectors := vectors_given(config):
        places = [vectors] + [config.evaluate.queries] * bool(config.evaluate.queries)
        tables = [open_vectors(place) for place in places]
        rows, dim = sum(one.rows for one in tables), tables[0].dim
        log.info("evaluate    %s vectors of width %d; no image is opened", f"{rows:,}", dim)
    else:
        sets = [voting(known), known.get("evaluate.queries")]
        rows = sum(one.images for one in sets if one)
        if not is_own(config) and all(one and one.shards for one in sets):
            sets_given = sets_of(config, folder, models)
            overlap = sets_given.overlap if sets_given else None
            for sentence in overlap.sentences() if overlap else ():
                log.warning("evaluation: %s", sentence)
        dim = max(open_embedder(one.spec).dim for one in models if one.role == "model")
        log.info(
            "evaluate    about %s images, embedded by %d network%s",
            f"{rows:,}",
            len(models),
            "s" * (len(models) > 1),
        )
    size = NUMBER * rows * dim
    log.info("evaluate    about %s of vectors in memory, a network", size_of(size))


def _possible(config: Config, folder: RunFolder, known: Mapping[str, KnownSet]) -> list[str]:
    """The groups of scores that the sets allow, as far as it is known."""
    reference = voting(known)
    unlabelled = reference is not None and reference.labels.kind == "none"
    without = {"dense"} if not config.evaluate.dense else set()
    without |= set(NEEDS_LABELS) if unlabelled else set()
    if only_dense(config, folder):
        return ["dense"]
    return [group for group in groups_of(config) if group not in without]


def say_cards(cards: Sequence[str]) -> None:
    """Says which cards would be compared.

    Raises:
        DataError: one is not there.
    """
    for place in cards:
        log.info("evaluate    the card in %s", public(card_folder(place)))
    log.info("evaluate    %d cards on one page; nothing is computed", len(cards))


def _named(role: str, name: str) -> str:
    return public(name) if role in ("model", "step0", "untrained") else f"{role} {public(name)}"
