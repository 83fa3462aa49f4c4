"""Folders that are parts of a set, `train/` and `val/`: whether they are taken together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.config.config import Config
from pipeline.uri import is_uri, public

TRAINING = ("train", "training")
# by preference: `val` chooses the best checkpoint, so `test` stays unseen
HELD_OUT = ("val", "valid", "validation", "test", "testing", "eval")


def parts_of(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Which names are of training images, and which of held-out ones."""
    known = sorted(names)
    training = [name for name in known if name.lower() in TRAINING]
    return training, [name for name in known if name.lower() in HELD_OUT]


def taken_together(config: Config) -> list[str]:
    """A sentence where a local folder has `train/` and `val/`, and nothing is named to be asked:
    then all of it is one set. Whoever wants no labels knows it.
    """
    settings = config.evaluate
    if settings.queries or config.data.labels == "none":
        return []
    said = []
    named = {"data.source": config.data.source, "evaluate.reference": settings.reference}
    for field, place in named.items():
        training, others = parts_of(_folders(place))
        if training and others:
            home = public(place).rstrip("/")
            said.append(
                f"{field}={public(place)}: {', '.join([*training, *others])} are taken together, "
                f"as one set; to hold one out where both have classes, set "
                f"{field}={home}/{training[0]} evaluate.queries={home}/{others[0]}"
            )
    return said


def _folders(place: str) -> list[str]:
    """Folders in a local place whose names are those of parts."""
    if not place or is_uri(place):
        return []
    try:
        inside = [x for x in Path(place).iterdir() if x.name.lower() in TRAINING + HELD_OUT]
    except OSError:  # no folder, or a list of archives; the listing says what is wrong
        return []
    return [x.name for x in inside if x.is_dir()]
