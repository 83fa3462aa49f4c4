"""Of how many evaluations a run's own weights are the best: the best of many looks too good."""

from __future__ import annotations

from pipeline.card.words import UNLABELLED
from pipeline.config.config import Config
from pipeline.plan.resume import plan_of
from pipeline.storage.run_folder import RunFolder
from pipeline.train.checkpoint import state
from pipeline.train.guard.begin import is_guarded


def chosen_from(config: Config, folder: RunFolder, score: str) -> int:
    """Evaluations, on the images that the recipe names, that a run's best checkpoint is the best
    of. 1: it was not chosen by this score, or on other images.

    Args:
        config: the recipe of the evaluation.
        folder: of the run.
        score: that decides on the card.
    """
    if config.export.checkpoint != "best" or score in UNLABELLED:
        return 1
    best, last = state.best(folder.checkpoints), state.latest(folder.checkpoints)
    _, name = state.best_of(folder.checkpoints)
    if not (best and last) or name != f"eval/{score}":
        return 1
    plan = plan_of(last.meta, last.path)
    trained, asked = plan.config.evaluate, config.evaluate
    if (trained.reference, trained.queries) != (asked.reference, asked.queries):
        return 1
    # only a guarded run has a checkpoint of step 0 that could be chosen
    first = 0 if is_guarded(plan.config) else 1
    return max(1, sum(map(plan.evaluates_at, range(first, last.step + 1))))


def remark(evaluations: int) -> str:
    """What the card says of it."""
    return (
        f"these weights were chosen as the best of {evaluations:,} evaluations on these images, or "
        "on a sample of them, which flatters them: the verdict asks for gains beyond that, and "
        "tables show plain 95 % intervals"
    )
