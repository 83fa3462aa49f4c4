"""Makes the guard of a run, where the recipe has one; and what a recipe says of it."""

from __future__ import annotations

from typing import Any

from pipeline.config.config import Config
from pipeline.evaluate.guard.measure import IMAGES, SMOOTH_IMAGES
from pipeline.model.low_rank import merged_state
from pipeline.plan.plan import Plan
from pipeline.train import start
from pipeline.train.checkpoint import state
from pipeline.train.guard.decision import Limits
from pipeline.train.guard.guard import Guard
from pipeline.uri import Place, public


def is_guarded(config: Config) -> bool:
    """Whether evaluations are compared with the start."""
    return config.guard.is_on(config.model.init)


def guard_of(plan: Plan, checkpoints: Place, key: str) -> Guard | None:
    """The guard of a run; None where it has none.

    Args:
        plan: a `located` one, of the run.
        checkpoints: the folder.
        key: `EvaluationSpec.guard_key`.
    """
    if not is_guarded(plan.config):
        return None
    guard = plan.config.guard
    limits = Limits(guard.falls, guard.least, guard.keep_fall)
    return Guard(limits, checkpoints, key, lambda: weights_at_start(plan, checkpoints))


def weights_at_start(plan: Plan, checkpoints: Place) -> dict[str, Any]:
    """The backbone that a run began with, as arrays by name: of the checkpoint of step 0, else of
    what a `located` plan starts from.

    Raises:
        PipelineError: neither is there any more.
    """
    saved = state.at(state.place_of(checkpoints, 0))
    if saved is None:
        tensors = dict(start.starting_pair(plan)[0].teacher.backbone.state_dict())
    else:
        tensors = merged_state(start.part_of(saved.teacher(), "backbone"))
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def described(config: Config) -> str:
    """What is compared with the start and what ends the training; "" without a guard."""
    if not is_guarded(config):
        return ""
    guard = config.guard
    why = "model.init is set" if guard.enabled == "auto" else "guard.enabled=true"
    decided = config.evaluate.decide_by
    named = guard.score or (decided if decided != "rank_me" else "")
    score = named or f"knn{config.evaluate.k}_top1"
    keep = ""
    if guard.keep:
        never = guard.keep_fall == 1
        allowed = "no loss ends it" if never else f"{guard.keep_fall:g} may be lost"
        keep = f"; k-NN of {public(guard.keep)} (guard.keep), of which {allowed}"
    return (
        f"on ({why}): {score} against the start, image by image, or without labels what is left of "
        f"it (rank and neighbours of {IMAGES:,} images, patches of {SMOOTH_IMAGES}; least "
        f"{guard.least:g}){keep}; {guard.falls} falls in a row end the training"
    )
