"""One worker of a fine-tuning on Ray Train: builds the classifier, trains it, scores its part.

Checkpoints are those of `train.checkpoint`, in `finetune/checkpoints` of the run folder. They hold
what learns and the optimiser; all else is a function of the settings and the step.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline import log as logs
from pipeline.driver.mailbox import STOP, RemoteLines, Reports
from pipeline.errors import TrainError
from pipeline.finetune.classifier import classifier_of
from pipeline.finetune.images import LabelledImages, Worker
from pipeline.finetune.loop import Trainee, answers, fit
from pipeline.finetune.rows import Split
from pipeline.finetune.settings import Settings
from pipeline.heartbeat import PROGRESS, WORKER_SILENCE_S, beating, doing, now
from pipeline.shards.shard_set import ShardSet
from pipeline.train.checkpoint import restore, state
from pipeline.train.speed.bottleneck import duration
from pipeline.uri import Place

log = logging.getLogger("pipeline.finetune")
SCORED_AT_ONCE = 128  # images


@dataclass(frozen=True)
class Task:
    """What every worker is given.

    Attributes:
        settings: of the fine-tuning.
        load: gives the backbone.
        images: the set that is trained on.
        split: rows of it, and of the queries.
        max_pixels: larger images are refused.
        max_bad_fraction: with more images that cannot be decoded, training ends.
        log_every: steps between step lines.
    """

    settings: Settings
    load: Callable[[], Any]
    images: ShardSet
    split: Split
    max_pixels: int
    max_bad_fraction: float
    log_every: int

    def training_images(self, worker: Worker) -> LabelledImages:
        """What a worker learns from."""
        split, settings = self.split, self.settings
        return LabelledImages(self.images, split.training, settings, worker, self.max_pixels)

    def queries(self, worker: Worker) -> LabelledImages:
        """A worker's part of what is scored."""
        rows = self.split.queries.part(worker.rank, worker.count)
        queries_of = self.split.queries_of
        return LabelledImages(queries_of, rows, self.settings, worker, self.max_pixels)


def finetune_worker(job: dict[str, Any]) -> dict[str, Any] | None:
    """One worker from its start to its end. Rank 0 gives the outcome, which Ray Train hands to the
    driver: `status`, `step`, and when it is finished the `ids` of the queries with their `hits`.

    Args:
        job: `task`, `mailbox` (actor handle), `checkpoints` (a place), `threads`.
    """
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    rank, count = context.get_world_rank(), context.get_world_size()
    logs.configure(
        f"[w{rank}]" if rank else "",
        logging.WARNING if rank else logging.INFO,
        RemoteLines(job["mailbox"]),
    )
    torch.set_num_threads(job["threads"])
    worker = Worker(rank, count, max(1, job["threads"]))
    silence = beating(WORKER_SILENCE_S) if rank == 0 else nullcontext()
    with silence, doing("finetune: starting"):
        return _finetune(job, job["task"], worker, ray.train.torch.get_device())


def _finetune(
    job: dict[str, Any], task: Task, worker: Worker, device: torch.device
) -> dict[str, Any] | None:
    now("finetune: building the network")
    settings, split = task.settings, task.split
    classifier = classifier_of(task.load(), len(split.class_names), settings).to(device)
    trainee = Trainee(classifier, settings, worker.rank)
    first = restored(trainee, job["checkpoints"])
    images = task.training_images(worker)
    watch = Watch(job, task, trainee, images, first)
    try:
        done = fit(trainee, images, first, watch)
    except TrainError as error:  # all workers meet it alike, and would again after a restart
        return {"status": "refused", "what": error.what, "hint": error.hint}
    if done < settings.steps:
        outcome: dict[str, Any] = {"status": "stopped", "step": done}
    else:
        now("finetune: scoring")
        asked = task.queries(worker)
        rows, classes = answers(classifier, asked.centre_crops(SCORED_AT_ONCE), settings)
        ids, hits = asked.rows.ids[rows], classes == asked.rows.labels[rows]
        parts = gathered((ids, hits, asked.bad))
        outcome = {
            "status": "finished",
            "step": done,
            "ids": np.concatenate([ids for ids, _, _ in parts]),
            "hits": np.concatenate([hits for _, hits, _ in parts]),
            "bad_queries": {k: v for _, _, bad in parts for k, v in bad.items()},
        }
    watch.reports.wait(30.0)
    return outcome | watch.facts() if worker.rank == 0 else None


