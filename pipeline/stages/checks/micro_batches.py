"""Whether a step of an adaptation fits into memory, and into how many parts it is cut if not."""

from __future__ import annotations

from pipeline.adapt.recipe import Line, is_set
from pipeline.config.config import Config
from pipeline.context import memory_bytes
from pipeline.plan.plan import Plan
from pipeline.train import build, estimate

GPU_BYTES = 20 * 2**30  # that a step may take where nobody knows the GPU: one of 24 GB
GPU_ROOM = 0.85  # of a GPU's memory: gaps, and what other processes take
ROOM = 0.6  # of a machine's memory for the steps of all workers


def lighter(asked: Config, plan: Plan, gpu_bytes: float = 0.0) -> Line | None:
    """More and smaller micro batches where a step of a `located` plan would not fit into memory,
    `gpu_bytes` where the GPU is not here; None where it does.
    """
    if is_set(asked, "train.accumulation"):
        return None
    memory = estimate.estimated_cost(plan, build.for_estimate(plan)).memory
    room = _room(plan, gpu_bytes)
    if memory.of(plan.micro_batch, plan.accumulation).total <= room:
        return None
    pieces = [n for n in range(2, plan.micro_batch // 2 + 1) if plan.micro_batch % n == 0]
    for parts in pieces:
        micro, gib = plan.micro_batch // parts, 2**30
        need = memory.of(micro, plan.accumulation * parts).total
        if need <= room or parts == pieces[-1]:
            fewest = ", the fewest" if need > room else ""
            there = f"{need / gib:.1f} of the {room / gib:.1f} GiB that a worker may take"
            why = f"{micro} images at once{fewest}: about {there}"
            return Line("train.accumulation", plan.accumulation * parts, why, "weights")
    return None


def _room(plan: Plan, gpu_bytes: float) -> float:
    """Bytes that the steps of a worker may take."""
    if plan.device == "cuda":
        import torch

        if not gpu_bytes and not torch.cuda.is_available():
            return float(GPU_BYTES)
        size = gpu_bytes or torch.cuda.get_device_properties(0).total_memory
        return GPU_ROOM * size * plan.gpus_per_worker
    return ROOM * memory_bytes() / plan.workers
