"""What each training worker runs: restore, then the loop, then the last checkpoint.

Rank 0 also writes metrics, pictures and checkpoints and asks for evaluations; nothing of that
waits for another machine except the checkpoint's own write.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline import log as logs
from pipeline.control import RemoteLines
from pipeline.data.batch import Batch, Views
from pipeline.data.stream import batches
from pipeline.files import write_json
from pipeline.model.groups import parameter_groups
from pipeline.model.pair import Pair
from pipeline.plan import Plan
from pipeline.train import build, cost, state
from pipeline.train.clock import Clock
from pipeline.train.evaluations import Evaluations
from pipeline.train.step import NonFinite, Objective, train_step

log = logging.getLogger("pipeline.train")


@dataclass
class Trainee:
    """Everything that a checkpoint holds, on its device."""

    pair: Pair
    objective: Objective
    optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Any]:
        """Nested dicts of tensors and numbers, for `torch.save`."""
        return {
            "student": self.pair.student.state_dict(),
            "teacher": self.pair.teacher.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, found: dict[str, Any]) -> None:
        """Puts a checkpoint's tensors in place."""
        self.pair.student.load_state_dict(found["student"])
        self.pair.teacher.load_state_dict(found["teacher"])
        self.objective.load_state_dict(found["objective"])
        self.optimizer.load_state_dict(found["optimizer"])


def train_worker(job: dict[str, Any]) -> None:
    """One worker of the group. `job` comes from `train.run`; see there."""
    plan = Plan.model_validate_json(job["plan"])
    rank, workers = ray.train.get_context().get_world_rank(), plan.workers
    logs.configure(
        f"[w{rank}]" if rank else "",
        logging.WARNING if rank else logging.INFO,
        RemoteLines(job["feeder"]),
    )
    torch.set_num_threads(plan.threads)
    device = ray.train.torch.get_device()
    folder = Path(job["folder"])

    trainee = _trainee(plan, device)
    saved = state.latest(folder / "checkpoints")
    first_step = 0
    if saved:
        trainee.restore(saved.load())
        first_step = saved.step
    student = _parallel(trainee.pair.student, device, workers)
    photometric = build.photometric_spec(plan.config)
    dtype = torch.bfloat16 if plan.precision == "bfloat16" else None
    attempt = _shared_token()
    stream = batches(
        job["feeder"],
        attempt,
        rank,
        workers,
        first_step,
        plan.steps,
        plan.micro_batch,
        plan.chunk_images,
    )
    clock = _clock(plan, trainee.pair, first_step, device, dtype)
    chief = Chief(plan, trainee, job, folder, first_step) if rank == 0 else None
    kept: list[dict[str, Tensor]] = []
    bad = 0

    outcome: dict[str, Any] = {"status": "finished"}
    step = first_step
    if chief:
        chief.evaluate(first_step, restarted=saved is not None)
    while step < plan.steps:
        with clock.waiting():
            held = [next(stream) for _ in range(plan.config.train.accumulation)]
        if chief and step == 0:
            chief.picture_crops(held[0])
        bad += sum(len(batch.bad) for batch in held)
        try:
            result = train_step(
                student,
                trainee.pair,
                [_views(batch, photometric, device) for batch in held],
                trainee.optimizer,
                plan.at(step),
                trainee.objective,
                autocast_dtype=dtype,
                generator=_generator(plan.config.run.seed, step, rank, device),
                stop=chief is not None and chief.asked_to_stop(),
            )
        except NonFinite as error:
            outcome = {"status": "non_finite", "step": step, "detail": error.what}
            break
        clock.tick()
        step += 1
        kept.append(result.scalars)
        last = result.stop or step == plan.steps
        save_due = last or step % plan.save_every == 0
        if save_due or step % plan.config.train.log_every == 0:
            bad = _sum(bad, device, workers)
            if chief:
                chief.log(step, _rows(kept), clock, bad)
            kept, bad = [], 0
        if chief and save_due:
            chief.save(step)
        if chief and not result.stop and (last or step % plan.eval_every == 0):
            chief.evaluate(step)
        if result.stop and step < plan.steps:
            outcome = {"status": "stopped", "step": step}
            break
    if chief:
        chief.finish(outcome, clock)


