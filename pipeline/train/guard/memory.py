"""What outlives a restart, beside the checkpoints: the start's answers, the falls, the end.

`start.npz` is written once for each set of images and settings; `guard.json` when something of it
changes. Each is there whole or not at all, on a disk and at a URI.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.errors import DataError, StorageError
from pipeline.evaluate.guard.answers import Answers, from_bytes, to_bytes
from pipeline.storage.places import resolve_uri
from pipeline.storage.transfer import read_bytes, read_mark, write_bytes_atomic
from pipeline.uri import Place, join, public

log = logging.getLogger("pipeline.train")
START, STATE = "start.npz", "guard.json"
WHAT = ("score", "keep")


@dataclass(frozen=True)
class Ended:
    """That a guard has ended a run.

    Attributes:
        step: whose evaluation, or whose update, decided it.
        why: without a full stop.
    """

    step: int
    why: str


@dataclass(frozen=True)
class Falls:
    """The steps in a row that have fallen, by what fell, and the end that they led to."""

    key: str
    rows: Mapping[str, list[int]] = field(default_factory=lambda: {what: [] for what in WHAT})
    ended: Ended | None = None


def read_start(checkpoints: Place, key: str) -> Answers | None:
    """The start's answers; None where there are none of these images and settings.

    Args:
        checkpoints: the folder.
        key: of the images and settings, see `EvaluationSpec.guard_key`.
    """
    place = join(checkpoints, START)
    try:
        answers, written = from_bytes(read_bytes(*resolve_uri(str(place))))
    except FileNotFoundError:
        return None
    except StorageError:
        raise
    except DataError as error:
        log.warning("%s is not used: %s", public(place), error.what)
        return None
    if written != key:
        log.warning(
            "the start was evaluated with other images or settings (evaluate.*, guard.*): it is "
            "evaluated again, and nothing is compared with the old values"
        )
        return None
    return answers


def write_start(checkpoints: Place, answers: Answers, key: str) -> None:
    """Keeps the start's answers.

    Raises:
        OSError: it cannot be written.
    """
    write_bytes_atomic(to_bytes(answers, key), *resolve_uri(str(join(checkpoints, START))))


def read_falls(checkpoints: Place, key: str) -> Falls:
    """What an earlier start of the run has counted; falls of other images or settings count no
    more, an end does.
    """
    content = read_mark(*resolve_uri(str(join(checkpoints, STATE))))
    try:
        ended = content.get("ended")
        falls = Falls(
            str(content.get("key", key)),
            {what: [int(x) for x in content.get("rows", {}).get(what, [])] for what in WHAT},
            Ended(int(ended["step"]), str(ended["why"])) if ended else None,
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        log.warning("%s says nothing of use: falls are counted anew", public(STATE))
        return Falls(key)
    return falls if falls.key == key else replace(Falls(key), ended=falls.ended)


def write_falls(checkpoints: Place, falls: Falls) -> None:
    """Keeps the count.

    Raises:
        OSError: it cannot be written.
    """
    content: dict[str, Any] = {"key": falls.key, "rows": dict(falls.rows)}
    if falls.ended:
        content["ended"] = {"step": falls.ended.step, "why": falls.ended.why}
    text = json.dumps(content, indent=1) + "\n"
    write_bytes_atomic(text.encode(), *resolve_uri(str(join(checkpoints, STATE))))


def ended(checkpoints: Place) -> Ended | None:
    """How a guard has ended the run; None where none has."""
    return read_falls(checkpoints, "").ended