class Watch:
    """What is done beside the steps (`loop.Watch`); on every rank but 0 mostly nothing."""

    def __init__(
        self,
        job: dict[str, Any],
        task: Task,
        trainee: Trainee,
        images: LabelledImages,
        first: int,
    ) -> None:
        self.task, self.trainee, self.images, self.first = task, trainee, images, first
        self.mailbox, self.checkpoints = job["mailbox"], job["checkpoints"]
        self.reports = Reports(self.mailbox)
        self.rank_zero = trainee.rank == 0
        self.requested = self.mailbox.wait_request.remote() if self.rank_zero else None
        self.bad: dict[str, tuple[str, str]] = {}
        self.times: deque[float] = deque([time.monotonic()], 50)
        self.last_scalars: dict[str, float] = {}
        if self.rank_zero:
            self.reports.send("resume", first)
            if first:
                log.info("resumed     from the checkpoint at step %d", first)

    def stop(self) -> bool:
        """Whether somebody asked this run to end."""
        import ray

        if not self.rank_zero or not ray.wait([self.requested], timeout=0)[0]:
            return False
        if ray.get(self.requested) == STOP:
            return True
        self.requested = self.mailbox.wait_request.remote()
        return False

    def step(self, done: int, scalars: dict[str, float]) -> None:
        """Metrics of every step; a line now and then."""
        self.times.append(time.monotonic())
        self.last_scalars = scalars
        if not self.rank_zero:
            return
        now(f"finetune: step {done} of {self.task.settings.steps}")
        settings = self.task.settings
        due = done % self.task.log_every == 0 or done == settings.steps
        step_s = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
        per_s = min(settings.batch_size, len(self.task.split.training)) / max(1e-9, step_s)
        timing = {"perf/images_per_s": per_s, "data/bad_images": len(self.bad)}
        self.reports.send("metrics", done - 1, scalars | timing, send=due)
        if due:
            log.log(
                PROGRESS,
                "step %s/%d %5.1f%% | loss %.3f | right %.1f%% | %s img/s%s | eta %s",
                str(done).zfill(len(str(settings.steps))),
                settings.steps,
                100 * done / settings.steps,
                scalars["loss/finetune"],
                100 * scalars["finetune/train_top1"],
                f"{per_s:,.0f}",
                f" | {len(self.bad)} bad" if self.bad else "",
                duration(step_s * (settings.steps - done)),
            )

    def save(self, done: int) -> None:
        """A checkpoint; before it, the bad images of all workers are brought together.

        Raises:
            TrainError: there are too many of them.
        """
        for part in gathered(self.images.bad):
            self.bad |= part
        images, allowed = len(self.task.split.training), self.task.max_bad_fraction
        if len(self.bad) > allowed * images:
            raise TrainError(
                f"{len(self.bad):,} of {images:,} images could not be decoded, more than "
                f"data.max_bad_fraction={allowed:g}",
                "pack the images again, which says why, or raise data.max_bad_fraction",
            )
        if not self.rank_zero:
            return
        meta = {"settings": asdict(self.task.settings), "bad": self.bad}
        try:
            state.save(self.checkpoints, done, self.trainee.state(), meta)
            state.prune(self.checkpoints, 1, set())
        except OSError as error:
            if done == self.task.settings.steps:
                raise
            log.error("checkpoint of step %d could not be written (%s); going on", done, error)
            return
        self.mailbox.note_saved.remote(done)

    def facts(self) -> dict[str, Any]:
        """What else the driver is told."""
        return {"bad": self.bad, "scalars": self.last_scalars, "first": self.first}


def restored(trainee: Trainee, checkpoints: Place) -> int:
    """Takes the newest checkpoint, the same on all workers; gives its step, 0 without one."""
    source = restore.newest(checkpoints)
    if source is None:
        return 0
    source.into(trainee, trainee.device)
    return source.step


def gathered(value: Any) -> list[Any]:
    """The values of all workers, on all of them."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
