"""What a guard says: why a training ended, what was kept, what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.train.guard.decision import LEFT, Comparison
from pipeline.train.guard.memory import Ended


def why(what: str, fallen: Comparison, row: Sequence[int]) -> str:
    """Why a training ends, without a full stop.

    Args:
        what: `score` or `keep`.
        fallen: at the last step of the row.
        row: steps.
    """
    steps = _steps(row)
    gain = fallen.gain
    if fallen.name == LEFT:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in fallen.parts)
        return (
            f"without labels, {fallen.value:.2f} of the start is left at {steps} "
            f"(95 % interval {1 + gain.low:.2f} to {1 + gain.high:.2f}: {parts}), less than "
            f"guard.least={1 + fallen.limit:g}"
        )
    of, allowed = "", ""
    if what == "keep":
        of, allowed = " of guard.keep", f"; guard.keep_fall={-fallen.limit:g} is allowed"
    return (
        f"{fallen.name}{of} fell from {fallen.start:.4f} at the start to {fallen.value:.4f} at "
        f"{steps} (difference {gain.value:+.4f}, 95 % interval {gain.low:+.4f} to {gain.high:+.4f}"
        f"{allowed})"
    )


def _steps(row: Sequence[int]) -> str:
    if len(row) == 1:
        return f"step {row[0]}"
    return f"step {row[-1]}, after step{'s' * (len(row) > 2)} {', '.join(map(str, row[:-1]))}"


def sentence(ended: Ended, done: int, steps: int, lr: float, best: Mapping[str, Any] | None) -> str:
    """How a run was ended by its guard, with numbers.

    Args:
        ended: by what.
        done: steps that were done.
        steps: of the whole run.
        lr: `optim.lr` as the recipe has it.
        best: step, score and name of the checkpoint that is kept; None: none was compared.
    """
    when = f"after step {done} of {steps}" if done < steps else f"at the end of all {steps} steps"
    if best is None:
        kept = "no checkpoint was compared, so the last one stays"
    else:
        score = f"{str(best['name']).partition('/')[2]} {best['score']:.4f}"
        what = "the weights it started from are kept"
        if best["step"]:
            what = f"the checkpoint of step {best['step']} is kept"
        kept = f"{what} ({score})"
    return (
        f"ended by the guard {when}: {ended.why}; {kept}. Train again under another run.name with "
        f"a lower optim.lr (it was {lr:.3g}), a longer optim.warmup or more "
        "train.freeze_backbone_steps; guard.enabled=false goes on past it"
    )
