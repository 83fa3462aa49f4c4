"""Sample accounting through real Ray Data: no image twice and none lost, whatever is killed.

Each run is compared, byte for byte, with the same stream made without Ray in this process.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from pipeline.shards.shards import ShardColumns
from pipeline.stream.dealer import DecodeTasks, RunSteps
from pipeline.stream.decoder import StreamSpec, make_chunks
from pipeline.stream.feeder import launch_feeder
from pipeline.stream.reader import read_portions
from pipeline.stream.worker import StreamRequest, batches
from pipeline.views.batch import Batch
from tests.stream.test_stream import BATCH, CHUNK, Source, source

assert source  # the fixture: the same small hub set
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests

pytestmark = pytest.mark.timeout(900)  # seconds; ten each where nobody else works

STEPS = 40  # eight passes; with segments of one read task: 16 + 16 + 8 steps
Step = dict[str, tuple[bytes, ...]]  # image id: its arrays
FIELDS = ("global_crops", "local_crops", "photometric", "masks", "labels")


def images(batch: Batch) -> Step:
    """Each image of a batch; bad ones under their id alone."""
    rows = {
        bytes(batch.image_ids[i].numpy()).hex(): tuple(
            getattr(batch, name)[i].numpy().tobytes() for name in FIELDS
        )
        for i in range(batch.images)
    }
    return rows | {name: () for name, _, _ in batch.bad}


@pytest.fixture(scope="module")
def expected(source: Source) -> list[Step]:
    """Every step of the undisturbed stream, without Ray."""
    reading, spec = source
    batches = [
        Batch.from_chunk(chunk)
        for portion in read_portions(
            reading.tasks(0, STEPS), spec.columns, spec.seed, spec.portion_images
        )
        for chunk in make_chunks(portion, spec)
    ]
    per_step = BATCH // CHUNK
    steps = [batches[n : n + per_step] for n in range(0, len(batches), per_step)]
    return [{k: v for batch in step for k, v in images(batch).items()} for step in steps]


@ray.remote(num_cpus=0)
class Reader:
    """A training worker that only looks at its batches."""

    def __init__(self, feeder: Any, group_id: str, rank: int, workers: int, first: int) -> None:
        torch.set_num_threads(1)
        self.batches: Iterator[Batch] = batches(
            StreamRequest(feeder, group_id, rank, workers, first, STEPS), BATCH // workers, CHUNK
        )

    def take(self, steps: int) -> list[Step]:
        return [images(batch) for batch in islice(self.batches, steps)]

    def pid(self) -> int:
        return os.getpid()


def group(feeder: Any, group_id: str, workers: int, first: int = 0) -> list[Any]:
    return [Reader.remote(feeder, group_id, rank, workers, first) for rank in range(workers)]


def take(readers: list[Any], steps: int) -> list[Step]:
    """The next steps of a group of workers, each put together from their parts."""
    parts = ray.get([reader.take.remote(steps) for reader in readers], timeout=600)
    joined = []
    for step in zip(*parts, strict=True):
        assert len(set().union(*step)) == sum(map(len, step))  # no image at two workers
        joined.append({name: arrays for part in step for name, arrays in part.items()})
    return joined


def end(*actors: Any) -> None:
    for actor in actors:
        ray.kill(actor)


def feeder_of(source: Source, segment: int = 2000, streams: int = 1) -> Any:
    tasks = DecodeTasks(0.8 / streams, streams)
    return launch_feeder(*source, RunSteps(STEPS, segment), tasks, 3, streams)


def test_a_stopped_run_goes_on_with_other_workers_over_segment_ends(
    ray_cluster: None, source: Source, expected: list[Step]
) -> None:
    """Stopped after 14 steps by two workers, ended by three: 16 and 32 are segment ends."""
    first = feeder_of(source, segment=1)
    workers = group(first, "a", 2)
    steps = take(workers, 14)
    end(*workers, first)
    second = feeder_of(source, segment=1)
    workers = group(second, "b", 3, first=14)
    steps += take(workers, 5)  # 19: in the middle of a segment that began at 14
    steps += take(workers, STEPS - 19)
    assert take(workers, 1) == []
    end(*workers, second)
    assert steps == expected
    per_pass = source[1].steps_per_pass
    for begin in range(0, STEPS, per_pass):
        names = [name for step in steps[begin : begin + per_pass] for name in step]
        assert len(names) == len(set(names)) == per_pass * BATCH


def test_several_streams_give_the_same_steps(
    ray_cluster: None, source: Source, expected: list[Step]
) -> None:
    """Two for two workers, then two for three, on one feeder; 37 is a segment end."""
    feeder = feeder_of(source, segment=1, streams=2)
    workers = group(feeder, "a", 2)
    steps = take(workers, 19)
    end(*workers)
    workers = group(feeder, "b", 3, first=5)
    steps[5:] = take(workers, STEPS - 5)
    assert take(workers, 1) == []
    end(*workers, feeder)
    assert steps == expected


@pytest.mark.slow
def test_a_killed_worker_and_a_new_group_on_the_same_feeder(
    ray_cluster: None, source: Source, expected: list[Step]
) -> None:
    """What Ray Train does: the whole group ends with the one, and starts at the checkpoint."""
    feeder = feeder_of(source, segment=1)
    workers = group(feeder, "a", 2)
    steps = take(workers, 13)
    os.kill(ray.get(workers[1].pid.remote()), signal.SIGKILL)
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(workers[1].take.remote(1))
    end(workers[0])
    workers = group(feeder, "b", 2, first=10)
    steps[10:] = take(workers, STEPS - 10)
    end(*workers, feeder)
    assert steps == expected


def deadly(source: Source, where: str, calls: int, folder: Path) -> Source:
    """The source, but the process that makes one of its calls is killed at it, once.

    The classes are local, so that cloudpickle sends them by value and no worker must import them.
    """
    reading, spec = source
    counter, mark = folder / "calls", folder / "killed"

    def strike() -> None:
        import os
        import signal

        with counter.open("ab") as file:
            file.write(b".")
        if counter.stat().st_size >= calls:
            try:
                mark.touch(exist_ok=False)
            except FileExistsError:
                return
            mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)

    if where == "decode":
        crops = spec.crops

        class Crops(type(crops)):  # type: ignore[misc]
            @property
            def draws(self) -> int:  # asked once a chunk, in the decoder alone
                strike()
                return super().draws

        values = {name: getattr(crops, name) for name in crops.__dataclass_fields__}
        return reading, replace(spec, crops=Crops(**values))

    class Columns(ShardColumns):
        @property
        def image(self) -> str:  # asked for each row group, where it is read
            strike()
            return "image"

        @image.setter
        def image(self, value: str) -> None: ...

    class Spec(StreamSpec):
        @property
        def columns(self) -> Any:
            return shard_columns

        @columns.setter
        def columns(self, value: Any) -> None: ...

    shard_columns = object.__new__(Columns)
    for name in ("uri", "label"):
        object.__setattr__(shard_columns, name, getattr(spec.columns, name))
    values = {name: getattr(spec, name) for name in spec.__dataclass_fields__ if name != "columns"}
    deadly_spec = object.__new__(Spec)
    for name, value in values.items():
        object.__setattr__(deadly_spec, name, value)
    return reading, deadly_spec


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "calls", "streams"),
    [("decode", 50, 1), ("read", 70, 1), ("decode", 50, 2), ("read", 70, 2)],
)
def test_a_killed_process_of_the_stream_is_replaced(
    where: str,
    calls: int,
    streams: int,
    ray_cluster: None,
    source: Source,
    expected: list[Step],
    tmp_path: Path,
) -> None:
    """In the middle: some of its results have been handed on already. Of several streams it is the
    reader of the windows that is killed.
    """
    feeder = feeder_of(deadly(source, where, calls, tmp_path), streams=streams)
    workers = group(feeder, "a", 2)
    steps = take(workers, STEPS)
    end(*workers, feeder)
    assert (tmp_path / "killed").read_text().isdigit()
    assert (tmp_path / "calls").stat().st_size > calls  # and somebody went on
    assert steps == expected
