"""Which checkpoint is the best so far, as evaluations come."""

from __future__ import annotations

import logging
from dataclasses import replace

from pipeline.train.checkpoint import state
from pipeline.train.checkpoint.best import Best, write_best
from pipeline.uri import Place

log = logging.getLogger("pipeline.train")


class Choice:
    """The best checkpoint and what it was chosen from, in memory and in `best.json`.

    A best that earlier starts of the run have chosen on other images or by another score is not
    compared with: one is chosen anew, which is said.

    Args:
        checkpoints: the folder.
        key: changes with the images and settings of the scores.
        asked: digest of the images that are classified.
        usual: the score that chose where `best.json` does not name it.
    """

    def __init__(self, checkpoints: Place, key: str, asked: str, usual: str) -> None:
        self.checkpoints, self.key, self.asked = checkpoints, key, asked
        self.best: Best | None = None
        marked = state.best(checkpoints)
        if marked is None:
            return
        best = marked[1]
        if best.compared == key:
            known = best.evaluated or (best.step,)  # earlier files do not say it
            self.best = replace(best, name=best.name or usual, asked=asked, evaluated=known)
            return
        log.warning(
            "the best checkpoint so far (step %d, score %.4f) was evaluated with other images or "
            "settings (evaluate.*): the best is chosen anew from here on",
            best.step,
            best.score,
        )

    def note(self, step: int, score: float, name: str, newest: bool = False) -> None:
        """Counts an evaluation among those that the best is chosen from, and may choose it. One
        without a checkpoint cannot be chosen.

        Args:
            step: that was evaluated.
            score: the higher the better.
            name: of the score.
            newest: the newest is the best, whatever its score.

        Raises:
            OSError: `best.json` could not be written.
        """
        best = self.best
        if best and best.name != name:
            log.warning(
                "the best checkpoint so far (step %d) was chosen by %s: it is chosen anew by %s "
                "from here on",
                best.step,
                best.name,
                name,
            )
            best = self.best = None
        if step not in {saved.step for saved in state.checkpoints(self.checkpoints)}:
            return
        evaluated = tuple(sorted({*(best.evaluated if best else ()), step}))
        if best is None or newest or score >= best.score:
            best = Best(step, score, name, self.key, self.asked)
        self.best = replace(best, evaluated=evaluated)
        write_best(self.checkpoints, self.best)
