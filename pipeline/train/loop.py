"""What each training worker runs: restore, then the loop, then the last checkpoint."""

from __future__ import annotations

import logging
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline import log as logs
from pipeline.driver.mailbox import MOVE, STOP, RemoteLines
from pipeline.heartbeat import WORKER_SILENCE_S, beating, doing, now
from pipeline.model.groups import parameter_groups
from pipeline.model.pair import Pair
from pipeline.plan.plan import Plan
from pipeline.stream.decoder import batches
from pipeline.stream.order import keyed
from pipeline.train import build, cost, start, state
from pipeline.train.clock import Clock
from pipeline.train.rank_zero import Chief
from pipeline.train.step import NonFinite, train_step
from pipeline.train.trainee import Trainee
from pipeline.uri import Place, is_uri, join
from pipeline.views.batch import Apply, BadImage, Batch, Views, Work
from pipeline.views.photometric import PhotometricSpec

log = logging.getLogger("pipeline.train")
HOLD_S = 120.0  # a group that wrote a checkpoint to move waits so long to be taken away


def train_worker(job: dict[str, Any]) -> None:
    """One worker of the group. `job` comes from `train.run`; see there."""
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    plan = Plan.model_validate_json(job["plan"]).for_workers(workers)
    logs.configure(
        f"[w{rank}]" if rank else "",
        logging.WARNING if rank else logging.INFO,
        RemoteLines(job["feeder"]),
    )
    with beating(WORKER_SILENCE_S) if rank == 0 else nullcontext(), doing("pretrain: starting"):
        _train(job, plan, rank, workers)


def _train(job: dict[str, Any], plan: Plan, rank: int, workers: int) -> None:
    torch.set_num_threads(plan.threads)
    device = ray.train.torch.get_device()
    folder = job["folder"] if is_uri(job["folder"]) else Path(job["folder"])
    seen = [not job["mark"] or Path(job["mark"]).exists()] * workers
    if dist.is_initialized():
        dist.all_gather_object(seen, seen[rank])
    if not all(seen):
        return  # the driver finds no outcome and says what to do

    saved, tensors = _restored(join(folder, "checkpoints"), rank)
    first_step = saved.step if saved else 0
    stream = batches(  # decoders start while the model is built
        job["feeder"],
        _from_rank_0(os.urandom(8).hex()),
        rank,
        workers,
        first_step,
        plan.steps,
        plan.micro_batch,
        plan.chunk_images,
        pin=device.type == "cuda",
        accumulation=plan.accumulation,
    )
    now("pretrain: building the networks")
    trainee = _trainee(plan, device, saved is not None)
    if tensors:
        trainee.restore(tensors)
        del tensors
    student = _parallel(trainee.pair.student, device, workers)
    photometric = build.photometric_spec(plan.config)
    colours = build.photometric_function(plan, device)
    dtype = torch.bfloat16 if plan.precision == "bfloat16" else None
    now("pretrain: measuring this device")
    clock = _clock(plan, trainee.pair, first_step, device, dtype)
    chief = Chief(plan, trainee, job, folder, saved.meta if saved else None) if rank == 0 else None
    kept: list[dict[str, Tensor]] = []
    bad: list[BadImage] = []
    work = Work()

    outcome: dict[str, Any] = {"status": "finished"}
    step = first_step
    if chief and chief.evaluation_due(first_step):
        chief.evaluate(first_step)  # after a resume too: what was under way died with the workers
    while step < plan.steps:
        now(f"pretrain: waiting for the images of step {step}")
        with clock.waiting():
            held = [next(stream) for _ in range(plan.accumulation)]
        if chief and step == 0:
            chief.picture_crops(held[0])
        for batch in held:
            bad += batch.bad
            work = work.plus(batch.work)
        compiling = ", which compiles the networks" if plan.compile and step == first_step else ""
        now(f"pretrain: step {step}{compiling}")
        try:
            result = train_step(
                student,
                trainee.pair,
                [_views(batch, photometric, device, colours) for batch in held],
                trainee.optimizer,
                plan.at(step),
                trainee.objective,
                autocast_dtype=dtype,
                generator=_generators(plan, step, rank),
                stop=chief is not None and bool(chief.wish()),
            )
        except NonFinite as error:
            outcome = {"status": "non_finite", "step": step, "detail": error.what}
            bad, work = _gathered(bad, work, device, workers)
            if chief:
                chief.non_finite(step, _rows(kept), clock, bad, work)
            break
        clock.tick()
        step += 1
        kept.append(result.scalars)
        last = step == plan.steps
        evaluate_due = last or step % plan.eval_every == 0
        # every evaluated teacher has a checkpoint, so that any of them can be the best
        save_due = evaluate_due or result.stop or step % plan.save_every == 0
        if save_due or step % plan.config.train.log_every == 0:
            bad, work = _gathered(bad, work, device, workers)
            if chief:
                chief.log(step, _rows(kept), clock, bad, work)
            kept, bad, work = [], [], Work()
        now(f"pretrain: after step {step}")
        if chief and save_due:
            chief.save(step)
        if chief and evaluate_due:
            chief.evaluate(step)
        if result.stop and not last:
            wish = _from_rank_0(chief.settled(step) if chief else "")
            if wish == STOP:
                outcome = {"status": "stopped", "step": step}
                break
            if wish == MOVE:
                time.sleep(HOLD_S)  # the group is taken away meanwhile; if not, it goes on
    if chief:
        now("pretrain: the last evaluation and checkpoint")
        chief.finish(outcome, clock)