class Chief:
    """Rank 0's other duties: step lines, journal, checkpoints, evaluations, pictures."""

    def __init__(
        self, plan: Plan, trainee: Trainee, job: dict[str, Any], folder: Path, first_step: int
    ) -> None:
        from pipeline.track.tracker import tracker_from

        self.plan, self.trainee, self.folder = plan, trainee, folder
        self.tracker = tracker_from(job["track"])
        self.tracker.resume(first_step)
        self.evaluations = Evaluations(plan, job["evaluator"], self.tracker, folder)
        self.stop_signal = job["feeder"].wait_stop.remote()
        self.bad_images = 0
        if first_step:
            log.info("resumed     from the checkpoint at step %d", first_step)

    def asked_to_stop(self) -> bool:
        """Whether the driver wants a checkpoint and the end (SIGTERM, `ray job stop`)."""
        ready, _ = ray.wait([self.stop_signal], timeout=0)
        return bool(ready)

    def log(
        self,
        step: int,
        rows: list[dict[str, float]],
        clock: Clock,
        bad: int,
    ) -> None:
        """Journals every step since the last call; MLflow and the step line get the newest."""
        plan = self.plan
        self.bad_images += bad
        first = step - len(rows)
        for offset, row in enumerate(rows[:-1]):
            self.tracker.metrics(first + offset, row | _scheduled(plan, first + offset), send=False)
        seen = step * plan.config.optim.global_batch_size
        timing = clock.read()
        newest = rows[-1] | _scheduled(plan, step - 1) | timing
        newest |= {
            "data/images_seen": seen,
            "data/pass": step / plan.steps_per_pass,
            "data/bad_images": self.bad_images,
            "perf/memory_gib": _resident_bytes() / 2**30,
        }
        if torch.cuda.is_available():
            newest["perf/gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.tracker.metrics(step - 1, newest)
        self.tracker.headline(step - 1, {"loss/total": newest["loss/total"]})
        self.evaluations.note_step(newest)
        if step % plan.config.train.log_every == 0 or step == plan.steps:
            width = len(str(plan.steps))
            log.info(
                "step %s/%d %5.1f%% | loss %.3f | %s img/s | wait %.0f%% | eta %s",
                str(step).zfill(width),
                plan.steps,
                100 * step / plan.steps,
                newest["loss/total"],
                f"{timing['perf/images_per_s']:,.0f}",
                100 * timing["perf/data_wait_fraction"],
                clock.eta(),
            )
        self._check_bad(seen)
        self.evaluations.collect()

    def _check_bad(self, seen: int) -> None:
        limit = self.plan.config.data.max_bad_fraction
        if self.bad_images > max(limit * seen, limit * self.plan.images):
            log.warning(
                "%d of %d images could not be decoded, more than data.max_bad_fraction=%s; "
                "stopping at the next step",
                self.bad_images,
                seen,
                limit,
            )
            self.stop_signal = ray.put(True)

    def save(self, step: int) -> None:
        """A checkpoint; where it cannot be written, training goes on and says so."""
        plan = self.plan
        in_pass = step % plan.steps_per_pass
        meta = {
            "config": plan.config.model_dump(mode="json"),
            "digest": plan.digest,
            "images": plan.images,
            "steps": plan.steps,
            "pass": step // plan.steps_per_pass,
            "images_used_in_pass": in_pass * plan.config.optim.global_batch_size,
            "mlflow_run": self.tracker.run_id,
        }
        try:
            state.save(self.folder / "checkpoints", step, self.trainee.state(), meta)
        except OSError as error:
            log.error("checkpoint of step %d could not be written (%s); going on", step, error)
            return
        protected = self.evaluations.pending_steps()
        state.prune(self.folder / "checkpoints", plan.config.train.keep_last, protected)

    def evaluate(self, step: int, restarted: bool = False) -> None:
        """Asks for an evaluation of the teacher as it is now; the answer is collected later."""
        if not restarted:
            self.evaluations.request(step, self.trainee.pair.teacher.backbone)

    def picture_crops(self, batch: Batch) -> None:
        """The first images as the student sees them, with masks, before step 0."""
        from pipeline.evaluate.pictures import crops_sheet

        self.tracker.picture(
            "crops",
            0,
            crops_sheet(batch, build.photometric_spec(self.plan.config), self.plan.grid),
        )

    def finish(self, outcome: dict[str, Any], clock: Clock) -> None:
        """Waits for the evaluations under way and leaves the outcome for the driver."""
        # Who stops a run is about to take the machine away: the checkpoint is safe, go.
        self.evaluations.collect(wait=outcome["status"] == "finished")
        outcome |= clock.summary() | {"best": self.evaluations.best, "bad_images": self.bad_images}
        outcome |= {"peak_memory_gib": _peak_bytes() / 2**30, "alarm": self.evaluations.alarm_text}
        state.prune(self.folder / "checkpoints", self.plan.config.train.keep_last, set())
        write_json(self.folder / "pretrain" / "outcome.json", outcome)
        self.tracker.close()


def _trainee(plan: Plan, device: torch.device) -> Trainee:
    pair = build.pair(plan.config)
    pair.student.to(device)
    pair.teacher.to(device)
    if plan.compile:
        build.compile_blocks(pair)
    optim = plan.config.optim
    groups = parameter_groups(pair.student, optim.layerwise_decay, optim.patch_embed_lr)
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=optim.betas, fused=device.type == "cuda" or None
    )
    return Trainee(pair, build.objective(plan.config, pair), optimizer)


