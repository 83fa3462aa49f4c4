"""Whether an evaluation has fallen below the start, and how many did so in a row.

Differences are those of the same images with 95 % intervals (`evaluate.score.difference`). A score
has fallen where the whole interval is below the limit: 0 for the score, less than that for images
on which a loss is allowed, and for what is left of the start without labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.evaluate.guard.answers import Answers
from pipeline.evaluate.guard.structure import left_of
from pipeline.evaluate.score import Interval, Score, difference

LEFT = "left_of_start"


@dataclass(frozen=True)
class Limits:
    """What the recipe allows.

    Attributes:
        falls: evaluations in a row that end a training.
        least: of what is left of the start, where there are no labels.
        keep_fall: of the loss on the images of `guard.keep`.
    """

    falls: int
    least: float
    keep_fall: float


@dataclass(frozen=True)
class Comparison:
    """One number of an evaluation against the same one of the start.

    Attributes:
        name: of the score, or `LEFT`.
        value: now.
        start: at the start.
        gain: value - start, with its interval.
        limit: of the gain.
        parts: what the number is made of, where it is `LEFT`.
    """

    name: str
    value: float
    start: float
    gain: Interval
    limit: float = 0.0
    parts: tuple[tuple[str, float], ...] = ()

    @property
    def fell(self) -> bool:
        """Whether it is surely below the limit."""
        return self.gain.high < self.limit


@dataclass(frozen=True)
class Compared:
    """An evaluation against the start; None: that was not compared."""

    score: Comparison | None = None
    keep: Comparison | None = None

    @property
    def may_be_best(self) -> bool:
        """Whether its checkpoint may be kept as the best: the score did not fall, and no more was
        forgotten than is allowed, by the value itself.
        """
        if self.score is not None and self.score.fell:
            return False
        return self.keep is None or self.keep.gain.value >= self.keep.limit


def compared(now: Answers, start: Answers, limits: Limits) -> Compared:
    """An evaluation against the start.

    Raises:
        DataError: they are of other images, or other scores.
    """
    if (now.score is None) != (start.score is None):
        raise DataError("one of the two evaluations has labels of use and the other has none")
    if (now.keep is None) != (start.keep is None):
        raise DataError("one of the two evaluations was not made on guard.keep")
    score = None
    if now.score is not None and start.score is not None:
        score = _of_scores(now.score, start.score, 0.0)
    elif now.structure is not None and start.structure is not None:
        left = left_of(now.structure, start.structure)
        value, low, high = left.interval.value, left.interval.low, left.interval.high
        gain = Interval(value - 1, low - 1, high - 1)
        parts = tuple(left.parts.items())
        score = Comparison(LEFT, value, 1.0, gain, limits.least - 1, parts)
    keep = None
    if now.keep is not None and start.keep is not None:
        keep = _of_scores(now.keep, start.keep, -limits.keep_fall)
    return Compared(score, keep)


def _of_scores(now: Score, start: Score, limit: float) -> Comparison:
    return Comparison(now.name, now.value, start.value, difference(now, start), limit)


def row_after(row: Sequence[int], step: int, fell: bool) -> list[int]:
    """The steps in a row that have fallen, once that of `step` is known.

    A step that is evaluated again after a restart takes the place of its first evaluation.
    """
    return [*(earlier for earlier in row if earlier < step), step] if fell else []
