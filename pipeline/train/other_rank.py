"""What every rank does beside its steps; rank 0 does more (`rank_zero.py`)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.train.checkpoint.saving import Saving
from pipeline.train.speed.bottleneck import Clock, Window
from pipeline.train.start import TrainState
from pipeline.views.batch import Batch

LAST_TRIES_S = (5, 10, 15)  # pauses before the last checkpoint of a run is tried again
STOP_TRY_S = 2  # the same of a run that is stopped: whoever stops it may not wait long


class OtherRank:
    """Every rank but 0: nothing is asked of it. Beside its steps it writes its part of a
    checkpoint, where networks are split over the ranks (`saving` is None where they are not).
    """

    def __init__(self, train_state: TrainState, saving: Saving | None) -> None:
        self.train_state, self.saving = train_state, saving

    def request(self) -> str:
        """No request comes in here."""
        return ""

    def confirmed(self, step: int) -> str:
        """Nor is one confirmed."""
        return ""

    def log(self, step: int, window: Window, clock: Clock) -> None:
        """After some steps."""

    def non_finite(self, step: int, window: Window, clock: Clock) -> None:
        """After a step that was not applied."""

    def save(self, step: int) -> None:
        """When a checkpoint is due: copies it and begins to write it."""
        self.settle(wait=True)
        if self.saving is not None:
            self.saving.begin(step, self.train_state.state(), {})

    def settle(self, wait: bool = False) -> None:
        """Takes up how the last checkpoint ended, if it has; or waits for that."""
        if self.saving is not None:
            self.saving.ended(wait)

    def insist(self, status: str) -> None:
        """At the end: waits for the last checkpoint, and tries a few more times where it could not
        be written. All ranks that write take the same turns.
        """
        self.settle(wait=True)
        for pause in {"finished": LAST_TRIES_S, "stopped": (STOP_TRY_S,)}.get(status, ()):
            if self.saving is None or not self.saving.failed:
                return
            time.sleep(pause)
            self.saving.again()
            self.settle(wait=True)

    def evaluate(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """When an evaluation is due; the weights are with rank 0."""

    def picture_crops(self, batch: Batch) -> None:
        """Before the first step of a run."""

    def finish(self, outcome: dict[str, Any], clock: Clock) -> dict[str, Any] | None:
        """After the last step; gives what the driver is told."""
        self.insist(outcome["status"])
        return None
