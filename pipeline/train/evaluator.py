"""The actor that evaluates while training: on which sets, and where it runs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import torch

from pipeline.config.config import Config
from pipeline.evaluate.sets import evaluation_sets, keep_set
from pipeline.evaluate.teacher import Evaluation, EvaluationSpec, Evaluator
from pipeline.model.pair import Spec
from pipeline.plan.plan import Plan
from pipeline.shards.set_range import difference, ranged
from pipeline.shards.shards import ShardSet
from pipeline.train import build
from pipeline.train.guard.begin import is_guarded

log = logging.getLogger("pipeline.train")

Weights = dict[str, Any]  # arrays of numpy, by the name of the tensor


class EvaluatorActor:
    """An `Evaluator` in a process of its own; weights come by value, as arrays.

    Args:
        spec: sets and settings.
        backbone: what is evaluated, without its weights.
        device: where.
        share: of the memory of the GPU, so that a worker on the same one keeps the rest.
    """

    def __init__(self, spec: EvaluationSpec, backbone: Spec, device: str, share: float) -> None:
        if 0 < share < 1 and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(share)
        self.evaluator = Evaluator(spec, device=device)
        self.backbone = backbone

    def run(self, weights: Weights, limit: int | None) -> Evaluation:
        """Evaluates a teacher's backbone."""
        backbone = self.backbone.build()
        with warnings.catch_warnings():  # of arrays that cannot be written to: they are only read
            warnings.simplefilter("ignore", UserWarning)
            state = {name: torch.from_numpy(value) for name, value in weights.items()}
        backbone.load_state_dict(state)
        return self.evaluator.run(backbone, limit)


def in_range(config: Config, shards: ShardSet) -> ShardSet:
    """The set with the range of values that a recipe asks for."""
    return ranged(shards, config.data.range, config.model.in_channels)


def as_planned(plan: Plan, shards: ShardSet) -> ShardSet:
    """The set with the range of values that a plan decodes with."""
    if plan.value_range is None:
        return in_range(plan.config, shards)
    return replace(shards, value_range=plan.value_range)


def evaluation_spec(plan: Plan, shards: ShardSet, guarded: bool = False) -> EvaluationSpec:
    """Which sets vote and which are asked; the training shards vote where nothing else is named.

    Args:
        plan: of the run.
        shards: of the training.
        guarded: with what the guard of the recipe compares, where it has one.

    Raises:
        PipelineError: as `evaluation_sets` says, or the score that decides needs labels.
    """
    config = plan.config
    settings, data = config.evaluate, config.data
    shards = as_planned(plan, shards)
    reference, queries = (
        one and _read_alike(config, *one, shards)
        for one in evaluation_sets(config, shards) or (None, None)
    )
    guarded = guarded and is_guarded(config)
    keep = keep_set(config) if guarded else None
    return EvaluationSpec(
        sample=shards,
        reference=reference,
        queries=queries,
        image_size=plan.evaluation_size,
        k=settings.k,
        temperature=settings.temperature,
        mean=config.augment.mean,
        std=config.augment.std,
        batch_size=settings.batch_size,
        seed=config.run.seed,
        max_pixels=data.max_image_pixels,
        half=plan.precision == "bfloat16",
        channels=config.model.in_channels,
        decide_by=settings.decide_by,
        guard=config.guard.score if guarded else None,
        keep=keep and _read_alike(config, *keep, shards),
    )


def _read_alike(config: Config, field: str, shards: ShardSet, training: ShardSet) -> ShardSet:
    """A set with the range of values of the training images; said where its own is another."""
    if shards is training:
        return shards
    mapped, channels = training.columns.value_range, config.model.in_channels
    if text := difference(f"the images of {field}", shards, mapped, channels):
        log.warning("%s", text)
    return replace(shards, value_range=training.value_range)


def launch_evaluator(spec: EvaluationSpec, plan: Plan) -> Any:
    """Starts the actor where `device_of` says."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    device, share = device_of(plan, ray.cluster_resources().get("GPU", 0))
    options: dict[str, Any] = {
        "num_cpus": 0,
        "num_gpus": share,
        "max_restarts": 100,  # in weeks; one that never starts is given up at some time
        "max_task_retries": 1,
    }
    if device == "cpu" and (node := roomiest(ray.nodes())):
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
    place = {0.0: "CPUs", 1.0: "a spare GPU"}.get(share, f"{share:g} of a training GPU")
    usual = device == "cpu" and plan.device == "cpu"
    log.log(logging.DEBUG if usual else logging.INFO, "evaluate    while training on %s", place)
    return (
        ray.remote(EvaluatorActor)
        .options(**options)
        .remote(spec, build.encoder_spec(plan.config, plan.encoder_files), device, share)
    )


def device_of(plan: Plan, gpus: float) -> tuple[str, float]:
    """Where evaluations run while training, and how much of a GPU they reserve: the part that the
    workers leave (`evaluate.gpu_share`), else a GPU that no worker has, else CPUs beside them.

    Args:
        plan: of the run.
        gpus: that the cluster has.
    """
    if plan.device == "cuda":
        if share := plan.config.evaluate.gpu_share:
            return "cuda", share
        workers, share_of_each = plan.sizes[-1], plan.gpus_per_worker
        # a worker takes its part from one GPU: what is left of several makes no whole one
        taken = workers if share_of_each == 1 else ceil(workers / max(1, int(1 / share_of_each)))
        if gpus - taken >= 1:
            return "cuda", 1.0
    return "cpu", 0.0


def roomiest(nodes: Sequence[Mapping[str, Any]]) -> str:
    """Id of the living node with the most CPUs; empty where none has any.

    An actor that reserves nothing may be put anywhere, on a head without CPUs too, whose memory the
    whole cluster needs. Where the node is lost, the actor starts again on any other.

    Args:
        nodes: from `ray.nodes()`.
    """
    rooms = {n["NodeID"]: n["Resources"].get("CPU", 0) for n in nodes if n["Alive"]}
    best = max(rooms, key=lambda node: (rooms[node], node), default="")
    return best if best and rooms[best] > 0 else ""
