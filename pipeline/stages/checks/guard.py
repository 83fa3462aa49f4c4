"""What the guard of a training needs to know before it starts, and after it has ended one."""

from __future__ import annotations

from typing import Any

from pipeline.config.config import Config
from pipeline.context import Context
from pipeline.errors import DataError
from pipeline.evaluate.guard.measure import unusable_labels
from pipeline.evaluate.sets import keep_remarks, keep_set
from pipeline.plan.resume import plan_of
from pipeline.shards.shards import ShardSet
from pipeline.train.checkpoint import state
from pipeline.train.guard import memory, words
from pipeline.train.guard.begin import is_guarded
from pipeline.uri import public


def remarks_on_keep(config: Config, shards: ShardSet) -> list[str]:
    """Sentences on the images of `guard.keep`; reads their ids and labels.

    Raises:
        DataError: they cannot be read, or their labels say nothing.
    """
    keep = keep_set(config)
    if keep is None or not is_guarded(config):
        return []
    if why := unusable_labels(keep[1]):
        raise DataError(
            f"the labels of guard.keep={public(keep[1].uri)} are of no use: {why}",
            "name images of two classes or more, with several images of each",
        )
    return keep_remarks(config, shards)


def ended_before(context: Context) -> dict[str, Any]:
    """The result of a run that its guard has ended; {} where it may go on."""
    folder = context.folder.checkpoints
    saved = state.latest(folder)
    if saved is None or not is_guarded(context.config):
        return {}
    end = memory.ended(folder)
    if end is None:
        return {}
    was, best = plan_of(saved.meta, saved.path), state.best(folder)
    known = best[1].summary if best else None
    text = words.sentence(end, saved.step, was.steps, was.config.optim.lr, known)
    return {
        "text": f"guarded at step {saved.step}/{was.steps}; {text}",
        "status": "guarded",
        "step": saved.step,
        "steps": was.steps,
        "best": known,
        "guard": text,
    }
