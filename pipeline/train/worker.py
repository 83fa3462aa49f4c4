"""A training worker with all that its steps need: what happens once, before the loop.

The order saves time where it can: decoders start as soon as the first step is known, and read while
the networks are built.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.driver.compiler import uncompilable
from pipeline.evaluate.teacher import EvaluatedOn
from pipeline.heartbeat import now
from pipeline.model.low_rank import merged_state
from pipeline.plan.plan import Plan
from pipeline.stream.order import keyed
from pipeline.stream.worker import StreamRequest, batches
from pipeline.train import build, estimate, start
from pipeline.train.ahead import Ahead, Between, StepImages, images_of
from pipeline.train.build import view_maker
from pipeline.train.checkpoint import restore, saving
from pipeline.train.distil.source import Source
from pipeline.train.other_rank import OtherRank
from pipeline.train.parallel.strategy import student_forward, whole_weights
from pipeline.train.rank_zero import RankZero
from pipeline.train.speed.bottleneck import Clock
from pipeline.train.speed.peaks import peak_flops
from pipeline.train.speed.planned import MemoryWatch
from pipeline.train.speed.profile import Profile
from pipeline.train.start import TrainState
from pipeline.train.step import StepResult, train_step
from pipeline.uri import Place, is_uri, join

log = logging.getLogger("pipeline.train")


class Job(TypedDict):
    """What the driver gives every worker of a run."""

    plan: str  # JSON of the `Plan`, which says nothing of the size of this group
    folder: str  # of the run, a path or a URI
    mark: str  # a file in it that the driver has made; "" at a URI
    feeder: Any  # actor handle of the `Feeder`, which is the mailbox as well
    evaluator: Any  # actor handle of the `EvaluatorActor`
    evaluated_on: EvaluatedOn
    guard_key: str  # `EvaluationSpec.guard_key`: the same of what a guard compares
    track: Any  # settings from which rank 0 makes its tracker
    teacher: Source | None  # of a network whose features are learnt


@dataclass
class Worker:
    """One worker of the group between two steps."""

    plan: Plan
    rank: int
    device: torch.device
    first_step: int  # the one that this group starts or goes on with
    resumed: bool  # from a checkpoint
    images: Between | Ahead  # of the steps that are left
    state: TrainState
    student: torch.nn.Module  # that of `state`, as the workers of the group call it
    autocast_dtype: torch.dtype | None
    clock: Clock
    profile: Profile
    memory: MemoryWatch
    rank_zero: OtherRank  # a `RankZero` on rank 0 alone

    @classmethod
    def start(cls, job: Job, plan: Plan, rank: int) -> Worker | None:
        """Restores the newest checkpoint, or builds what step 0 starts from.

        None where a worker does not see what the driver wrote into the run folder: the driver then
        gets no outcome and says what to do.
        """
        torch.set_num_threads(plan.threads)
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32: torch has it on for cuDNN
        device = ray.train.torch.get_device()
        if not _all_see(job["mark"], plan.workers, rank):
            return None
        folder: Place = job["folder"] if is_uri(job["folder"]) else Path(job["folder"])
        layout = build.layout(plan, device)
        source = restore.newest(join(folder, "checkpoints"), layout.sharded)
        first_step = source.step if source else 0
        # another id for each group: what the feeder has for an earlier one is void
        group_id = restore.from_rank_0(os.urandom(8).hex())
        stream = batches(
            StreamRequest(job["feeder"], group_id, rank, plan.workers, first_step, plan.steps),
            micro_batch=plan.micro_batch,
            chunk=plan.chunk_images,
            accumulation=plan.accumulation,
            pin=device.type == "cuda",
        )
        now("pretrain: building the networks")
        memory = MemoryWatch(device)
        pair = start.networks(plan, source is not None, job["teacher"])
        flops = estimate.flops_per_image(plan, pair)  # while they are whole
        # On a CPU a trace lies in the memory that is compared with the plan.
        if rank == 0 and (device.type == "cuda" or not plan.config.train.profile_steps):
            cost = estimate.estimated_cost(plan, pair)
            lighter = estimate.lighter(plan)
            memory.plan(cost.memory, cost.checkpoint_bytes, plan.gpus_per_worker, lighter)
        train_state = start.train_state(plan, pair, layout, resumed=source is not None)
        if source:
            source.into(train_state, device)
        student = student_forward(pair, layout)
        now("pretrain: measuring this device")
        clock = Clock(
            first_step,
            plan.steps,
            plan.config.optim.global_batch_size,
            flops,
            _peak_flops(plan, device),
            estimate.tokens_per_image(plan, pair),
        )
        meta = source.saved.meta if source else None
        writers = saving.writers(layout.sharded)
        checkpoints = saving.Saving(join(folder, "checkpoints"), writers)
        return cls(
            plan=plan,
            rank=rank,
            device=device,
            first_step=first_step,
            resumed=source is not None,
            images=images_of(stream, plan.accumulation, view_maker(plan, train_state.pair, device)),
            state=train_state,
            student=student,
            autocast_dtype=layout.precision,
            clock=clock,
            memory=memory,
            profile=Profile(
                plan.config.train.profile_steps if rank == 0 else None,
                first_step,
                join(folder, "pretrain", "profile"),
            ),
            rank_zero=RankZero(plan, train_state, job, folder, meta, checkpoints)
            if rank == 0
            else OtherRank(train_state, checkpoints if writers else None),
        )

    def step(self, step: int, images: StepImages, stop: bool) -> StepResult:
        """One update from these images; raises what `train_step` raises."""
        return train_step(
            self.student,
            self.state.pair,
            images.views(),
            self.state.optimizer,
            self.plan.at(step),
            self.state.objective,
            autocast_dtype=self.autocast_dtype,
            generator=_generators(self.plan, step, self.rank),
            stop=stop,
        )

    def teacher(self) -> dict[str, Tensor]:
        """The weights of the teacher's backbone as they are now, a copy on the CPU: for rank 0, {}
        for the others. All ranks must ask together, for each may hold a part of them.
        """
        return merged_state(whole_weights(self.state.pair.teacher.backbone, keep=self.rank == 0))

    def agreed(self, request: str) -> str:
        """What rank 0 says, on all ranks alike."""
        return restore.from_rank_0(request)


def _peak_flops(plan: Plan, device: torch.device) -> float:
    """Of all training devices together; said where it is not known."""
    dtype = torch.bfloat16 if plan.precision == "bfloat16" else torch.float32
    peak = peak_flops(device.type, dtype, plan.threads)
    if not peak:
        name = torch.cuda.get_device_name()
        log.info("device      %s: its peak is not known here, so there is no perf/mfu", name)
    sharing = int(1 / plan.gpus_per_worker) if device.type == "cuda" else 1  # workers on a device
    return peak * plan.workers / sharing


def uncompilable_somewhere(plan: Plan) -> str:
    """What keeps a worker from compiling for its GPU, the same on all ranks; empty: nothing."""
    kernels = plan.config.train.loss_kernels != "eager"
    if plan.device != "cuda" or not (plan.compile or kernels):
        return ""
    reasons = [uncompilable()] * plan.workers
    if dist.is_initialized():
        dist.all_gather_object(reasons, reasons[0])
    return next(filter(None, reasons), "")


def _all_see(mark: str, workers: int, rank: int) -> bool:
    seen = [not mark or Path(mark).exists()] * workers
    if dist.is_initialized():
        dist.all_gather_object(seen, seen[rank])
    return all(seen)


def _generators(plan: Plan, step: int, rank: int) -> list[torch.Generator]:
    """For each micro batch of this worker its draws of stochastic depth, which depend neither on
    the device nor on the number of workers.
    """
    keys = (rank + i * plan.workers for i in range(plan.accumulation))
    seed = plan.config.run.seed
    draws = (keyed(seed, step, key, "drop_path").integers(2**63) for key in keys)
    return [torch.Generator().manual_seed(int(draw)) for draw in draws]