def _parallel(student: torch.nn.Module, device: torch.device, workers: int) -> torch.nn.Module:
    if workers == 1:
        return student
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(student, device_ids=ids, gradient_as_bucket_view=True)


def _views(batch: Batch, spec: Any, device: torch.device) -> Views:
    if batch.images == 0:
        raise RuntimeError("all images of a batch are bad; pack the shards again and see its table")
    return batch.to(device).views(spec)


def _generator(seed: int, step: int, rank: int, device: torch.device) -> torch.Generator:
    # Philox/mt19937 seeds are well mixed from any integer; three odd multipliers keep keys apart
    key = (
        seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB
    ) % 2**63
    return torch.Generator(device=device).manual_seed(key)


def _shared_token() -> str:
    token = [os.urandom(8).hex()]
    if dist.is_initialized():
        dist.broadcast_object_list(token, src=0)
    return token[0]


def _clock(
    plan: Plan, pair: Pair, first_step: int, device: torch.device, dtype: torch.dtype | None
) -> Clock:
    peak = cost.peak_flops(device.type, dtype or torch.float32, plan.threads)
    return Clock(
        first_step,
        plan.steps,
        plan.config.optim.global_batch_size,
        build.estimated_cost(plan, pair).flops_per_image,
        peak * plan.workers,
    )


def _scheduled(plan: Plan, step: int) -> dict[str, float]:
    values = plan.at(step)
    return {
        "optim/lr": values.lr,
        "optim/weight_decay": values.weight_decay,
        "optim/teacher_momentum": values.teacher_momentum,
        "optim/teacher_temperature": values.teacher_temperature,
    }


def _rows(kept: list[dict[str, Tensor]]) -> list[dict[str, float]]:
    """Steps' scalars with one copy to the host; the step has averaged them over the workers."""
    names = sorted(kept[0])
    table = torch.stack([torch.stack([row[name].float() for name in names]) for row in kept])
    return [dict(zip(names, row, strict=True)) for row in table.cpu().tolist()]


def _sum(number: int, device: torch.device, workers: int) -> int:
    if workers == 1:
        return number
    total = torch.tensor([number], device=device)
    dist.all_reduce(total)
    return int(total.item())


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