def _restored(checkpoints: Place, rank: int) -> tuple[state.Saved | None, dict[str, Any]]:
    """What rank 0 finds, on all ranks: storage may show them different checkpoints as the newest,
    and a damaged one to some.
    """
    saved, tensors = state.restored(checkpoints) if rank == 0 else (None, {})
    step = int(_from_rank_0(str(saved.step if saved else -1)))
    return (saved, tensors) if rank == 0 or step < 0 else state.restored_at(checkpoints, step)


def _trainee(plan: Plan, device: torch.device, resumed: bool) -> Trainee:
    # a resumed run no longer needs the weights it started from
    built = build.pair(plan.config) if resumed else start.starting_pair(plan)[0]
    pair = start.with_frozen_teacher(built, plan).to(device)
    if plan.compile:
        build.compile_blocks(pair)
    optim = plan.config.optim
    groups = parameter_groups(pair.student, optim.layerwise_decay, optim.patch_embed_lr)
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=optim.betas, fused=device.type == "cuda" or None
    )
    objective = build.objective(plan.config, pair)
    if not resumed:
        start.carry_centres(objective, pair, plan)
    return Trainee(pair, objective, optimizer)


def _parallel(student: torch.nn.Module, device: torch.device, workers: int) -> torch.nn.Module:
    if workers == 1:
        return student
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(student, device_ids=ids, gradient_as_bucket_view=True)


def _views(batch: Batch, spec: PhotometricSpec, device: torch.device, colours: Apply) -> Views:
    return batch.to(device).views(spec, photometric=colours)


def _generators(plan: Plan, step: int, rank: int) -> list[torch.Generator]:
    """For each micro batch of this worker its draws of stochastic depth, which depend neither on
    the device nor on the number of workers.
    """
    keys = (rank + i * plan.workers for i in range(plan.accumulation))
    seed = plan.config.run.seed
    draws = (keyed(seed, step, key, "drop_path").integers(2**63) for key in keys)
    return [torch.Generator().manual_seed(int(draw)) for draw in draws]


def _from_rank_0(word: str) -> str:
    words = [word]
    if dist.is_initialized():
        dist.broadcast_object_list(words, src=0)
    return words[0]


def _clock(
    plan: Plan, pair: Pair, first_step: int, device: torch.device, dtype: torch.dtype | None
) -> Clock:
    peak = cost.peak_flops(device.type, dtype or torch.float32, plan.threads)
    return Clock(
        first_step,
        plan.steps,
        plan.config.optim.global_batch_size,
        build.flops_per_image(plan, pair),
        peak * plan.workers,
    )


def _rows(kept: list[dict[str, Tensor]]) -> list[dict[str, float]]:
    """Steps' scalars with one copy to the host; the step has averaged them over the workers."""
    if not kept:
        return []
    names = sorted(kept[0])
    table = torch.stack([torch.stack([row[name].float() for name in names]) for row in kept])
    return [dict(zip(names, row, strict=True)) for row in table.cpu().tolist()]


def _gathered(
    bad: list[BadImage], work: Work, device: torch.device, workers: int
) -> tuple[list[BadImage], Work]:
    """The bad images of all workers (there are none nearly always) and the sum of their work."""
    if workers == 1:
        return bad, work
    total = torch.tensor([len(bad), *work], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    found, images, *seconds = total.tolist()
    work = Work(int(images), *seconds)
    if not found:
        return [], work
    parts: list[Any] = [None] * workers
    dist.all_gather_object(parts, bad)
    return [row for part in parts for row in part], work
