"""Several streams bring every image into the micro batch that the order says, without Ray.

What is expected is plain arithmetic on the images in the order of the pass: image p of the run is
in step p / batch, chunk c of it belongs to worker c mod W, chunk k of a worker to its micro batch k
mod accumulation. Against it stand the real parts: windows that readers share, each stream in a
thread of its own, chunks dealt in turn to the workers of a stream, and the worker's side.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipeline.errors import DataError
from pipeline.plan.streams import streams_for
from pipeline.stream import windows
from pipeline.stream.dealing import Dealing
from pipeline.stream.decoder import StreamSpec, chunk_table, make_chunks
from pipeline.stream.reader import EncodedImages, Reading, read_portions, reading_of
from pipeline.stream.windows import HELD, SharedWindows, key_of, parts_of
from pipeline.stream.worker import _micro_batches
from pipeline.views.batch import Batch
from pipeline.views.crops import CropSpec
from pipeline.views.masks import MaskSpec
from pipeline.views.photometric import PhotometricSpec
from tests.data import encoded, hub_table, noise, stored

IMAGES, CHUNK = 103, 2
Places = dict[tuple[int, int], frozenset[str]]  # (step, micro batch): image ids


@dataclass(frozen=True)
class Way:
    streams: int
    workers: int
    accumulation: int = 1
    chunks: int = 1  # of a micro batch
    window: int = 0  # images; 0: two steps
    read: int = 3  # steps of a read task
    edges: tuple[int, ...] = (0, 9)  # first steps of segments, and behind them the last step

    @property
    def micro_batch(self) -> int:
        return self.chunks * CHUNK

    @property
    def batch(self) -> int:
        return self.workers * self.accumulation * self.micro_batch

    @property
    def dealing(self) -> Dealing:
        streams = streams_for(["one"] * self.workers, 12, self.streams)
        assert len(streams) == self.streams
        return Dealing(self.batch, CHUNK, (*(s.first for s in streams), self.workers))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    images = [encoded(noise(i, 9, 8)) for i in range(IMAGES)]
    images[17], images[60] = b"not an image", b""
    for part, rows in enumerate((range(40), range(40, IMAGES))):
        shards = stored(hub_table([images[i] for i in rows], rows), folder / f"{part}.parquet", 7)
    Shards.all = replace(shards, packed=True)  # so that windows may be small
    return folder


class Shards:
    all: Any


def reading_for(way: Way) -> tuple[Reading, StreamSpec]:
    window = way.window or 2 * way.batch
    reading = reading_of(Shards.all, seed=4, global_batch=way.batch, window=window)
    return reading, StreamSpec(
        columns=Shards.all.columns,
        seed=4,
        global_batch=way.batch,
        steps_per_pass=reading.order.steps_per_pass,
        crops=CropSpec(global_size=4, local_size=2, local_crops=1),
        photometric=PhotometricSpec(),
        masks=MaskSpec((2, 2), 0.5, (0.1, 0.5)),
        chunk=CHUNK,
        max_pixels=10**6,
    )


def by_arithmetic(way: Way) -> Places:
    reading, spec = reading_for(way)
    tasks = reading.tasks(way.edges[0], way.edges[-1])
    names = [
        name.tobytes().hex()
        for portion in read_portions(tasks, spec.columns, spec.seed, 5)
        for name in portion.image_ids
    ]
    places: dict[tuple[int, int], set[str]] = {}
    for p, name in enumerate(names):
        step, chunk = p // way.batch, p % way.batch // CHUNK
        worker, k = chunk % way.workers, chunk // way.workers
        micro_batch = worker + k % way.accumulation * way.workers
        places.setdefault((way.edges[0] + step, micro_batch), set()).add(name)
    return {place: frozenset(some) for place, some in places.items()}


def handles(readers: list[SharedWindows], pool: ThreadPoolExecutor) -> list[Any]:
    """As actors: their calls run in threads, and errors are values."""

    def part(reader: SharedWindows, *arguments: Any) -> Any:
        try:
            return reader.part(*arguments).table()
        except DataError as error:
            return error

    return [
        SimpleNamespace(
            part=SimpleNamespace(remote=lambda *a, reader=reader: pool.submit(part, reader, *a))
        )
        for reader in readers
    ]


def portions_of_stream(way: Way, stream: int, readers: list[Any]) -> list[EncodedImages]:
    reading, _ = reading_for(way)
    portions = []
    for first, last in pairwise(way.edges):
        for begin in range(first, last, way.read):
            tasks = reading.tasks(begin, min(begin + way.read, last))
            for images in parts_of(tasks, way.dealing, readers, stream):
                portions += [EncodedImages.of(p.table()) for p in images.portions(3 * CHUNK)]
    return portions


def all_portions(way: Way, readers: list[SharedWindows]) -> list[list[EncodedImages]]:
    with ThreadPoolExecutor(64) as calls, ThreadPoolExecutor(way.streams) as streams:
        actors = handles(readers, calls)
        return list(streams.map(lambda s: portions_of_stream(way, s, actors), range(way.streams)))


def streamed(way: Way, readers: list[SharedWindows]) -> Places:
    _, spec = reading_for(way)
    places: Places = {}
    for stream, portions in enumerate(all_portions(way, readers)):
        blocks = [chunk_table(c) for portion in portions for c in make_chunks(portion, spec)]
        first, workers = way.dealing.bounds[stream], way.dealing.workers(stream)
        for one in range(workers):
            mine = iter(blocks[one::workers])  # Ray Data deals blocks in turn
            batches = _micro_batches(mine, way.chunks, way.accumulation, pin=False)
            for n, batch in enumerate(batches):
                step, j = divmod(n, way.accumulation)
                place = way.edges[0] + step, first + one + j * way.workers
                assert place not in places
                places[place] = names_in(batch)
    return places


def names_in(batch: Batch) -> frozenset[str]:
    names = {bytes(row.numpy()).hex() for row in batch.image_ids}
    return frozenset(names | {name for name, _, _ in batch.bad})


def readers_for(way: Way) -> list[SharedWindows]:
    _, spec = reading_for(way)
    return [SharedWindows(spec.columns, way.dealing, spec.seed) for _ in range(way.streams)]


@pytest.fixture
def threads_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(future: Future[Any]) -> Any:
        return future.result(timeout=60)

    monkeypatch.setattr(ray, "get", get)


WAYS = [
    *(Way(s, w, a) for s in (1, 2, 3) for w in (4, 6) for a in (1, 2)),
    Way(2, 4, chunks=2, accumulation=2),
    Way(3, 6, window=4, read=2),  # a window is two chunks: some streams take nothing of it
    Way(3, 6, window=2),
    Way(2, 4, window=24, edges=(5, 9, 14, 29)),  # resumed, two segment ends, ends of passes
    Way(3, 4, accumulation=3, edges=(1, 4, 13)),
    Way(6, 6, edges=(0, 5, 19), read=1),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_each_image_is_in_the_micro_batch_that_the_order_says(
    way: Way, files: Path, threads_for_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, int]] = []
    plain = windows.read_group
    monkeypatch.setattr(
        windows, "read_group", lambda c, *place: (fetched.append(place), plain(c, *place))[1]
    )
    assert streamed(way, readers_for(way)) == by_arithmetic(way)
    reading, _ = reading_for(way)
    once = [
        place
        for first, last in pairwise(way.edges)
        for begin in range(first, last, way.read)
        for task in reading.tasks(begin, min(begin + way.read, last))
        for place in task.places
    ]
    assert sorted(fetched) == sorted(once)


def test_a_wrong_stream_is_noticed(files: Path, threads_for_ray: None) -> None:
    way = Way(2, 4)
    other = Dealing(way.batch, CHUNK, (0, 1, 4))
    readers = [SharedWindows(Shards.all.columns, other, 4) for _ in range(2)]
    wrong = [p for portions in all_portions(way, readers) for p in portions]
    right = [p for portions in all_portions(way, readers_for(way)) for p in portions]
    assert [p.positions.tolist() for p in wrong] != [p.positions.tolist() for p in right]


def test_two_windows_are_held_until_the_slowest_stream_has_had_them(
    files: Path, threads_for_ray: None
) -> None:
    way = Way(2, 4, window=8)
    reading, spec = reading_for(way)
    reader = SharedWindows(spec.columns, way.dealing, spec.seed)
    tasks = reading.tasks(0, 6)  # all by one reader
    done: list[int] = []

    def fast() -> None:
        for n, task in enumerate(tasks):
            reader.part(task, 0)
            done.append(n)

    thread = threading.Thread(target=fast, daemon=True)
    thread.start()
    for n, task in enumerate(tasks):
        until = time.monotonic() + 20
        while len(done) < min(n + HELD, len(tasks)) and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(0.02)
        assert len(done) == min(n + HELD, len(tasks))
        assert len(reader.held) <= HELD
        reader.part(task, 1)
    thread.join(20)
    assert not reader.held and not reader.waiting


def test_what_is_asked_for_again_is_read_again(files: Path) -> None:
    """By a read task that was killed, of a reader that goes on; and of one that started again."""
    way = Way(2, 4, window=8)
    reading, spec = reading_for(way)
    tasks = reading.tasks(0, 4)
    reader = SharedWindows(spec.columns, way.dealing, spec.seed)
    first = [reader.part(task, s).image_ids.tolist() for task in tasks for s in (0, 1)]
    reader.part(tasks[0], 0, key_of(tasks[-1]))
    reader.part(tasks[0], 1, key_of(tasks[-1]))
    again = [reader.part(task, 0).image_ids.tolist() for task in tasks]
    assert again == first[::2] and not reader.held
    fresh = SharedWindows(spec.columns, way.dealing, spec.seed, patience_s=0.05)
    assert [fresh.part(task, 1).image_ids.tolist() for task in tasks] == first[1::2]
    assert len(fresh.held) == len(tasks)  # as it cannot know that the other has had them
    fresh.part(tasks[-1], 0, key_of(tasks[-2]))
    assert not fresh.held


def test_seconds_and_retries_are_counted_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way = Way(2, 4)
    reading, spec = reading_for(way)
    counts = iter([10, 13, 13, 13])
    monkeypatch.setattr(windows, "retries", lambda: next(counts))
    reader = SharedWindows(spec.columns, way.dealing, spec.seed)
    (task,) = reading.tasks(0, 2)
    parts = [reader.part(task, stream) for stream in (0, 1)]
    assert [part.retries for part in parts] == [3, 0]
    pieces = [list(part.portions(4)) for part in parts]
    assert [sum(p.retries for p in some) for some in pieces] == [3, 0]
    assert sum(p.read_s for p in pieces[0]) == pytest.approx(parts[0].read_s)


def test_a_file_that_is_gone_is_named_to_every_stream(files: Path, threads_for_ray: None) -> None:
    way = Way(2, 4)
    reading, _ = reading_for(way)
    gone = [
        replace(task, places=((str(files / "gone.parquet"), 0), *task.places[1:]))
        for task in reading.tasks(0, 2)
    ]
    readers = handles(readers_for(way), ThreadPoolExecutor(4))
    for stream in (0, 1):
        with pytest.raises(DataError, match=r"gone\.parquet"):
            list(parts_of(gone, way.dealing, readers, stream))
