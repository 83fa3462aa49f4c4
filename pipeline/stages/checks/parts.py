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
    then all of it is one set.
    """
    settings, said = config.evaluate, []
    named = {"data.source": config.data.source, "evaluate.reference": settings.reference}
    for field, place in named.items():
        if settings.queries or not place or is_uri(place) or not Path(place).is_dir():
            continue
        training, others = parts_of(x.name for x in Path(place).iterdir() if x.is_dir())
        if training and others:
            home = public(place).rstrip("/")
            said.append(
                f"{field}={public(place)}: {', '.join([*training, *others])} are taken together, "
                f"as one set; to hold one out, set {field}={home}/{training[0]} "
                f"evaluate.queries={home}/{others[0]}"
            )
    return said
