"""What rank 0 does beside its steps: step lines, journal, checkpoints, evaluations, pictures.

Nothing of it waits for another machine, except a checkpoint for its own write.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from typing import Any

import ray
import torch

from pipeline.driver.mailbox import MOVE, STOP, Reports
from pipeline.errors import one_line
from pipeline.plan.plan import Plan
from pipeline.shards.bad_table import BadTable, reasons
from pipeline.storage.places import resolve_uri, retries
from pipeline.storage.transfer import write_bytes_atomic
from pipeline.train import build, state
from pipeline.train.bottleneck import Watch, ms, per_image
from pipeline.train.clock import Clock
from pipeline.train.evaluations import Evaluations
from pipeline.train.trainee import Trainee
from pipeline.uri import Place, is_uri, join
from pipeline.views.batch import BadImage, Batch, Work

log = logging.getLogger("pipeline.train")
COLLECT_S = 10.0  # for evaluations under way when a group moves: the notice may be short
LAST_TRIES_S = (5, 10, 15)  # pauses before the last checkpoint of a run is tried again
STOP_TRY_S = 2  # the same of a run that is stopped: whoever stops it may not wait long
AGAIN_S = 10.0  # between two tries of a checkpoint without which a group does not move


class Chief:
    """Rank 0's other duties: step lines, journal, checkpoints, evaluations, pictures."""

    def __init__(
        self,
        plan: Plan,
        trainee: Trainee,
        job: dict[str, Any],
        folder: Place,
        resumed: dict[str, Any] | None,
    ) -> None:
        self.plan, self.trainee, self.folder = plan, trainee, folder
        self.checkpoints = join(folder, "checkpoints")
        self.tracker = _tracker(job, folder)
        first_step = int(resumed["step"]) if resumed else 0
        self.tracker.resume(first_step)
        self.evaluations = Evaluations(
            plan, job["evaluator"], self.tracker, folder, job["compared"]
        )
        self.control = job["feeder"]
        self.wished = self.control.wait_wish.remote()
        self.bad: Counter[str] = Counter(resumed.get("bad_images", {}) if resumed else {})
        self.bad_table = BadTable(join(folder, "pretrain", "bad_images.parquet"))
        self.too_many_bad = False
        self.unsaved, self.alarm_text = 0, ""  # checkpoints in a row that could not be written
        self.saved_step, self.tried = first_step, -AGAIN_S
        self.read_retries = float(resumed.get("read_retries", 0)) if resumed else 0.0
        self.watch = Watch(plan.decode_tasks, plan.config.data.scaled_decode)
        if first_step:
            log.info("resumed     from the checkpoint at step %d", first_step)

    def wish(self) -> str:
        """What is wanted at the end of a step: `stop`, `move`, `save` (see `Control`), or ""."""
        if self.too_many_bad:
            return STOP
        ready, _ = ray.wait([self.wished], timeout=0)
        if not ready:
            return ""
        found = str(ray.get(self.wished))
        soon = self.unsaved and time.monotonic() - self.tried < AGAIN_S
        if not found or (found != STOP and soon):
            self.wished = self.control.wait_wish.remote()
            return ""
        return found

    def settled(self, step: int) -> str:
        """What the group does now that a wish has its checkpoint; "" if nobody wants it any more,
        or if the checkpoint could not be written: a move would throw steps away.

        Before a move, results of evaluations that would be lost come first.
        """
        wish = self.wish()
        if wish == STOP:
            return STOP
        if self.unsaved:
            self.wished = self.control.wait_wish.remote()
            return ""
        if wish == MOVE:
            self.evaluations.collect(wait=True, timeout=COLLECT_S)
            self.tracker.flush(COLLECT_S)
        wanted = ray.get(self.control.answer.remote(wish, step))
        self.wished = self.control.wait_wish.remote()
        return wish if wanted else ""

    def log(
        self,
        step: int,
        rows: list[dict[str, float]],
        clock: Clock,
        bad: list[BadImage],
        work: Work,
    ) -> None:
        """Journals every step since the last call; MLflow and the step line get the newest."""
        plan = self.plan
        self._note(bad, work)
        first = step - len(rows)
        for offset, row in enumerate(rows[:-1]):
            self.tracker.metrics(first + offset, row | _scheduled(plan, first + offset), send=False)
        seen = step * plan.config.optim.global_batch_size
        timing = clock.read()
        newest = rows[-1] | _scheduled(plan, step - 1) | timing
        newest |= {
            "data/images_seen": seen,
            "data/pass": step / plan.steps_per_pass,
            "data/bad_images": self.bad.total(),
            "data/storage_retries": retries(),  # of checkpoints and tables, in this process
            "data/read_retries": self.read_retries,
            **{f"data/bad_{reason}": count for reason, count in self.bad.items()},
            **per_image(work),
            "health/nonfinite_steps": 0,
            "perf/memory_gib": _resident_bytes() / 2**30,
            "perf/workers": plan.workers,
        }
        if torch.cuda.is_available():
            newest["perf/gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.tracker.metrics(step - 1, newest)
        self.tracker.headline(step - 1, {"loss/total": newest["loss/total"]})
        self.evaluations.note_step(newest)
        if step % plan.config.train.log_every == 0 or step == plan.steps:
            width = len(str(plan.steps))
            log.info(
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
            )
        settled = clock.done - len(rows) >= clock.WARMUP_STEPS
        if settled and (said := self.watch.window(work, timing)):
            log.warning("%s", said)
            self.tracker.tags({"data_limit": said})
        allowed = plan.config.data.max_bad_fraction * max(seen, plan.images)
        self.too_many_bad = self.bad.total() > allowed
        self.evaluations.collect()

    def _note(self, bad: list[BadImage], work: Work) -> None:
        self.bad.update(reason for _, reason, _ in bad)
        self.bad_table.add(bad)
        self.read_retries += work.retries

    def non_finite(
        self,
        step: int,
        rows: list[dict[str, float]],
        clock: Clock,
        bad: list[BadImage],
        work: Work,
    ) -> None:
        """Journals the steps before the one that was not finite, and that one as such."""
        if rows:
            self.log(step, rows, clock, bad, work)
        else:
            self._note(bad, work)
        self.tracker.metrics(step, {"health/nonfinite_steps": 1})

    def save(self, step: int) -> bool:
        """Writes a checkpoint; where it cannot be written, training goes on and says so."""
        plan = self.plan
        in_pass = step % plan.steps_per_pass
        meta = {
            "plan": plan.model_dump(mode="json"),
            "bad_images": dict(self.bad),
            "read_retries": self.read_retries,
            "pass": step // plan.steps_per_pass,
            "images_used_in_pass": in_pass * plan.config.optim.global_batch_size,
            "mlflow_run": self.tracker.run_id,
        }
        try:
            state.save(self.checkpoints, step, self.trainee.state(), meta)
        except OSError as error:
            self._unsaved(step, one_line(error))
            return False
        self.saved_step = step
        self.control.note_saved.remote(step)
        if self.unsaved:
            log.warning("checkpoint of step %d is written again", step)
            self.tracker.tags({"alarm": ""})
        self.unsaved, self.alarm_text = 0, ""
        self.tracker.metrics(step - 1, {"health/checkpoints_failed": 0})
        self.prune(self.evaluations.pending_steps())
        return True

    def _unsaved(self, step: int, why: str) -> None:
        """The alarm: a line, a tag, a metric. The checkpoints before it are as they were."""
        self.unsaved += 1
        self.tried = time.monotonic()
        self.alarm_text = (
            f"checkpoint of step {step} could not be written ({why}); going on, "
            f"{self.unsaved} in a row; a restart would begin at the last one before"
        )
        log.error("%s", self.alarm_text)
        self.tracker.metrics(step - 1, {"health/checkpoints_failed": self.unsaved})
        self.tracker.tags({"alarm": self.alarm_text})

    def prune(self, protected: set[int]) -> None:
        """Removes old checkpoints; where that fails, the next one tries again."""
        try:
            state.prune(self.checkpoints, self.plan.config.train.keep_last, protected)
        except OSError as error:
            log.error("old checkpoints could not be removed (%s); going on", one_line(error))

    def evaluation_due(self, step: int) -> bool:
        """Whether the teacher of this step is evaluated: step 0, every n steps, the last one."""
        return step % self.plan.eval_every == 0 or step == self.plan.steps

    def evaluate(self, step: int) -> None:
        """Asks for an evaluation of the teacher as it is now; the answer is collected later."""
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
        if self.too_many_bad and outcome["status"] == "stopped":
            outcome["status"] = "bad_images"
        if outcome["status"] == "stopped" and not self._saved_at(outcome["step"], (STOP_TRY_S,)):
            lost = outcome["step"] - self.saved_step
            outcome |= {"step": self.saved_step, "lost_steps": lost}
        last = self.plan.steps
        if outcome["status"] == "finished" and not self._saved_at(last, LAST_TRIES_S):
            outcome = {"status": "unsaved", "detail": self.alarm_text}
        summary = clock.summary()
        outcome["data_limit"] = self.watch.whole(summary)
        outcome |= summary | {"best": self.evaluations.best, "bad_images": dict(self.bad)}
        outcome |= {
            "peak_memory_gib": _peak_bytes() / 2**30,
            "alarm": "; ".join(filter(None, (self.alarm_text, self.evaluations.alarm_text))),
        }
        self.prune(set())
        self.tracker.close()
        place = join(self.folder, "pretrain", "outcome.json")
        write_bytes_atomic(json.dumps(outcome, indent=1).encode(), *resolve_uri(str(place)))

    def _saved_at(self, step: int, pauses: tuple[int, ...]) -> bool:
        """Whether what the steps made is on disk; a few more tries where it is not."""
        for pause in pauses if self.unsaved else ():
            time.sleep(pause)
            if self.save(step):
                break
        return not self.unsaved


def _tracker(job: dict[str, Any], folder: Place) -> Any:
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
