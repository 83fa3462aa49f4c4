"""Times the data path in this process on one core: reading, decoding, cutting and draws.

The functions are those that read tasks and decoders run, so the figures are what a decoder of a
run needs for an image, without what Ray adds.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.errors import DataError
from pipeline.images.bad_image import REASONS
from pipeline.images.decode import BadImage, image_size, value_span
from pipeline.images.jpeg import jpeg_header
from pipeline.images.value_range import SAMPLE, Span, ValueRange, range_of
from pipeline.shards.row_group import RowGroup, read_row_group
from pipeline.shards.shards import ShardSet
from pipeline.stream.decoder import StreamSpec, draw, make_chunk
from pipeline.stream.reader import EncodedImages, encoded_images

IMAGES = 1000
SECONDS = 20.0
BYTES = 256 * 2**20  # of encoded images that are held
REPETITIONS = 5


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Sample:
    """Images of one file, encoded."""

    portion: EncodedImages
    read_ms: Spread  # an image, over the row groups
    read_bytes_per_s: Spread

    def __len__(self) -> int:
        return len(self.portion)

    @property
    def image_bytes(self) -> float:
        """Mean size of an encoded image."""
        return len(self.portion.encoded) / len(self)


@dataclass(frozen=True)
class Timing:
    """CPU milliseconds of one core for an image; repetitions over the same images."""

    images: int  # of one repetition
    decode: Spread
    cut: Spread
    draw: Spread  # boxes, colour numbers and masks
    whole: Spread
    other_decode: Spread  # with `scaled_decode` the other way round
    had: Spread  # share of a core that this process was given


@dataclass(frozen=True)
class Contents:
    """What kind of images they are."""

    checked: int  # so many were decoded
    bad: dict[str, int]  # of them, by reason
    plain: float  # share of plain JPEGs, which take the fast road, of all that were read
    megapixels: Spread  # of those whose header can be read
    shrunk: float  # share of the decoded ones that scaled decoding makes smaller
    used_range: ValueRange | None  # of values, in those of more than 8 bits; None: there are none


def read_sample(
    shards: ShardSet, images: int = IMAGES, limit_bytes: int = BYTES, seconds: float = SECONDS / 4
) -> Sample:
    """Reads row groups of the first file that has images, one after the other.

    Args:
        shards: the set.
        images: to be read, at most.
        limit_bytes: of encoded images, after which no further row group is read.
        seconds: the same for time.

    Raises:
        DataError: the set has no images, or the file cannot be read.
    """
    file = next((i for i, shard in enumerate(shards.files) if shard.rows), None)
    if file is None:
        raise DataError(f"{shards.uri} has no images", "pack some: python jobs/pack.py --help")
    groups: list[RowGroup] = []
    read_s: list[float] = []
    sizes: list[int] = []
    for index, rows in enumerate(shards.files[file].row_groups):
        if not rows:
            continue
        begin = time.perf_counter()
        group = read_row_group(shards, file, index)
        read_s.append(time.perf_counter() - begin)
        groups.append(group)
        sizes.append(sum(map(len, group.encoded)))
        if sum(map(len, groups)) >= images or sum(sizes) >= limit_bytes or sum(read_s) >= seconds:
            break
    which = np.repeat(np.arange(len(groups)), [len(group) for group in groups])[:images]
    places = np.concatenate([np.arange(len(group)) for group in groups])[:images]
    return Sample(
        encoded_images(groups, which, places),
        Spread.of([1000 * s / len(g) for s, g in zip(read_s, groups, strict=True)]),
        Spread.of([size / s for s, size in zip(read_s, sizes, strict=True)]),
    )


def time_sample(
    sample: Sample, spec: StreamSpec, seconds: float = SECONDS, repetitions: int = REPETITIONS
) -> tuple[Timing, Contents]:
    """Decodes and cuts, first to see what is there, then several times against the clock.

    Args:
        sample: from `read_sample`.
        spec: of the run. The caller has set torch to one thread, as decoders have.
        seconds: about what it takes; large images are then fewer.
        repetitions: of the timing.

    Raises:
        DataError: none of the images can be decoded.
    """
    step = max(1, min(spec.chunk, len(sample) // repetitions or 1, 32))
    contents, per_image = _look(sample, spec, step, seconds / 3)
    # A repetition decodes and cuts the images twice, with and without scaled decoding.
    most = int(2 / 3 * seconds / repetitions / (2.5 * max(per_image, 1e-6)))
    images = max(1, min(contents.checked, most))
    other = replace(spec, scaled_decode=not spec.scaled_decode)
    timings: list[tuple[float, ...]] = []
    end = time.perf_counter() + seconds
    while len(timings) < min(3, repetitions) or (
        len(timings) < repetitions and time.perf_counter() < end
    ):
        timings.append(_once(sample.portion, images, step, spec, other))
    return Timing(images, *(Spread.of(part) for part in zip(*timings, strict=True))), contents


def _look(sample: Sample, spec: StreamSpec, step: int, seconds: float) -> tuple[Contents, float]:
    """What the images are, and seconds that each took."""
    portion, scaled = sample.portion, replace(spec, scaled_decode=True)
    valid, bad = 0, Counter[str]()
    begin = time.perf_counter()
    at = 0
    while at < len(portion) and (at == 0 or time.perf_counter() - begin < seconds):
        end = min(at + step, len(portion))
        chunk = make_chunk(portion, at, end, spec)
        valid += int(chunk["valid"].sum())
        bad.update(REASONS[r] for r in chunk["reason"][~chunk["valid"]])
        at = end
    per_image = (time.perf_counter() - begin) / at
    if not valid:
        counts = ", ".join(f"{n} {reason}" for reason, n in bad.items())
        raise DataError(
            f"none of the {at} images that were read can be decoded: {counts}",
            "look at the column of images: data.image_column, model.in_channels",
        )
    plain = [jpeg_header(portion.image(i)).plain for i in range(len(portion))]
    sizes = np.asarray([_size(portion, i, spec) for i in range(len(portion))])
    known = replace(portion, sizes=sizes)
    parts = [(a, min(a + step, at)) for a in range(0, at, step)]
    shrinks = np.concatenate([draw(known, *part, scaled).shrinks for part in parts])
    smaller = (shrinks > 1) & plain[:at] & (sizes[:at].min(-1) > 0)
    spans = [_span(portion.image(i), spec) for i in range(min(at, SAMPLE))]
    megapixels = sizes.prod(-1)[sizes.min(-1) > 0] / 1e6
    return (
        Contents(
            at,
            dict(bad),
            float(np.mean(plain)),
            Spread.of(megapixels.tolist()),
            float(np.mean(smaller)),
            range_of(deep) if (deep := [s for s in spans if s is not None]) else None,
        ),
        per_image,
    )


def _size(portion: EncodedImages, i: int, spec: StreamSpec) -> tuple[int, int]:
    """Height and width as the shard or the file says, 0 where neither does."""
    height, width = portion.sizes[i].tolist()
    if height and width:
        return height, width
    try:
        return image_size(portion.image(i), spec.crops.channels, spec.max_pixels)
    except BadImage:
        return 0, 0


def _span(encoded: bytes, spec: StreamSpec) -> Span | None:
    try:
        return value_span(encoded, spec.crops.channels, spec.max_pixels)
    except BadImage:
        return None


def _once(
    portion: EncodedImages, images: int, step: int, spec: StreamSpec, other: StreamSpec
) -> tuple[float, ...]:
    """The fields of a `Timing`, in order.

    Others may use the core as well: the parts are timed by the clock, and take of the core's time
    what they take of the clock's.
    """
    parts = [(at, min(at + step, images)) for at in range(0, images, step)]
    begin, cpu = time.perf_counter(), time.thread_time()
    works = [make_chunk(portion, *part, spec)["spent"] for part in parts]
    whole = time.thread_time() - cpu
    had = whole / max(time.perf_counter() - begin, 1e-9)
    begin, cpu = time.perf_counter(), time.thread_time()
    other_s = sum(float(make_chunk(portion, *part, other)["spent"]["decode_s"]) for part in parts)
    other_s *= (time.thread_time() - cpu) / max(time.perf_counter() - begin, 1e-9)
    cpu = time.thread_time()
    for part in parts:
        draw(portion, *part, spec)
    draws = time.thread_time() - cpu
    decode = had * sum(float(spent["decode_s"]) for spent in works)
    cut = max(0.0, had * sum(float(spent["crop_s"]) for spent in works) - draws)
    scale = 1000 / images
    return (scale * decode, scale * cut, scale * draws, scale * whole, scale * other_s, had)
