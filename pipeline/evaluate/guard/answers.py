"""What one evaluation answers, image by image, so that it can be compared with the start's."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.evaluate.guard.structure import Structure
from pipeline.evaluate.score import STATISTICS, Score


@dataclass(frozen=True)
class Answers:
    """Of one network; None where it was not asked, or has no labels.

    Attributes:
        score: of the score that is compared.
        structure: what is compared where there are no labels of use.
        keep: k-NN of the images on which nothing is to be forgotten.
    """

    score: Score | None = None
    structure: Structure | None = None
    keep: Score | None = None

    def __bool__(self) -> bool:
        return any(x is not None for x in (self.score, self.structure, self.keep))


def to_bytes(answers: Answers, key: str) -> bytes:
    """As the content of an .npz file, without pickles.

    Args:
        answers: of an evaluation.
        key: of which images and settings they are.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    facts: dict[str, Any] = {"key": key}
    for name in ("score", "keep"):
        score: Score | None = getattr(answers, name)
        if score is not None:
            facts[name] = {"name": score.name, "statistic": score.statistic}
            arrays |= {f"{name}_terms": score.terms, f"{name}_ids": score.ids}
    if answers.structure is not None:
        structure = answers.structure
        facts["rank"] = structure.rank
        arrays |= {
            "structure_ids": structure.ids,
            "neighbours": structure.neighbours,
            "smoothness": structure.smoothness,
        }
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    return file.getvalue()


def from_bytes(content: bytes) -> tuple[Answers, str]:
    """Answers and their key, as `to_bytes` wrote them.

    Raises:
        DataError: it holds something else.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = dict(file)
        facts = json.loads(arrays["facts"].tobytes())
        answers = Answers(
            _score("score", facts, arrays),
            _structure(facts, arrays),
            _score("keep", facts, arrays),
        )
        return answers, str(facts["key"])
    except Exception as error:  # of whatever kind: the bytes are someone else's
        raise DataError(
            f"it holds no answers of an evaluation ({type(error).__name__}: {error})"[:200]
        ) from error


def _score(name: str, facts: Mapping[str, Any], arrays: Mapping[str, Any]) -> Score | None:
    if name not in facts:
        return None
    terms, ids = arrays[f"{name}_terms"], arrays[f"{name}_ids"]
    said = facts[name]
    rightly = terms.ndim == 2 and terms.dtype == np.float64 and said["statistic"] in STATISTICS
    if not rightly or ids.shape != (len(terms), 16) or ids.dtype != np.uint8:
        raise ValueError(f"{name} has terms {terms.shape} and ids {ids.shape}")
    return Score(str(said["name"]), terms, ids, said["statistic"])


def _structure(facts: Mapping[str, Any], arrays: Mapping[str, Any]) -> Structure | None:
    if "rank" not in facts:
        return None
    ids, neighbours = arrays["structure_ids"], arrays["neighbours"]
    smoothness = arrays["smoothness"]
    if neighbours.ndim != 2 or ids.shape != (len(neighbours), 16) or smoothness.ndim != 1:
        raise ValueError(f"neighbours {neighbours.shape} of {ids.shape}")
    return Structure(ids, neighbours, float(facts["rank"]), smoothness)
