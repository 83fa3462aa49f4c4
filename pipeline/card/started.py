"""Rules of the verdict on a model that a training began with weights: was it worth it?"""

from __future__ import annotations

from pipeline.card.case import Case


def kept_init(case: Case) -> str:
    """The weights that the run started from are the best checkpoint: its guard kept them."""
    if case.init is None or case.best.facts.get("step") != 0:
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
