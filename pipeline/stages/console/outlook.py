"""How long what is left of a chain takes: guesses before it, corrected by what stages took.

Of training it is the dry run's guess, or what an earlier start of the run measured, and from its
first steps on what the workers measure. Of the other stages it is a line through what they took on
two cores.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.config.config import Config
from pipeline.context import Context
from pipeline.driver import cluster
from pipeline.errors import PipelineError
from pipeline.heartbeat import HEART
from pipeline.plan.layout import Machine
from pipeline.plan.plan import SetFacts, resolve
from pipeline.stages.checks.known_sets import KnownSet
from pipeline.track import journal
from pipeline.train import build, estimate, start
from pipeline.train.checkpoint import state
from pipeline.train.speed.bottleneck import duration
from pipeline.train.speed.lasts import flops_per_s, in_words, seconds_of

log = logging.getLogger("pipeline")
# Seconds that a stage takes whatever its images, and for each of them; two cores, tiles of the demo
FIXED = {"pack": 5, "curate": 30, "adapt": 40, "pretrain": 30, "evaluate": 20, "export": 8,
         "embed": 12, "search": 4, "look": 8}  # fmt: skip
AN_IMAGE = {"pack": 0.001, "curate": 0.006, "evaluate": 0.002, "embed": 0.001}
CONTENDERS = 2  # networks that an evaluation runs: the trained one, and the one at step 0
FORWARD = 1 / 6  # of the FLOPs of a step: a third of forward and backward, of one view of two
LEAST, MOST = 0.5, 5.0  # by how much stages that are over correct those to come


@dataclass(frozen=True)
class Earlier:
    """What earlier starts of a training came to.

    Attributes:
        steps: of the checkpoint that it goes on from.
        images_per_s: that it trained with at last; 0: it has not begun.
    """

    steps: int = 0
    images_per_s: float = 0.0


class Outlook:
    """Seconds that are left.

    Args:
        expected: of each stage to come, in order; None: nobody knows.
        clock: seconds.
    """

    def __init__(
        self, expected: Mapping[str, float | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.expected = dict(expected)
        self.clock = clock
        self.current, self.begun = "", 0.0
        self.guessed, self.took = 0.0, 0.0  # of the stages that are over

    def begin(self, stage: str) -> None:
        """A stage begins."""
        self.current, self.begun = stage, self.clock()

    def end(self) -> None:
        """The stage is over."""
        guess = self.expected.pop(self.current, None)
        if guess and self.current != "pretrain":  # its own rate says nothing of the others
            self.guessed += guess
            self.took += self.clock() - self.begun
        self.current = ""

    def skip(self, stage: str) -> None:
        """A stage is not run."""
        self.expected.pop(stage, None)

    @property
    def factor(self) -> float:
        """What stages took over what they were expected to."""
        return min(MOST, max(LEAST, self.took / self.guessed)) if self.guessed else 1.0

    def left(self, of_stage: float | None = None) -> float | None:
        """Seconds; None where nobody knows.

        Args:
            of_stage: what the stage that runs says itself.
        """
        total = 0.0
        for stage, guess in self.expected.items():
            if stage == self.current:
                spent = self.clock() - self.begun
                if of_stage is None and guess is None:
                    return None
                scaled = (guess or 0.0) * (1 if stage == "pretrain" else self.factor)
                total += of_stage if of_stage is not None else max(0.0, scaled - spent)
            elif guess is None:
                return None
            else:
                total += guess * (1 if stage == "pretrain" else self.factor)
        return total

    def said(self, of_stage: float | None = None) -> str:
        """` | all 4m 10s`, to be put behind a line; "" where nobody knows."""
        left = self.left(of_stage)
        return "" if left is None else f" | all {duration(left)}"

    def line(self) -> str:
        """What is expected of the whole chain, before it; "" where nobody knows."""
        left = self.left()
        if left is None:
            return ""
        longest = sorted(self.expected.items(), key=lambda one: -(one[1] or 0))[:3]
        parts = ", ".join(f"{name} {duration(seconds or 0)}" for name, seconds in longest)
        return f"about {in_words(left)} in all ({parts}): a guess, which lines below correct"


def outlook_of(
    config: Config,
    stages: Sequence[str],
    images: int,
    queries: int,
    machine: Machine | None,
    earlier: Earlier = Earlier(),
) -> Outlook:
    """What the stages of a chain are expected to take.

    Args:
        config: the recipe.
        stages: to be run, in order.
        images: of the set, before any is left out; 0: not known.
        queries: of the evaluation set.
        machine: that it runs on; None where nothing is trained.
        earlier: starts of the training.
    """
    expected: dict[str, float | None] = {}
    training, forward = _training(config, images, machine, earlier) if machine else (None, 0.0)
    for stage in stages:
        if not images or stage not in FIXED:
            expected[stage] = None
            continue
        asked = images + queries if stage in ("pack", "evaluate") else images
        seconds: float | None = FIXED[stage] + AN_IMAGE.get(stage, 0.0) * asked
        if stage == "pretrain":
            seconds = FIXED[stage] + training if training is not None else None
        elif stage in ("evaluate", "embed"):
            networks = CONTENDERS if stage == "evaluate" else 1
            seconds = (seconds or 0.0) + networks * asked * forward
        expected[stage] = seconds
    return Outlook(expected)


def _training(
    config: Config, images: int, machine: Machine, earlier: Earlier
) -> tuple[float | None, float]:
    """Seconds of training, and of a forward pass of one image; None where nobody knows."""
    if not images or config.adapt.enabled:  # its recipe is not derived yet
        return None, 0.0
    try:
        plan = resolve(config, SetFacts(images, ""), machine=machine)
        if earlier.images_per_s:
            left = max(0, plan.steps - earlier.steps) * config.optim.global_batch_size
            return left / earlier.images_per_s, FORWARD / earlier.images_per_s
        plan = start.located(plan, None)  # with features of a teacher alone there are no heads
        cost = estimate.estimated_cost(plan, build.for_estimate(plan))
    except PipelineError as error:
        log.debug("no guess of the time: %s", error)  # the stage says it, where it still holds
        return None, 0.0
    speed = flops_per_s(plan)
    if not speed:
        return None, 0.0
    return seconds_of(plan, cost), FORWARD * cost.flops_per_image / speed


def _earlier(context: Context) -> Earlier:
    """The checkpoint that training goes on from, and the speed that the journal gives last."""
    saved = state.latest(context.folder.checkpoints)
    metrics = context.folder.path / journal.FILE_NAME
    if saved is None or not metrics.is_file():
        return Earlier()
    name = "perf/images_per_s"
    events = journal.read(metrics, having=name.encode())
    ours = (one for _, one in events if one["run"] == "pretrain" and "metrics" in one)
    speeds = [event["metrics"].get(name) for event in ours]
    known = [speed for speed in speeds if speed]  # null where it was not finite
    return Earlier(saved.step, known[-1]) if known else Earlier()


@contextmanager
def looking_ahead(
    context: Context, stages: Sequence[str], sets: Mapping[str, KnownSet]
) -> Iterator[Outlook]:
    """Inside, lines of progress say how long all that is left will take. Ray is there.

    Args:
        context: of the job.
        stages: to be run, in order.
        sets: what is known of the image sets, by the field that names them.
    """
    source = sets.get("data.shards") or sets.get("data.source")
    queries = sets.get("evaluate.queries")
    trains = "pretrain" in stages
    ahead = outlook_of(
        context.config,
        stages,
        source.images if source else 0,
        queries.images if queries else 0,
        cluster.machine() if trains else None,
        _earlier(context) if trains else Earlier(),
    )
    if len(stages) > 1 and (line := ahead.line()):
        log.info("%-11s %s", "time", line)
    HEART.rest = ahead.said
    try:
        yield ahead
    finally:
        HEART.rest = None
