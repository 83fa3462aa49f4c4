"""What a model began with: networks that say what training has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.embed.embedders import BACKBONE, EmbedderSpec
from pipeline.embed.load import load_teacher, load_timm, load_weights
from pipeline.errors import DataError
from pipeline.uri import is_uri, parent, public

SEED = 0  # of random weights


def checkpoint_of(spec: EmbedderSpec) -> str:
    """The checkpoint of ours that a backbone is the teacher of; "" for all other models."""
    load = spec.load
    return str(load.args[0]) if isinstance(load, partial) and load.func is load_teacher else ""


def start_of(checkpoint: str) -> str:
    """The weights that the training of a checkpoint began with; "" for random ones.

    Raises:
        DataError: the checkpoint is gone.
    """
    return str(_plan(checkpoint).init)


def trained_on(checkpoint: str) -> int:
    """How many images the run of a checkpoint trains on.

    Raises:
        DataError: the checkpoint is gone.
    """
    return int(_plan(checkpoint).images)


def passes_over(checkpoint: str) -> float:
    """How many times the run of a checkpoint went over its images until its last checkpoint.

    Raises:
        DataError: the checkpoint is gone.
    """
    from pipeline.train.checkpoint import state

    plan = _plan(checkpoint)
    last = state.checkpoints(parent(checkpoint if is_uri(checkpoint) else Path(checkpoint))[0])[-1]
    return float(last.step / plan.steps_per_pass)


def computes_in_half(checkpoint: str) -> bool:
    """Whether the training of a checkpoint computed in bfloat16.

    Raises:
        DataError: the checkpoint is gone.
    """
    return bool(_plan(checkpoint).precision == "bfloat16")


def at_step_0(trained: EmbedderSpec, untrained: bool = False) -> EmbedderSpec:
    """The network that the training of a run began with, for the same images as the trained one.

    Args:
        trained: the teacher of a checkpoint.
        untrained: with random weights, also where the run began with others.
    """
    what = "untrained" if untrained else "at step 0"
    return replace(
        trained,
        kind=BACKBONE,
        name=f"{trained.name} ({what})",
        digest=f"{trained.digest} {what}",
        load=partial(load_first, checkpoint_of(trained), untrained),
    )


def load_first(checkpoint: str, untrained: bool = False) -> Any:
    """In a task: the backbone that the training of a checkpoint began with.

    Raises:
        PipelineError: the checkpoint is gone, or the weights that it began with are.
    """
    return load_planned(_plan(checkpoint), untrained)


def load_planned(plan: Any, untrained: bool = False) -> Any:
    """In a task: the backbone that the training of a plan begins with.

    Args:
        plan: a `pipeline.plan.plan.Plan`, with the place of its weights in `init`.
        untrained: with random weights, also where the plan begins with others.

    Raises:
        PipelineError: the weights are gone.
    """
    from pipeline.train.start import starting_pair

    if untrained:
        plan = plan.model_copy(update={"init": ""})
    return starting_pair(plan)[0].teacher.backbone.eval()


def untrained(spec: EmbedderSpec) -> EmbedderSpec | None:
    """The network of weights, or of timm, with random weights, for the same images; None where what
    it is made of is not known, as in ONNX.
    """
    load = spec.load
    if not isinstance(load, partial) or load.func not in (load_weights, load_timm):
        return None
    return replace(
        spec,
        name=f"{spec.name} (untrained)",
        digest=f"{spec.digest} untrained",
        load=partial(load_random, load.func, load.args[0]),
    )


def load_random(load: Callable[..., Any], name: str) -> Any:
    """In a task: what `load_weights` or `load_timm` builds, the same random weights each time."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return load(name, random=True)


def _plan(checkpoint: str) -> Any:
    from pipeline.plan.resume import plan_of
    from pipeline.train.checkpoint import state

    saved = state.at(checkpoint if is_uri(checkpoint) else Path(checkpoint))
    if saved is None:
        raise DataError(f"the checkpoint {public(checkpoint)} is gone", "evaluate again")
    return plan_of(saved.meta, saved.path)
