"""Evaluations while training: asked for at a step, run by an actor, collected when they are there.

No step waits for them but for the copy of the weights: what may take long, sending and the answer,
is a thread's. A new best score is written beside the checkpoints, as they are. Where `MAX_PENDING`
are under way, the next one is skipped, and that is said. At the end of the run they are waited for,
but not for ever. Where there is a guard, each is compared with that of the start, which is never
skipped and is tried again where it fails.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import ray
from torch import Tensor

from pipeline.errors import last_line, one_line
from pipeline.evaluate.health import alarm
from pipeline.evaluate.pictures import CAPTIONS
from pipeline.evaluate.teacher import EvaluatedOn, Evaluation
from pipeline.heartbeat import now
from pipeline.plan.plan import Plan
from pipeline.train.checkpoint.choice import Choice
from pipeline.train.evaluator import Weights
from pipeline.train.guard.decision import LEFT, Compared
from pipeline.train.guard.guard import Guard
from pipeline.train.speed.bottleneck import duration
from pipeline.uri import Place, join, public

log = logging.getLogger("pipeline.train")
MAX_PENDING = 2  # one at work and one in line: so many copies of the weights there are
END_S = 600.0  # waited for at the end of a run, or END_TIMES the longest evaluation so far
END_TIMES = 3
HANGING_S = 7200.0  # without an answer, or HANGING_TIMES the longest: the evaluator starts again
HANGING_TIMES = 10
LOOK_S = 0.2


class Request(threading.Thread):
    """One evaluation under way: a thread that sends the weights and waits for the answer.

    Both may take long: the object store may be full, the actor may be late or start again.

    Args:
        step: of the weights.
        evaluator: the actor.
        weights: of the backbone, a copy, or what gives one and may take long. Ray copies arrays
            outside of Python; tensors it would pickle, and hold up the steps by seconds a GB, in
            whichever thread.
        limit: images of each set.
    """

    def __init__(
        self,
        step: int,
        evaluator: Any,
        weights: Weights | Callable[[], Weights],
        limit: int | None,
    ) -> None:
        super().__init__(name=f"evaluation of step {step}", daemon=True)
        self.step, self.since = step, time.monotonic()
        self.answer: Evaluation | Exception | None = None  # None while it is under way
        self._evaluator = evaluator
        self._arguments: tuple[Weights | Callable[[], Weights], int | None] = (weights, limit)
        self._reference: Any = None
        self._forgotten = False
        self.start()

    def run(self) -> None:
        """In the thread."""
        try:
            weights, limit = self._arguments
            if callable(weights):
                weights = weights()
            self._reference = self._evaluator.run.remote(weights, limit)
            self._arguments, weights = ({}, None), {}  # Ray has them now
            if self._forgotten:  # while they were sent
                self.forget()
            self.answer = ray.get(self._reference)
        except Exception as error:  # of whatever kind: said by `collect`, and training goes on
            self.answer = error

    def forget(self) -> None:
        """Whoever runs it need not go on, nor begin again after a restart."""
        self._forgotten = True
        if self._reference is not None:
            ray.cancel(self._reference)


class Evaluations:
    """Rank 0's side: requests, results, the best checkpoint and the collapse alarm.

    Args:
        plan: of the run.
        evaluator: the actor.
        tracker: takes metrics and pictures.
        folder: of the run.
        evaluated_on: the images and settings of its scores.
        counts: as `counts` was at the checkpoint that training goes on from.
        guard: compares them with the start; None: nothing is compared.
    """

    def __init__(
        self,
        plan: Plan,
        evaluator: Any,
        tracker: Any,
        folder: Place,
        evaluated_on: EvaluatedOn,
        counts: Mapping[str, int] | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.plan, self.evaluator, self.tracker = plan, evaluator, tracker
        self.guard, self.late = guard, list[tuple[int, Evaluation]]()  # that wait for the start
        self.checkpoints = join(folder, "checkpoints")
        self.pending: list[Request] = []
        self.counts = Counter(counts or {})  # skipped, failed
        self.longest_s = 0.0
        self.newest: dict[str, float] = {}
        self.alarm_text = self.note = ""
        usual = f"eval/knn{plan.config.evaluate.k}_top1"
        self.choice = Choice(self.checkpoints, evaluated_on.key, evaluated_on.asked, usual)

    def request(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Asks for an evaluation of a backbone's weights, which nobody changes any more, or skips
        it where others are late.

        That of the last step is never skipped: no step waits for it, and the end waits so long only
        as `finish` says.
        """
        self.collect()
        if step:
            self._ask_start()
        if len(self.pending) >= MAX_PENDING and step < self.plan.steps:
            late = self.pending[0]
            self.counts["skipped"] += 1
            self.tracker.metrics(step, {"eval/skipped": self.counts["skipped"]})
            log.warning(
                "the evaluation of step %d is skipped (%d so far): that of step %d has no result "
                "after %s; a larger train.eval_every or fewer evaluate.during_training asks less",
                step,
                self.counts["skipped"],
                late.step,
                duration(time.monotonic() - late.since),
            )
            return
        arrays = {name: value.numpy() for name, value in weights.items()}
        limit = self.plan.config.evaluate.during_training
        self.pending.append(Request(step, self.evaluator, arrays, limit))

    @property
    def best_summary(self) -> dict[str, Any] | None:
        """The best so far, as the result of a training has it."""
        best = self.choice.best
        return best.summary if best else None

    def pending_steps(self) -> set[int]:
        """Steps whose checkpoints may yet turn out to be the best. With a guard the start is one:
        it is what everything is compared with, again where the images change.
        """
        steps = {request.step for request in self.pending} | {step for step, _ in self.late}
        return steps | {0} if self.guard else steps

    def _ask_start(self) -> None:
        """Asks for the evaluation of the start, where it is missing: it failed, or died with an
        earlier group.
        """
        asked = any(request.step == 0 for request in self.pending)
        if self.guard is not None and self.guard.waits and not asked:
            limit = self.plan.config.evaluate.during_training
            self.pending.append(Request(0, self.evaluator, self.guard.weights, limit))

    def note_step(self, metrics: dict[str, float]) -> None:
        """Keeps the step's health numbers for the alarm."""
        self.newest |= {k: v for k, v in metrics.items() if k.startswith("health/")}

    def collect(self) -> None:
        """Records the results that are there; waits for none."""
        while self.pending and (answer := self.pending[0].answer) is not None:
            request = self.pending.pop(0)
            seconds = time.monotonic() - request.since
            if self.pending:  # the actor takes one after the other
                self.pending[0].since = time.monotonic()
            if isinstance(answer, Exception):
                # Training is worth more than one evaluation: said aloud, and the next one is tried.
                self.counts["failed"] += 1
                log.error("the evaluation of step %d failed: %s", request.step, last_line(answer))
                self._missed({request.step})
            else:
                self.longest_s = max(self.longest_s, seconds)
                self._record(request.step, answer)
        limit = max(HANGING_S, HANGING_TIMES * self.longest_s)
        if self.pending and time.monotonic() - self.pending[0].since > limit:
            self._start_again(limit)

    def wait(self, seconds: float, stopped: Callable[[], bool] = lambda: False) -> None:
        """Records the results that come within so many seconds, or until it is `stopped`."""
        end = time.monotonic() + seconds
        self.collect()
        while self.pending and time.monotonic() < end and not stopped():
            time.sleep(LOOK_S)
            self.collect()

    def finish(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """At the end of a run: waits for what is under way, within a limit, and gives up the rest.

        The limit is `END_S`, or `END_TIMES` the longest evaluation so far for each that is waited
        for, where that is more.

        Args:
            stopped: whether nobody wants to wait any longer.
        """
        self.collect()
        if self.pending:
            self._wait_for_last(stopped)
        if self.late:
            log.error("the start could not be evaluated: the guard has compared nothing")
            self._take_late()

    def _wait_for_last(self, stopped: Callable[[], bool]) -> None:
        limit = max(END_S, END_TIMES * self.longest_s * len(self.pending))
        now(
            f"pretrain: the evaluation of step {self.pending[-1].step}, for at most "
            f"{duration(limit)}"
        )
        begun = time.monotonic()
        self.wait(limit, stopped)
        if self.pending:
            waited = duration(time.monotonic() - begun)
            self._give_up(f"the run is done, and was kept for {waited} to wait for them")

    def _start_again(self, limit: float) -> None:
        """The evaluator hangs: what is under way is given up, and its process starts again."""
        self._give_up(f"the evaluator gave no answer for {duration(limit)} and is started again")
        # in a thread: no step waits for Ray's answer
        threading.Thread(
            target=ray.kill, args=(self.evaluator,), kwargs={"no_restart": False}, daemon=True
        ).start()

    def _give_up(self, why: str) -> None:
        steps = ", ".join(str(request.step) for request in self.pending)
        log.error("no results of the evaluations of steps %s: %s", steps, why)
        self.counts["failed"] += len(self.pending)
        for request in self.pending:
            request.forget()
        missed = {request.step for request in self.pending}
        self.pending.clear()
        self._missed(missed)

    def said(self) -> str:
        """How many evaluations have no result; empty where all have one."""
        counted = [f"{n} {what}" for what in ("skipped", "failed") if (n := self.counts[what])]
        return f"evaluations: {', '.join(counted)}" if counted else ""

    def _record(self, step: int, evaluation: Evaluation) -> None:
        self.tracker.metrics(step, evaluation.metrics)
        for name, picture in evaluation.pictures.items():
            self.tracker.picture(name, step, picture, CAPTIONS.get(name, ""))
        if evaluation.note and evaluation.note != self.note:
            by = evaluation.decided_by.partition("/")[2]
            best = f"{by} chooses the best checkpoint" if by else "no checkpoint is best"
            log.warning("evaluation: %s; %s", evaluation.note, best)
        self.note = evaluation.note
        shown = ", ".join(
            f"{name.partition('/')[2]} {v:.4g}" for name, v in evaluation.metrics.items()
        )
        log.info("evaluated   step %d: %s", step, shown)
        decides = ("health/", evaluation.decided_by or "health/")
        tops = {k: v for k, v in evaluation.metrics.items() if k.startswith(decides)}
        self.tracker.headline(step, tops)
        self._compare(step, evaluation)
        sentence = alarm(
            self.newest | evaluation.metrics,
            self.plan.config.head.prototypes,
            warming_up=step <= max(self.plan.warmup_steps, self.plan.temperature_warmup_steps),
        )
        # the numbers in a sentence change at each evaluation; what it is about is said once
        if sentence and sentence.split(" is ")[0] != self.alarm_text.split(" is ")[0]:
            log.warning("%s", sentence)
            self.tracker.tags({"alarm": sentence})
        self.alarm_text = sentence or ""

    def _missed(self, steps: set[int]) -> None:
        """Evaluations without a result: that of the start is asked for again with the next one."""
        if self.guard is None or 0 not in steps or self.guard.start is not None:
            return
        self.guard.failed()
        if not self.guard.waits:
            self._take_late()

    def _compare(self, step: int, evaluation: Evaluation) -> None:
        """Compares with the start, once that is there, and notes the best."""
        guard = self.guard
        if guard is not None and step == 0 and guard.start is None and evaluation.answers:
            guard.begin(evaluation.answers)
        self.late.append((step, evaluation))
        if guard is None or not guard.waits:
            self._take_late()

    def _take_late(self) -> None:
        late, self.late = sorted(self.late, key=lambda one: one[0]), []
        for step, evaluation in late:
            result = Compared()
            if self.guard is not None:
                result = self.guard.compare(step, evaluation.answers)
                if metrics := self.guard.metrics(result):
                    self.tracker.metrics(step, metrics)
                    gains = {k: v for k, v in metrics.items() if k.startswith("guard/gain")}
                    self.tracker.headline(step, gains)
            if not result.may_be_best:
                continue
            name, score = evaluation.decided_by, evaluation.metrics.get(evaluation.decided_by)
            left = result.score if result.score and result.score.name == LEFT else None
            if left and not name:
                name, score = f"guard/{LEFT}", left.value
            if score is None:
                continue
            try:
                # without labels nothing says which is better: the newest that has not fallen
                self.choice.note(step, score, name, bool(left) and name == f"guard/{LEFT}")
            except OSError as error:
                place = public(join(self.checkpoints, "best.json"))
                log.error("%s could not be written (%s)", place, one_line(error))
