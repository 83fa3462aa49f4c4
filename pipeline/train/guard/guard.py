"""What rank 0 holds: the start's answers, how evaluations stand against them, and the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipeline.errors import DataError, one_line
from pipeline.evaluate.guard.answers import Answers
from pipeline.train.guard import memory, words
from pipeline.train.guard.decision import Compared, Comparison, Limits, compared, row_after
from pipeline.train.guard.memory import Ended
from pipeline.uri import Place

log = logging.getLogger("pipeline.train")
TRIES = 3  # of the evaluation of the start


class Guard:
    """Compares evaluations with the start's, and says when training must end.

    Attributes:
        start: the start's answers; None until they are there.
        ended: why training must end; None: it need not.

    Args:
        limits: of the recipe.
        checkpoints: the folder, beside which what outlives a restart is kept.
        key: of the images and settings of evaluations.
        weights: of the backbone at the start, as arrays by name; may take long.
    """

    def __init__(
        self, limits: Limits, checkpoints: Place, key: str, weights: Callable[[], dict[str, Any]]
    ) -> None:
        self.limits, self.checkpoints, self.key, self.weights = limits, checkpoints, key, weights
        self.start = memory.read_start(checkpoints, key)
        self.falls = memory.read_falls(checkpoints, key)
        self.tries = 0
        self.unlike = ""  # why an evaluation could not be compared, said once

    @property
    def ended(self) -> Ended | None:
        """Why training must end."""
        return self.falls.ended

    @property
    def waits(self) -> bool:
        """Whether the start's answers are still to come."""
        return self.start is None and self.tries < TRIES

    def begin(self, answers: Answers) -> None:
        """Takes the answers of the start."""
        self.start = answers
        self._kept(lambda: memory.write_start(self.checkpoints, answers, self.key))

    def failed(self) -> None:
        """The start could not be evaluated."""
        self.tries += 1
        if not self.waits:
            log.error(
                "the start could not be evaluated %d times: the guard is off, nothing is compared",
                TRIES,
            )

    def compare(self, step: int, answers: Answers) -> Compared:
        """An evaluation against the start; counts falls, and decides.

        Where the two cannot be compared nothing is counted, and that is said once.
        """
        if self.start is None:
            return Compared()
        try:
            result = compared(answers, self.start, self.limits)
        except DataError as error:
            if error.what != self.unlike:
                log.warning("the guard compares nothing at step %d: %s", step, error.what)
            self.unlike = error.what
            return Compared()
        rows = dict(self.falls.rows)
        for what in memory.WHAT:
            one: Comparison | None = getattr(result, what)
            if one is None:
                continue
            rows[what] = row_after(rows[what], step, one.fell)
            if one.fell and len(rows[what]) <= self.limits.falls:
                log.warning(
                    "guard       fallen %d of %d times: %s",
                    len(rows[what]),
                    self.limits.falls,
                    words.why(what, one, [step]),
                )
            if len(rows[what]) >= self.limits.falls:
                self.end(step, words.why(what, one, rows[what]))
        if rows != self.falls.rows:
            self.falls = replace(self.falls, rows=rows)
            self._kept(lambda: memory.write_falls(self.checkpoints, self.falls))
        return result

    def end(self, step: int, why: str) -> None:
        """Training must end; the first reason counts."""
        if self.falls.ended is None:
            self.falls = replace(self.falls, ended=Ended(step, why))
            self._kept(lambda: memory.write_falls(self.checkpoints, self.falls))

    def metrics(self, result: Compared) -> dict[str, float]:
        """Numbers of a comparison, by their names in MLflow."""
        values: dict[str, float] = {}
        for what, prefix in zip(memory.WHAT, ("guard/", "guard/keep_"), strict=True):
            one: Comparison | None = getattr(result, what)
            if one is None:
                continue
            gain = one.gain
            values |= {
                f"{prefix}gain": gain.value,
                f"{prefix}gain_low": gain.low,
                f"{prefix}gain_high": gain.high,
                f"{prefix}falls": len(self.falls.rows[what]),
            }
            values |= {f"guard/{name}": value for name, value in one.parts}
        return values

    def _kept(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:  # training goes on; a restart would count anew
            log.error("what the guard knows could not be written (%s)", one_line(error))
