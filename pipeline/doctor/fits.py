"""What a plan takes beside what the machine or cluster has: memory, disk and time."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.context import nearest
from pipeline.plan.layout import Machine
from pipeline.plan.nodes import placed
from pipeline.plan.plan import Plan
from pipeline.stages.checks.micro_batches import GPU_ROOM
from pipeline.train.speed.bottleneck import count
from pipeline.train.speed.cost import Cost
from pipeline.train.speed.lasts import HOUR_S, in_words, seconds_of

__all__ = ["in_words", "say_disk", "say_memory", "say_time", "seconds_of"]

log = logging.getLogger("pipeline")
GIB = 2**30
PROCESS = 0.3 * GIB  # of a worker on a CPU, before it has a network
ROOM = 0.8  # of the memory for training workers; driver, decoders and evaluation need the rest
LONG_S = 24 * HOUR_S  # a run that takes longer is worth a word before it starts


def say_memory(plan: Plan, cost: Cost, machine: Machine) -> None:
    """Warns where the workers of a node take more memory than it has, with what would fit."""
    taken, there = memory_of(plan, cost, machine)
    room = GPU_ROOM if plan.device == "cuda" else ROOM
    if not there or taken <= room * there:
        return
    for change, lighter in lighter_plans(plan):
        memory = cost.memory.of(lighter.micro_batch, lighter.accumulation)
        lighter_cost = replace(cost, memory=memory)
        less, _ = memory_of(lighter, lighter_cost, machine)
        if less <= room * there:
            way = f"{change} takes about {less / GIB:.1f} GiB"
            break
    else:
        way = smaller_network(plan)
    place = "this machine" if one(machine) else "a node"
    log.warning(
        "the plan takes about %.1f GiB of memory for %s, and %s: %s",
        taken / GIB,
        count(plan.workers, "worker"),
        f"a GPU has {there / GIB:.1f} GiB"
        if plan.device == "cuda"
        else f"{place} has {there / GIB:.1f} GiB beside the object store, for all processes",
        way,
    )


def memory_of(plan: Plan, cost: Cost, machine: Machine) -> tuple[float, float]:
    """Bytes that the fullest node's workers take, and what it has for them; 0 where unknown."""
    if plan.device == "cuda":
        import torch

        if machine.elsewhere:
            return cost.memory_bytes, machine.gpu_bytes * plan.gpus_per_worker
        if not one(machine) or not torch.cuda.is_available():
            return cost.memory_bytes, 0.0
        card = torch.cuda.get_device_properties(0).total_memory
        return cost.memory_bytes, card * plan.gpus_per_worker
    dealt = placed(machine.rooms, plan.workers, plan.share) or []
    each = cost.memory_bytes + PROCESS

    def copied(workers: int) -> float:
        """Of a checkpoint: worker 0 writes it from a copy, or each worker its slices."""
        split = plan.config.train.strategy == "fsdp"
        return cost.checkpoint_bytes * (workers / plan.workers if split else 1)

    loads = [
        (workers * each + copied(workers), node.memory) for node, workers in dealt if node.memory
    ]
    return max(loads, key=lambda load: load[0] / load[1], default=(each + copied(1), 0.0))


def lighter_plans(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """The same steps in smaller pieces, the lightest change first: (fields with values, plan)."""
    batch = plan.config.optim.global_batch_size
    for workers in dict.fromkeys((plan.workers, 1)):
        prefix = f"train.workers={workers} " if workers != plan.workers else ""
        for accumulation in range(1, batch // workers + 1):
            micro = batch // (workers * accumulation)
            if batch % (workers * accumulation) or (not prefix and micro >= plan.micro_batch):
                continue
            changed = {"workers": workers, "accumulation": accumulation, "micro_batch": micro}
            yield f"{prefix}train.accumulation={accumulation}", plan.model_copy(update=changed)


def smaller_network(plan: Plan) -> str:
    """What to lower where not even one image at a time fits."""
    config = plan.config
    lower = [
        f"head.prototypes={max(1, config.head.prototypes // 4)}",
        f"augment.local_crops={config.augment.local_crops // 2}",
    ]
    if config.model.encoder == "dinov2":
        smaller = {"vitg": "vitl", "vitl": "vitb", "vitb": "vits"}.get(config.model.size)
        lower.insert(0, f"model.size={smaller}" if smaller else "a smaller model.width")
    if plan.device == "cuda" and plan.workers > 1 and config.train.strategy == "ddp":
        lower.insert(0, "train.strategy=fsdp")
    if plan.device == "cuda" and not config.train.activation_checkpointing:
        lower.insert(0, "train.activation_checkpointing=true")
    return f"not even one image at a time fits; take {', '.join(lower)}"


def one(machine: Machine) -> bool:
    """Whether the plan is for one machine, with the driver on it."""
    return len(machine.rooms) == 1 and machine.rooms[0].driver


def say_disk(needs: Sequence[tuple[str, str, float]]) -> None:
    """Says what is written to each disk, and warns where there is less room.

    Args:
        needs: (field, place, bytes); places of one disk are added up. URIs are left to their
            owners.
    """
    disks: dict[int, list[tuple[str, Path, float]]] = {}
    for field, place, size in needs:
        if (local := nearest(place)) is not None:
            disks.setdefault(local.stat().st_dev, []).append((field, local, size))
    for parts in disks.values():
        size = sum(part for _, _, part in parts)
        free = shutil.disk_usage(parts[0][1]).free
        fields = " and ".join(dict.fromkeys(field for field, _, _ in parts))
        text = f"about {size / GIB:.2f} GiB in {parts[0][1]} ({fields}), {free / GIB:.1f} GiB free"
        log.info("disk        %s", text)
        if size > free:
            log.warning(
                "the disk of %s has not enough room, %.2f GiB are missing: set %s to another one, "
                "or make room",
                parts[0][1],
                (size - free) / GIB,
                fields,
            )


def say_time(plan: Plan, cost: Cost, machine: Machine) -> None:
    """Says how long training takes, and warns where that is more than a day."""
    if machine.elsewhere:
        log.info("time        not known: %s is not here, and was not timed", machine.elsewhere)
        return
    seconds = seconds_of(plan, cost)
    if not seconds:
        log.info("time        not known: this machine has no GPU whose speed is known")
        return
    place = "this machine" if one(machine) else "this cluster"
    log.info(
        "time        about %s of training on %s, with %s (%.1f GFLOP an image)",
        in_words(seconds),
        place,
        count(plan.workers, f"{plan.device} worker"),
        cost.flops_per_image / 1e9,
    )
    if seconds > LONG_S:
        steps = max(1, int(plan.steps * LONG_S / seconds))
        field = "optim.passes" if plan.config.optim.steps is None else "optim.steps"
        value = f"{steps / plan.steps_per_pass:.3g}" if field == "optim.passes" else f"{steps}"
        gpus = "" if plan.device == "cuda" else ", a GPU or more machines do it faster"
        log.warning(
            "training would take about %s: %s=%s is a day of it, model.size or "
            "augment.global_size make each step shorter%s",
            in_words(seconds),
            field,
            value,
            gpus,
        )
