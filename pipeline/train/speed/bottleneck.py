"""Where the time of a run goes: its clock, and what holds the data path back, as one sentence.

Images come by three stages: read tasks wait for storage, decoders decode and cut on a core each,
and the stream carries chunks to the workers. A stage that is busy all the time is the limit; where
neither of the first two is, it is the third.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.views.batch import BadImage, Batch, Spent

WAIT = 0.10  # of the time of a window: above it, somebody should know
# A decoder also unpacks its portion and hands its chunks to the object store, and the others are
# never all fed at the same moment, so one that is the limit is not seen at work all the time.
DECODERS_BUSY = 0.7
# Of one read task. There are two, but the later one fills its room and waits for its turn.
READERS_BUSY = 0.7

Stage = Literal["decoding", "reading", "stream"]


class Clock:
    """Measures a window of steps (between two readings) and the run as a whole.

    Args:
        first_step: the step that the run starts or resumes at.
        steps: length of the run.
        global_batch: images in a step, over all workers.
        flops_per_image: of one training step, forward and backward, student and teacher.
        peak_flops: of all training devices together; 0 where unknown (no `perf/mfu` then).
        tokens_per_image: that enter the student's blocks; 0 where unknown (no `perf/tokens_per_s`).
    """

    WARMUP_STEPS = 5  # compilation, caches and the first blocks: not typical of what follows

    def __init__(
        self,
        first_step: int,
        steps: int,
        global_batch: int,
        flops_per_image: float,
        peak_flops: float,
        tokens_per_image: int = 0,
    ) -> None:
        self.first_step, self.steps, self.global_batch = first_step, steps, global_batch
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
        self.tokens_per_image = tokens_per_image
        self.done = 0
        self.settled: tuple[int, float] | None = None
        self.settled_wait = 0.0
        self.window_start = time.perf_counter()
        self.window_steps, self.window_wait, self.total_wait = 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        begin = time.perf_counter()
        yield
        waited = time.perf_counter() - begin
        self.window_wait += waited
        self.total_wait += waited

    def tick(self) -> None:
        """One step is over."""
        self.done += 1
        self.window_steps += 1
        if self.done == self.WARMUP_STEPS:
            self.settled = (self.done, time.perf_counter())
            self.settled_wait = self.total_wait

    def read(self) -> dict[str, float]:
        """The metrics since the last reading, and starts a new window."""
        now = time.perf_counter()
        seconds = max(now - self.window_start, 1e-9)
        steps = max(self.window_steps, 1)
        images_per_s = steps * self.global_batch / seconds
        metrics = {
            "perf/images_per_s": images_per_s,
            "perf/step_s": seconds / steps,
            "perf/data_wait_fraction": min(1.0, self.window_wait / seconds),
        }
        if self.tokens_per_image:
            metrics["perf/tokens_per_s"] = images_per_s * self.tokens_per_image
        if self.peak_flops:
            metrics["perf/mfu"] = self.mfu(images_per_s)
        self.window_start, self.window_steps, self.window_wait = now, 0, 0.0
        return metrics

    def mfu(self, images_per_s: float) -> float:
        """Share of the peak that a speed comes to."""
        return images_per_s * self.flops_per_image / self.peak_flops

    def summary(self) -> dict[str, float]:
        """images/s, wait fraction and, where the peak is known, MFU of the run so far, without its
        first steps.
        """
        if self.settled is None:
            return {}
        steps, since = self.settled
        seconds = max(time.perf_counter() - since, 1e-9)
        images_per_s = (self.done - steps) * self.global_batch / seconds
        return {
            "images_per_s": images_per_s,
            **({"mfu": self.mfu(images_per_s)} if self.peak_flops else {}),
            "data_wait_fraction": min(1.0, (self.total_wait - self.settled_wait) / seconds),
        }

    def eta(self) -> str:
        """Time to the end of the whole run, in words."""
        left = self.left_s()
        return "--" if left is None else duration(left)

    def left_s(self) -> float | None:
        """Seconds to the end of the whole run, from the mean step after the first few; None before
        them.
        """
        if self.settled is None or self.done <= self.settled[0]:
            return None
        steps, since = self.settled
        per_step = (time.perf_counter() - since) / (self.done - steps)
        return (self.steps - self.first_step - self.done) * per_step


def duration(seconds: float) -> str:
    """`14h 21m`, `3m 05s` or `42s`."""
    whole = round(max(0.0, seconds))
    if whole >= 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 60}m {whole % 60:02d}s" if whole >= 60 else f"{whole}s"


@dataclass
class Window:
    """What steps report between two lines of the log: on one worker, or `gathered` from all."""

    scalars: list[dict[str, Tensor]] = field(default_factory=list)  # of each step
    bad: list[BadImage] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)

    def add_images(self, batches: Sequence[Batch]) -> None:
        """Counts what reading and decoding these took, and notes the bad ones."""
        for batch in batches:
            self.bad += batch.bad
            self.spent = self.spent.plus(batch.spent)

    def rows(self) -> list[dict[str, float]]:
        """Steps' scalars with one copy to the host; the step has averaged them over workers."""
        if not self.scalars:
            return []
        names = sorted(self.scalars[0])
        table = torch.stack(
            [torch.stack([row[name].float() for name in names]) for row in self.scalars]
        )
        return [dict(zip(names, row, strict=True)) for row in table.cpu().tolist()]

    def gathered(self, device: torch.device, workers: int) -> Window:
        """With the bad images of all workers (nearly always there are none) and the sum of what
        theirs took. Every worker must call it.
        """
        if workers == 1:
            return self
        total = torch.tensor([len(self.bad), *self.spent], dtype=torch.float64, device=device)
        dist.all_reduce(total)
        bad_count, images, *seconds = total.tolist()
        spent = Spent(int(images), *seconds)
        if not bad_count:
            return Window(self.scalars, [], spent)
        parts: list[Any] = [None] * workers
        dist.all_gather_object(parts, self.bad)
        return Window(self.scalars, [row for part in parts for row in part], spent)


