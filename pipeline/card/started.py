"""Rules of the verdict on a model that a training began with weights: was it worth it?"""

from __future__ import annotations

from pipeline.card.case import Case
from pipeline.card.words import title_of


def kept_init(case: Case) -> str:
    """The weights that the run started from are the best checkpoint: its guard kept them."""
    if not (case.init or case.best.start) or case.best.facts.get("step") != 0:
        return ""
    return (
        f"Kept the weights it started from ({case.said()}): no later checkpoint was kept as a "
        "better one; train again with a lower optim.lr or a longer optim.warmup, or on more images."
    )


def worse_than_init(case: Case) -> str:
    """Worse than the weights that the run started from."""
    if case.init is None or not case.gain(case.init).is_worse:
        return ""
    return (
        f"Worse than what it started from ({case.pair(case.init)}): keep those weights, or train "
        "again with a lower optim.lr."
    )


def no_better_than_init(case: Case) -> str:
    """As good as the weights that the run started from."""
    if case.init is None or not case.gain(case.init).is_none:
        return ""
    return (
        f"No better than what it started from ({case.pair(case.init)}): keep those weights, or "
        "train longer or on more images."
    )


def init_not_scored(case: Case) -> str:
    """Nothing says whether training was worth it: its beginning is not on the card."""
    if case.init is not None or not case.best.start:
        return ""
    start = f", {case.against(case.start)}" if case.start else ""
    return (
        f"No verdict: {case.said()}{start}, but what it started from ({case.best.start}) has "
        f"no {title_of(case.card.score)} on this card, so nothing says whether this is better."
    )
