"""What a run says of its training in few words: of the plan before, of the outcome behind it."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.plan.plan import Plan
from pipeline.train.run import Outcome

LEFT_OUT = ("objective", "data", "memory", "disk", "expect")  # first words


def brief(lines: Iterable[str]) -> list[str]:
    """Lines of a plan without those that a dry run is asked for; a line that begins with a blank
    goes on with the one before.
    """
    kept, shown = [], True
    for line in lines:
        if not line.startswith(" "):
            shown = line.split()[0] not in LEFT_OUT
        kept += [line] * shown
    return kept


def trained(outcome: Outcome, plan: Plan, compared: str) -> str:
    """How a training has ended, in a sentence.

    Args:
        outcome: of the training.
        plan: of it.
        compared: the sets that were scored while training.
    """
    details = outcome.details
    best = details.get("best")
    return (
        f"{outcome.status} at step {outcome.step}/{plan.steps}"
        + (f", {details['images_per_s']:,.0f} images/s" if "images_per_s" in details else "")
        + (
            f", MFU {100 * details['mfu']:.1f} %"
            if "mfu" in details and plan.device == "cuda"
            else ""
        )
        + (
            f", data wait {100 * details['data_wait_fraction']:.1f} %"
            if "data_wait_fraction" in details
            else ""
        )
        + (
            f", best {best['name'].partition('/')[2]} {best['score']:.4f} at step "
            f"{best['step']:.0f} (while training{', ' * bool(compared)}{compared})"
            if best
            else ""
        )
        + "".join(
            f"; {details[name]}"
            for name in ("data_limit", "evaluations", "guard")
            if details.get(name)
        )
    )
