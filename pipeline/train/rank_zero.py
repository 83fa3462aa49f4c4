"""What rank 0 does beside its steps: step lines, journal, checkpoints, evaluations, pictures.

Nothing of it waits for another machine or a disk: checkpoints are written by a thread
(`checkpoint/saving.py`), and only the next one, a move, a stop and the end wait for that.
Evaluations are waited for before a group moves and at the end of the run, both within a limit
(`evaluations.py`).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import ray
import torch
from torch import Tensor

from pipeline.driver.mailbox import MOVE, STOP, Reports
from pipeline.errors import one_line
from pipeline.heartbeat import PROGRESS, now
from pipeline.plan.plan import Plan
from pipeline.storage.places import retries
from pipeline.stream.bad_table import BadTable, reasons
from pipeline.train import build
from pipeline.train.checkpoint import state
from pipeline.train.checkpoint.saving import Saving
from pipeline.train.evaluations import Evaluations
from pipeline.train.guard.begin import guard_of
from pipeline.train.guard.end import guarded
from pipeline.train.guard.guard import Guard
from pipeline.train.other_rank import OtherRank
from pipeline.train.speed.bottleneck import BottleneckWatch, Clock, Window, ms, per_image
from pipeline.train.start import TrainState
from pipeline.uri import Place, is_uri, join
from pipeline.views.batch import Batch

log = logging.getLogger("pipeline.train")
COLLECT_S = 10.0  # for evaluations under way when a group moves: the notice may be short
AGAIN_S = 10.0  # between two tries of a checkpoint without which a group does not move


class RankZero(OtherRank):
    """Rank 0's other duties: step lines, journal, checkpoints, evaluations, pictures."""

    guard: Guard | None = None  # where the recipe has one

    def __init__(
        self,
        plan: Plan,
        train_state: TrainState,
        job: Mapping[str, Any],
        folder: Place,
        resumed: dict[str, Any] | None,
        saving: Saving,
    ) -> None:
        super().__init__(train_state, saving)
        self.plan, self.folder = plan, folder
        self.checkpoints = join(folder, "checkpoints")
        self.tracker = _tracker(job, folder)
        first_step = int(resumed["step"]) if resumed else 0
        self.tracker.resume(first_step)
        self.guard = guard_of(plan, self.checkpoints, job["guard_key"])
        self.evaluations = Evaluations(
            plan,
            job["evaluator"],
            self.tracker,
            folder,
            job["evaluated_on"],
            resumed.get("evaluations") if resumed else None,
            self.guard,
        )
        self.mailbox = job["feeder"]
        self.requested = self.mailbox.wait_request.remote()
        self.bad: Counter[str] = Counter(resumed.get("bad_images", {}) if resumed else {})
        self.bad_table = BadTable(join(folder, "pretrain", "bad_images.parquet"))
        self.too_many_bad = False
        self.unsaved, self.alarm_text = 0, ""  # checkpoints in a row that could not be written
        self.saved_step, self.tried = first_step, -AGAIN_S
        self.read_retries = float(resumed.get("read_retries", 0)) if resumed else 0.0
        self.watch = BottleneckWatch(plan.decode_tasks, plan.config.data.scaled_decode)
        if first_step:
            log.info("resumed     from the checkpoint at step %d", first_step)

    def request(self) -> str:
        """What is asked for the end of this step: `stop`, `move`, `save` (see `Mailbox`), or "".
        Asked before each step, so that the end of a checkpoint is taken up there as well.
        """
        self.settle()
        if self.too_many_bad or self._guarded:
            return STOP
        ready, _ = ray.wait([self.requested], timeout=0)
        if not ready:
            return ""
        request = str(ray.get(self.requested))
        soon = self.unsaved and time.monotonic() - self.tried < AGAIN_S
        if not request or (request != STOP and soon):
            self.requested = self.mailbox.wait_request.remote()
            return ""
        return request

    @property
    def _guarded(self) -> bool:
        """Whether the guard has ended the training."""
        return self.guard is not None and self.guard.ended is not None

    def confirmed(self, step: int) -> str:
        """What the group does now that a request has its checkpoint; "" if it was taken back,
        or if the checkpoint could not be written: a move would throw steps away.

        Before a move, results of evaluations that would be lost come first.
        """
        self.settle(wait=True)
        request = self.request()
        if request == STOP:
            return STOP
        if self.unsaved:
            self.requested = self.mailbox.wait_request.remote()
            return ""
        if request == MOVE:
            self.evaluations.wait(COLLECT_S)
            self.tracker.flush(COLLECT_S)
        current = ray.get(self.mailbox.acknowledge.remote(request, step))
        self.requested = self.mailbox.wait_request.remote()
        return request if current else ""

    def log(
        self,
        step: int,
        window: Window,
        clock: Clock,
    ) -> None:
        """Journals every step since the last call; MLflow and the step line get the newest."""
        plan = self.plan
        rows = window.rows()
        self._note(window)
        first = step - len(rows)
        for offset, row in enumerate(rows[:-1]):
            self.tracker.metrics(first + offset, row | _scheduled(plan, first + offset), send=False)
        seen = step * plan.config.optim.global_batch_size
        timing = clock.read()
        newest = rows[-1] | _scheduled(plan, step - 1) | timing
        # straight lines, which stay in the journal: no curve to look at
        progress = {"data/images_seen": seen, "data/pass": step / plan.steps_per_pass}
        self.tracker.metrics(step - 1, progress, send=False)
        newest |= {
            "data/bad_images": self.bad.total(),
            "data/storage_retries": retries(),  # of checkpoints and tables, in this process
            "data/read_retries": self.read_retries,
            **{f"data/bad_{reason}": count for reason, count in self.bad.items()},
            **per_image(window.spent),
            "health/nonfinite_steps": 0,
            "perf/memory_gib": _resident_bytes() / 2**30,
            "perf/workers": plan.workers,
        }
        if torch.cuda.is_available():
            newest["perf/gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.tracker.metrics(step - 1, newest)
        shown = ("loss/total", "health/teacher_entropy")
        self.tracker.headline(step - 1, {name: newest[name] for name in shown if name in newest})
        self.evaluations.note_step(newest)
        if step % plan.config.train.log_every == 0 or step == plan.steps:
            width = len(str(plan.steps))
            log.log(
                PROGRESS,
                "step %s/%d %5.1f%% | loss %.3f | %s img/s | wait %.0f%% | decode %s ms%s | eta %s",
                str(step).zfill(width),
                plan.steps,
                100 * step / plan.steps,
                newest["loss/total"],
                f"{timing['perf/images_per_s']:,.0f}",
                100 * timing["perf/data_wait_fraction"],
                ms(newest["perf/decode_ms"] + newest["perf/crop_ms"]),
                f" | {counts} bad" if (counts := reasons(self.bad)) else "",
                clock.eta(),
                extra={"left_s": clock.left_s()},
            )
        settled = clock.done - len(rows) >= clock.WARMUP_STEPS
        if settled and (sentence := self.watch.window(window.spent, timing)):
            log.warning("%s", sentence)
            self.tracker.tags({"data_limit": sentence})
        allowed = plan.config.data.max_bad_fraction * max(seen, plan.images)
        self.too_many_bad = self.bad.total() > allowed
        if not self.busy:  # a score may be that of the checkpoint which is being written
            self.evaluations.collect()

    def _note(self, window: Window) -> None:
        self.bad.update(reason for _, reason, _ in window.bad)
        self.bad_table.add(window.bad)
        self.read_retries += window.spent.retries

    def non_finite(
        self,
        step: int,
        window: Window,
        clock: Clock,
    ) -> None:
        """Journals the steps before the one that was not finite, and that one as such."""
        if window.scalars:
            self.log(step, window, clock)
        else:
            self._note(window)
        self.tracker.metrics(step, {"health/nonfinite_steps": 1})

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self.saving is not None and self.saving.busy

    def save(self, step: int) -> None:
        """Copies a checkpoint and begins to write it; waits for the one before."""
        self.settle(wait=True)
        plan = self.plan
        in_pass = step % plan.steps_per_pass
        meta = {
            "plan": plan.model_dump(mode="json"),
            "bad_images": dict(self.bad),
            "read_retries": self.read_retries,
            "evaluations": dict(self.evaluations.counts),
            "pass": step // plan.steps_per_pass,
            "images_used_in_pass": in_pass * plan.config.optim.global_batch_size,
            "mlflow_run": self.tracker.run_id,
        }
        pending = self.evaluations.pending_steps()
        assert self.saving is not None  # of rank 0
        self.saving.begin(step, self.train_state.state(), meta, lambda: self.prune(pending))

    def settle(self, wait: bool = False) -> None:
        """Says how the last checkpoint ended, if it has; or waits for that. Where it could not be
        written, training goes on.
        """
        written = self.saving.ended(wait) if self.saving is not None else None
        if written is None:
            return
        if written.error:
            self._unsaved(written.step, written.error)
            return
        self.saved_step = written.step
        self.mailbox.note_saved.remote(written.step)
        if self.unsaved:
            log.warning("checkpoint of step %d is written again", written.step)
            self.tracker.tags({"alarm": ""})
        self.unsaved, self.alarm_text = 0, ""
        self.tracker.metrics(max(0, written.step - 1), {"health/checkpoints_failed": 0})

    def _unsaved(self, step: int, why: str) -> None:
        """The alarm: a line, a tag, a metric. The checkpoints before it are as they were."""
        self.unsaved += 1
        self.tried = time.monotonic()
        self.alarm_text = (
            f"checkpoint of step {step} could not be written ({why}); going on, "
            f"{self.unsaved} in a row; a restart would begin at the last one before"
        )
        log.error("%s", self.alarm_text)
        self.tracker.metrics(max(0, step - 1), {"health/checkpoints_failed": self.unsaved})
        self.tracker.tags({"alarm": self.alarm_text})

    def prune(self, protected: set[int]) -> None:
        """Removes old checkpoints; where that fails, the next one tries again."""
        try:
            state.prune(self.checkpoints, self.plan.config.train.keep_last, protected)
        except OSError as error:
            log.error("old checkpoints could not be removed (%s); going on", one_line(error))

    def evaluate(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Asks for an evaluation of the teacher's backbone; the answer is collected later."""
        self.evaluations.request(step, weights)

    def picture_crops(self, batch: Batch) -> None:
        """The first images as the student sees them, with masks, before step 0."""
        from pipeline.evaluate.pictures import CAPTIONS, crops_sheet

        sheet = crops_sheet(batch, build.photometric_spec(self.plan.config), self.plan.grid)
        self.tracker.picture("crops", 0, sheet, CAPTIONS["crops"])

    def finish(self, outcome: dict[str, Any], clock: Clock) -> dict[str, Any]:
        """Waits for the evaluations under way and gives the outcome for the driver."""
        now("pretrain: the last checkpoint and evaluation")
        self.insist(outcome["status"])
        if outcome["status"] == "finished" or (outcome["status"] == "non_finite" and self.guard):
            self.evaluations.finish(lambda: not self.too_many_bad and self.request() == STOP)
        else:  # who stops a run is about to take the machine away: the checkpoint is safe, go
            self.evaluations.collect()
        if self.too_many_bad and outcome["status"] == "stopped":
            outcome["status"] = "bad_images"
        best = self.evaluations.best_summary
        outcome = guarded(outcome, self.guard, self.plan, best, self.tracker)
        if outcome["status"] == "stopped" and self.unsaved:
            lost = outcome["step"] - self.saved_step
            outcome |= {"step": self.saved_step, "lost_steps": lost}
        if outcome["status"] == "finished" and self.unsaved:
            outcome = {"status": "unsaved", "detail": self.alarm_text}
        summary = clock.summary()
        outcome["data_limit"] = self.watch.whole(summary)
        outcome |= summary | {"best": best, "bad_images": dict(self.bad)}
        outcome["evaluations"] = self.evaluations.said()
        outcome |= {
            "peak_memory_gib": _peak_bytes() / 2**30,
            "alarm": "; ".join(filter(None, (self.alarm_text, self.evaluations.alarm_text))),
        }
        over = outcome["status"] in ("finished", "guarded")
        self.prune(set() if over or self.guard is None else {0})
        self.tracker.close()
        return outcome


def _tracker(job: Mapping[str, Any], folder: Place) -> Any:
    """Writes into the run folder; where that is remote, the driver does, which keeps its copy."""
    from pipeline.track.tracker import RemoteTracker, tracker_from

    if job["track"] and is_uri(folder):
        return RemoteTracker(job["track"], Reports(job["feeder"]))
    return tracker_from(job["track"])


def _scheduled(plan: Plan, step: int) -> dict[str, float]:
    values = plan.at(step)
    return {
        "optim/lr": values.lr,
        "optim/weight_decay": values.weight_decay,
        "optim/teacher_momentum": values.teacher_momentum,
        "optim/teacher_temperature": values.teacher_temperature,
    }


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
