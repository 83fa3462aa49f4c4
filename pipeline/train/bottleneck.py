"""What holds the data path back when training waits for data, and what to change: one sentence.

Images come by three stages: read tasks wait for storage, decoders decode and cut on a core each,
and the stream carries chunks to the workers. A stage that is busy all the time is the limit; where
neither of the first two is, it is the third.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.views.batch import Work

WAIT = 0.10  # of the time of a window: above it, somebody should know
# A decoder also unpacks its portion and hands its chunks to the object store, and the others are
# never all fed at the same moment, so one that is the limit is not seen at work all the time.
DECODERS_BUSY = 0.7
# Of one read task. There are two, but the later one fills its room and waits for its turn.
READERS_BUSY = 0.7

Stage = Literal["decoding", "reading", "stream"]


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
class Limit:
    """The stage that limits, and the sentence."""

    stage: Stage
    sentence: str


def limit(feed: Feed) -> Limit | None:
    """Which stage limits and what to change; None where training waited for 10 % or less."""
    if feed.wait <= WAIT:
        return None
    waited = f"training waits for data {100 * feed.wait:.0f} % of the time: "
    if feed.decoders_busy >= DECODERS_BUSY and feed.decoders_busy >= feed.readers_busy:
        return Limit("decoding", waited + _decoding(feed))
    if feed.readers_busy >= READERS_BUSY:
        return Limit("reading", waited + _reading(feed))
    return Limit("stream", waited + _stream(feed))


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
    some = count(feed.decode_tasks, "decoder")
    return (
        f"{some} can give at most {1000 * feed.decode_tasks / both:,.0f} images/s "
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


def per_image(work: Work) -> dict[str, float]:
    """The metrics of some work: milliseconds of one core an image; reading: of waiting."""
    scale = 1000 / max(1, work.images)
    return {
        "perf/read_ms": scale * work.read_s,
        "perf/decode_ms": scale * work.decode_s,
        "perf/crop_ms": scale * work.crop_s,
    }


class Watch:
    """Follows a run window by window, and says what limits once for each stage it turns to.

    Args:
        decode_tasks: of the plan.
        scaled_decode: `data.scaled_decode`.
    """

    def __init__(self, decode_tasks: int, scaled_decode: bool) -> None:
        self.decode_tasks, self.scaled_decode = decode_tasks, scaled_decode
        self.said: Stage | None = None
        self.work = Work()

    def window(self, work: Work, timing: Mapping[str, float]) -> str:
        """The sentence that is to be said after a window; empty where there is none, or no news.

        Args:
            work: of all workers in this window.
            timing: `Clock.read()` of it.
        """
        self.work = self.work.plus(work)
        wait, rate = timing["perf/data_wait_fraction"], timing["perf/images_per_s"]
        found = limit(self._feed(work, wait, rate))
        if found is None or found.stage == self.said:
            return ""
        self.said = found.stage
        return found.sentence

    def whole(self, summary: Mapping[str, float]) -> str:
        """The sentence for all windows together, if one is due; `summary` is that of the clock."""
        if not summary or not self.work.images:
            return ""
        wait, rate = summary["data_wait_fraction"], summary["images_per_s"]
        found = limit(self._feed(self.work, wait, rate))
        return found.sentence if found else ""

    def _feed(self, work: Work, wait: float, images_per_s: float) -> Feed:
        read, decode, crop = per_image(work).values()
        return Feed(wait, images_per_s, read, decode, crop, self.decode_tasks, self.scaled_decode)
