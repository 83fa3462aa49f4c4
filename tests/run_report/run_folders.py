"""Run folders as jobs leave them, without a job: a card, examples, a journal, marks of stages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.card.card import Card
from pipeline.card.examples.kept import Asked, Examples, Look, Neighbour, Shown, write_examples
from pipeline.card.files import write_card
from pipeline.card.verdict import verdict_of
from pipeline.config.load import load
from pipeline.run_report.facts import RunFacts
from pipeline.storage.run_folder import RunFolder
from pipeline.track.driver import open_pipeline
from pipeline.track.settings import TrackSettings
from tests.card.cards import card_of, contender
from tests.data import encoded

HASH = "0123456789abcdef" * 2
STEPS = 40


def picture(colour: str) -> bytes:
    return encoded(Image.new("RGB", (64, 48), colour), "JPEG")


def usual_card() -> Card:
    """Trained above its start and above colours."""
    model = contender("model", 0.8, "runs/leaves (step 40)", step=STEPS, numbers={"rank_me": 30.0})
    card = card_of(
        model,
        contender("step0", 0.5, "at step 0", of=model.name, numbers={"rank_me": 4.0}),
        contender("raw_pixels", 0.3),
        contender("colours", 0.6),
        contender("majority", 0.33),
    )
    return replace(card, verdict=verdict_of(card))


def unlabelled_card() -> Card:
    """Numbers without labels alone."""
    numbers = {"rank_me": 30.0, "feature_std": 0.9, "effective_rank": 28.0}
    model = contender("model", None, "runs/leaves (step 40)", step=STEPS, numbers=numbers)
    began = contender("step0", None, "at step 0", of=model.name, numbers={"rank_me": 4.0})
    card = card_of(model, began, labelled=0, score="rank_me")
    return replace(card, verdict=verdict_of(card))


def usual_examples() -> Examples:
    """An image with a right and a wrong neighbour, and a look at it."""
    cat = Shown(picture("orange"), "a <cat>.jpg", "cat")
    dog = Shown(picture("brown"), "dog.jpg", "dog")
    asked = Asked(cat, (Neighbour(cat, 0.91, True), Neighbour(dog, 0.72, False)))
    pictures = {
        "components": (picture("red"), picture("blue")),
        "attention": (picture("black"), picture("yellow")),
    }
    return Examples("runs/leaves", (asked,), (Look(cat, pictures),), "at step 0")


@contextmanager
def journal(folder: Path) -> Iterator[Any]:
    """The pipeline run of a folder, whose lines stay in the journal."""
    settings = TrackSettings(
        run_folder=str(folder), stage="pipeline", experiment="leaves", uri="none"
    )
    with open_pipeline(settings, "leaves") as tracking:
        yield tracking


def write_run(
    folder: Path, card: Card | None = None, examples: Examples | None = None, **results: Any
) -> RunFacts:
    """A finished run of pack, curate, pretrain, evaluate and export; `name=None` leaves one out."""
    place = RunFolder.of(str(folder), "leaves")
    place.path.mkdir(parents=True)
    with journal(place.path) as tracking:
        for stage in ("pack", "curate", "pretrain", "evaluate", "export"):
            tracker = tracking.stage(stage)
            if stage == "pretrain":
                tracker.dataset("train", HASH, "curated", "training", 900)
                _train(tracker, card is None or card.reference.labelled > 0)
            if stage == "pack":
                tracker.dataset("train", HASH, "/data/leaves/train", "packing", 1000)
                tracker.dataset("queries", HASH, "/data/leaves/test", "packing", 200)
                tracker.table("bad_images_train", {"source": ["x.jpg"], "image_id": [HASH]})
            tracking.end_stage(stage)
    if card is not None:
        write_card(card, place.path / "evaluate")
        write_examples(examples or Examples(), place.path / "evaluate")
    known: dict[str, Any] = {
        "pack": {
            "text": f"1,000 images, digest {HASH}",
            "train": {"images": 1000, "classes": 3, "bytes": 34_500_000, "duplicates": 2},
            "queries": {"images": 200, "classes": 3, "bytes": 7_000_000, "bad_images": 1},
        },
        "curate": {
            "text": "1,000 in = 900 kept + 60 duplicate_near + 30 flat + 10 leaks_evaluation",
            "images_in": 1000,
            "images": 900,
            "reasons": {
                "kept": 900, "duplicate_near": 55, "duplicate_bytes": 5, "flat": 30,
                "leaks_evaluation": 10,
            },
        },
        "pretrain": {
            "text": "finished", "step": STEPS, "steps": STEPS, "images_per_s": 1234.5,
            "peak_memory_gib": 2.0, "machine": "2 CPU cores",
            "best": {"name": "eval/knn20_top1", "score": 0.8, "step": STEPS},
        },
        "evaluate": {"text": "0.8", "page": "evaluate/card.html", "step": STEPS},
        "export": {"text": "weights", "formats": {"dinov2": "", "timm": ""}, "bytes": 88_000_000},
    }  # fmt: skip
    known |= results
    config = load(
        [
            "data.source=/data/leaves/train",
            "evaluate.queries=/data/leaves/test",
            "curate.preset=dedup",
            f"run.folder={folder}",
            "run.name=leaves",
        ]
    )
    report = place.path / "curate" / "report.html"
    if known["curate"]:
        report.parent.mkdir()
        report.write_text("<html></html>")
    return RunFacts.of(config, place, {name: one for name, one in known.items() if one})


def _train(tracker: Any, labelled: bool) -> None:
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        tracker.metrics(
            step,
            {
                "loss/total": 8 / (1 + step) + rng.random(),
                "loss/dino_local": 0.0,
                "perf/workers": 2.0,
                "optim/lr": 1e-3 * step,
            },
        )
        if step % 10 == 0:
            scores = {"eval/knn20_top1": 0.5 + step / 100} if labelled else {}
            tracker.metrics(step, {**scores, "eval/rank_me": 4 + step})
    tracker.picture("crops", 30, np.full((40, 40, 3), 255, np.uint8))