@dataclass(frozen=True)
class Feed:
    """What a run's data path did in some steps, over all workers."""

    wait: float  # share of the time in which rank 0 waited for data
    images_per_s: float
    read_ms: float  # of waiting for storage, an image
    decode_ms: float  # of one core, an image
    crop_ms: float  # of one core, an image
    decode_tasks: int  # decoders that the plan allows
    scaled_decode: bool = True  # data.scaled_decode

    @property
    def decoders_busy(self) -> float:
        """Share of the decoders' time that is accounted for; about 1 where they are the limit."""
        return self.images_per_s * (self.decode_ms + self.crop_ms) / 1000 / self.decode_tasks

    @property
    def readers_busy(self) -> float:
        """Read tasks that wait for storage at any moment."""
        return self.images_per_s * self.read_ms / 1000


@dataclass(frozen=True)
class Bottleneck:
    """The stage that limits, and the sentence."""

    stage: Stage
    sentence: str


def bottleneck(feed: Feed) -> Bottleneck | None:
    """Which stage limits and what to change; None where training waited for 10 % or less."""
    if feed.wait <= WAIT:
        return None
    waited = f"training waits for data {100 * feed.wait:.0f} % of the time: "
    if feed.decoders_busy >= DECODERS_BUSY and feed.decoders_busy >= feed.readers_busy:
        return Bottleneck("decoding", waited + _decoding(feed))
    if feed.readers_busy >= READERS_BUSY:
        return Bottleneck("reading", waited + _reading(feed))
    return Bottleneck("stream", waited + _stream(feed))


def _decoding(feed: Feed) -> str:
    both = feed.decode_ms + feed.crop_ms
    if feed.decode_ms >= feed.crop_ms:
        most = f"decoding takes {ms(feed.decode_ms)} of {ms(both)} ms an image"
        also = "or smaller stored images" + ", or data.scaled_decode=true" * (
            not feed.scaled_decode
        )
    else:
        most = f"cutting crops takes {ms(feed.crop_ms)} of {ms(both)} ms an image"
        also = "or fewer or smaller crops (augment.local_crops)"
    decoders = count(feed.decode_tasks, "decoder")
    return (
        f"{decoders} can give at most {1000 * feed.decode_tasks / both:,.0f} images/s "
        f"({most}); give more CPUs (or CPU nodes) for decoding, a higher resources.decode_tasks "
        f"where CPUs are idle, {also}"
    )


def _reading(feed: Feed) -> str:
    return (
        f"reading limits, at {ms(feed.read_ms)} ms of waiting an image, while decoders are busy "
        f"{100 * min(1.0, feed.decoders_busy):.0f} % of theirs; use nearer or faster storage, or "
        "pack larger row groups (data.row_group_images)"
    )


def _stream(feed: Feed) -> str:
    return (
        f"neither reading nor decoding is busy (decoders {100 * feed.decoders_busy:.0f} %), so the "
        "stream itself limits; give a larger object store (resources.object_store_gb), or larger "
        "blocks by a larger optim.global_batch_size over fewer train.workers"
    )


def ms(milliseconds: float) -> str:
    """Two digits that count: `0.18`, `2.4`, `93`, `120`."""
    return f"{milliseconds:.0f}" if milliseconds >= 10 else f"{milliseconds:.2g}"


def count(number: int, what: str) -> str:
    """`1 decoder`, `2,000 decoders`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def per_image(spent: Spent) -> dict[str, float]:
    """The metrics of what images took: milliseconds of one core an image; reading: of waiting."""
    scale = 1000 / max(1, spent.images)
    return {
        "perf/read_ms": scale * spent.read_s,
        "perf/decode_ms": scale * spent.decode_s,
        "perf/crop_ms": scale * spent.crop_s,
    }


class BottleneckWatch:
    """Follows a run window by window, and says what limits once for each stage it turns to.

    Args:
        decode_tasks: of the plan.
        scaled_decode: `data.scaled_decode`.
    """

    def __init__(self, decode_tasks: int, scaled_decode: bool) -> None:
        self.decode_tasks, self.scaled_decode = decode_tasks, scaled_decode
        self.said: Stage | None = None
        self.spent = Spent()

    def window(self, spent: Spent, timing: Mapping[str, float]) -> str:
        """The sentence that is to be said after a window; empty where there is none, or no news.

        Args:
            spent: of all workers in this window.
            timing: `Clock.read()` of it.
        """
        self.spent = self.spent.plus(spent)
        wait, rate = timing["perf/data_wait_fraction"], timing["perf/images_per_s"]
        limit = bottleneck(self._feed(spent, wait, rate))
        if limit is None or limit.stage == self.said:
            return ""
        self.said = limit.stage
        return limit.sentence

    def whole(self, summary: Mapping[str, float]) -> str:
        """The sentence for all windows together, if one is due; `summary` is that of the clock."""
        if not summary or not self.spent.images:
            return ""
        wait, rate = summary["data_wait_fraction"], summary["images_per_s"]
        limit = bottleneck(self._feed(self.spent, wait, rate))
        return limit.sentence if limit else ""

    def _feed(self, spent: Spent, wait: float, images_per_s: float) -> Feed:
        read, decode, crop = per_image(spent).values()
        return Feed(wait, images_per_s, read, decode, crop, self.decode_tasks, self.scaled_decode)
