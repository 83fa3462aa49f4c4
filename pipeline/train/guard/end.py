"""How a run ends whose guard has ended it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pipeline.plan.plan import Plan
from pipeline.train.guard import words
from pipeline.train.guard.guard import Guard

log = logging.getLogger("pipeline.train")


def guarded(
    outcome: dict[str, Any],
    guard: Guard | None,
    plan: Plan,
    best: Mapping[str, Any] | None,
    tracker: Any,
) -> dict[str, Any]:
    """The outcome of rank 0, with status `guarded` where the guard has ended the run.

    A step that was not finite ends it too, where there is a checkpoint to keep: a far too high rate
    may come to that before an evaluation does.

    Args:
        outcome: of the loop.
        guard: of the run; None: it has none.
        plan: of the run.
        best: the checkpoint that is kept.
        tracker: of rank 0.
    """
    status = outcome["status"]
    if guard is None or status not in ("finished", "stopped", "non_finite"):
        return outcome
    if status == "non_finite" and best is None:
        return outcome
    if status == "non_finite":
        guard.end(outcome["step"], f"step {outcome['step']}: {outcome['detail']}")
    if guard.ended is None:
        return outcome
    done = int(outcome.get("step", plan.steps))
    text = words.sentence(guard.ended, done, plan.steps, plan.config.optim.lr, best)
    log.warning("guard       %s", text)
    tracker.tags({"guard": text})
    tracker.metrics(done, {"guard/ended": 1})
    return {"status": "guarded", "step": done, "guard": text}
