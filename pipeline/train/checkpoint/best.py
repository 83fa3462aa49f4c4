"""`best.json`: the checkpoint with the best evaluation, and the evaluations that it is the best of.

Whoever scores that checkpoint on the same images needs the latter: the best of many looks better
than it is (`card.case.gain`).
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import DataError, StorageError
from pipeline.storage.places import resolve_uri
from pipeline.storage.transfer import read_json, write_bytes_atomic
from pipeline.uri import Place, join, public

log = logging.getLogger("pipeline.train")
FILE = "best.json"


@dataclass(frozen=True)
class Best:
    """What the file says.

    Attributes:
        step: of the checkpoint.
        score: of its evaluation.
        name: of the score, `eval/knn20_top1`; another one is not compared with it.
        compared: changes with the images and settings of evaluations (`EvaluationSpec.key`).
        asked: digest of the images that it was right or wrong about: the queries, where there are.
        evaluated: steps of the checkpoints that it was chosen from, its own among them; those that
            the guard found to have fallen are not.
    """

    step: int
    score: float
    name: str = ""
    compared: str = ""
    asked: str = ""
    evaluated: tuple[int, ...] = ()

    @property
    def summary(self) -> dict[str, Any]:
        """As the result of a training has it."""
        return {"step": self.step, "score": self.score, "name": self.name}


def read_best(folder: Place) -> Best | None:
    """What the file in a folder of checkpoints says; None where there is none, and with a warning
    where it says something else.

    Raises:
        StorageError: it cannot be reached.
    """
    place = join(folder, FILE)
    try:
        content = read_json(*resolve_uri(str(place)))
        return None if content is None else _parsed(content)
    except StorageError:
        raise
    except (DataError, AttributeError, KeyError, TypeError, ValueError) as error:
        why = error.what if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        log.warning("%s names no checkpoint (%s); going on without it", public(place), why[:200])
        return None


def _parsed(content: Any) -> Best:
    step, score = content["step"], content["score"]
    if type(step) is not int or type(score) not in (int, float) or not math.isfinite(score):
        raise ValueError(f"step {step!r}, score {score!r}")
    return Best(
        step,
        float(score),
        str(content.get("name", "")),
        str(content.get("compared", "")),
        str(content.get("asked", "")),
        tuple(map(int, content.get("evaluated", ()))),
    )


def write_best(folder: Place, best: Best) -> None:
    """Points the file at a step; the checkpoint of that step is then kept."""
    text = json.dumps(asdict(best)) + "\n"
    write_bytes_atomic(text.encode(), *resolve_uri(str(join(folder, FILE))))
