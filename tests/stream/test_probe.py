"""Timings of the data path: planted images, and functions that take a planted time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import DataError
from pipeline.shards.shards import ShardSet
from pipeline.stream import decoder as stream
from pipeline.stream import probe
from pipeline.stream.decoder import StreamSpec
from pipeline.views.crops import CropSpec
from pipeline.views.masks import MaskSpec
from pipeline.views.photometric import PhotometricSpec
from tests.data import encoded, noise, stored

IMAGES = 40


def picture(kind: str, width: int = 60, height: int = 48) -> bytes:
    return encoded(noise(width, height, width), kind)


@pytest.fixture
def mixed(tmp_path: Path) -> ShardSet:
    """JPEGs at even places, of them four that are large; PNGs at odd ones; two are bad."""
    images = [picture("JPEG" if i % 2 == 0 else "PNG") for i in range(IMAGES)]
    for i in (2, 12, 22, 32):
        images[i] = picture("JPEG", 400, 300)
    images[4], images[7] = b"no image", images[7][:-30]
    return stored(images, tmp_path / "part.parquet", 10)


def spec_of(shards: ShardSet, **changes: object) -> StreamSpec:
    spec = StreamSpec(
        columns=shards.columns,
        seed=0,
        global_batch=8,
        steps_per_pass=5,
        crops=CropSpec(global_size=16, local_size=8, local_crops=2, local_scale=(0.2, 0.4)),
        photometric=PhotometricSpec(),
        masks=MaskSpec((4, 4), 0.5, (0.1, 0.5)),
        chunk=4,
        max_pixels=10**6,
    )
    return replace(spec, **changes)


def test_what_the_images_are(mixed: ShardSet) -> None:
    sample = probe.read_sample(mixed)
    assert len(sample) == IMAGES
    timing, contents = probe.time_sample(sample, spec_of(mixed), seconds=30, repetitions=3)
    assert contents.checked == timing.images == IMAGES
    assert contents.bad == {"not_an_image": 1, "truncated": 1}
    assert contents.plain == (IMAGES / 2 - 1) / IMAGES  # all JPEGs but the one that is none
    assert contents.shrunk == 4 / IMAGES
    assert contents.megapixels.low == contents.megapixels.median == pytest.approx(60 * 48 / 1e6)
    assert contents.megapixels.high == pytest.approx(0.12)
    for part in (sample.read_ms, timing.decode, timing.draw, timing.whole, timing.other_decode):
        assert 0 < part.low <= part.median <= part.high


def test_it_stops_reading_in_time(mixed: ShardSet) -> None:
    assert len(probe.read_sample(mixed, images=13)) == 13
    assert len(probe.read_sample(mixed, limit_bytes=1)) == 10  # one row group at least
    assert len(probe.read_sample(mixed, seconds=0)) == 10


def test_a_set_of_nothing_but_bad_images(tmp_path: Path) -> None:
    shards = stored([b"x"] * 9, tmp_path / "part.parquet", 10)
    with pytest.raises(DataError, match=r"none of the 9 images .* decoded: 9 not_an_image"):
        probe.time_sample(probe.read_sample(shards), spec_of(shards), seconds=1)


def test_an_empty_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no images"):
        probe.read_sample(stored([], tmp_path / "part.parquet", 10))


class Clocks:
    """Time that passes where a test says so; half of the core's is for others."""

    def __init__(self) -> None:
        self.milliseconds = 0.0

    def work(self, milliseconds: float) -> None:
        """Keeps the core busy, in this process's own time."""
        self.milliseconds += milliseconds

    def thread_time(self) -> float:
        return self.milliseconds / 1000

    def perf_counter(self) -> float:
        return 2 * self.milliseconds / 1000


def test_planted_times_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding takes 5 ms (3 ms where it may shrink), cutting 2, draws 4 ms for each chunk."""
    shards = stored([picture("JPEG", 400, 300)] * 16, tmp_path / "part.parquet", 10)
    decode, cut, draws = stream.decode_shrunk, stream.cut_crops, stream.masks_for
    clocks = Clocks()

    def slow_decode(data: bytes, shrink: int, *more: int) -> object:
        clocks.work(3 if shrink > 1 else 5)
        return decode(data, shrink, *more)

    def slow_cut(*arguments: object, **more: object) -> object:
        clocks.work(2)
        return cut(*arguments, **more)

    def slow_draws(*arguments: object) -> object:
        clocks.work(4)
        return draws(*arguments)

    sample = probe.read_sample(shards)
    monkeypatch.setattr(stream, "decode_shrunk", slow_decode)
    monkeypatch.setattr(stream, "cut_crops", slow_cut)
    monkeypatch.setattr(stream, "masks_for", slow_draws)
    for module in (probe, stream):
        monkeypatch.setattr(module, "time", clocks)
    timing, _ = probe.time_sample(sample, spec_of(shards), 30, 3)
    assert timing.images == 16
    for part, expected in (
        (timing.whole, 3 + 2 + 4 / 4),
        (timing.decode, 3),
        (timing.other_decode, 5),
        (timing.cut, 2),
        (timing.draw, 4 / 4),
        (timing.had, 0.5),
    ):
        assert (part.low, part.median, part.high) == pytest.approx((expected,) * 3)
