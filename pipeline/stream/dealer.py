"""One stream of data: its Ray Data executions, one for each segment of steps.

A `Dealer` is an actor on the node of the workers that it serves (`plan.streams`), and so is what it
starts: the coordinator of an execution, which deals the blocks, the read task and the decoders. So
crops, which are many times larger than the images that they are cut from, stay on that node.
It loads no torch: decoders do.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.driver.data_internals import Limits, near, pace_data
from pipeline.plan.nodes import READ_CPUS
from pipeline.stream.dealing import Dealing
from pipeline.stream.reader import EncodedImages, Reading, ReadSpec, ReadTask, read_portions
from pipeline.stream.windows import parts_of

READ_WINDOWS = 16  # of the order in one read task
# Read tasks of one Ray Data execution; each costs a millisecond before the first one starts.
SEGMENT = 2000
# One read task feeds so many decoders; it reads some 10,000 photos a second. What a second one
# reads waits for its turn, up to a whole task, so there is one only where the first is too slow.
DECODERS_PER_READ = 24
AHEAD = 1.0  # encoded bytes that wait for decoders, of those that they have been given
BUFFER = 4  # blocks of a task that wait to be noticed: a turn's work
IN_FLIGHT = 2  # portions at a decoder: the next one is there when it has finished one


@dataclass(frozen=True)
class DecodeTasks:
    """CPUs that a decoder takes, and how many run at once."""

    cpus: float = 1.0
    at_once: int = 1


@dataclass(frozen=True)
class RunSteps:
    """How long a run is, and a segment of it."""

    last_step: int  # out
    segment: int = SEGMENT  # read tasks of one Ray Data execution


def reads_at_once(decoders: int) -> int:
    """Read tasks for so many decoders."""
    return 1 + decoders // DECODERS_PER_READ


def windows_ahead(decoders: int) -> int:
    """Windows that the reader of a stream with so many decoders holds: what storage that is far
    away gives in time grows with what is asked for at once.
    """
    return 1 + reads_at_once(decoders)


@dataclass
class Decoded:
    """What is still to be decoded of a segment; a portion that is done twice counts once."""

    last: int  # step, out
    missing: int  # images
    places: set[tuple[int, int]] = field(default_factory=set)

    def note(self, place: tuple[int, int], images: int) -> None:
        """The portion at (pass, position) is done."""
        if place not in self.places:
            self.places.add(place)
            self.missing -= images


@dataclass(frozen=True)
class StreamPart:
    """What one of several streams takes of every window, and from whom."""

    dealing: Dealing
    stream: int  # its number
    node: str  # id of the node that it runs on, if it may
    readers: tuple[Any, ...] = ()  # `WindowReader`s of all streams; none where there is one stream
    ahead: int = 0  # parts of windows that it asks for

    @property
    def workers(self) -> int:
        """That it serves."""
        return self.dealing.workers(self.stream)


class _Read:
    """From the steps of a read task to its portions; the spec travels once, by the object store."""

    def __init__(self, dealer: Any, spec: Any, part: StreamPart) -> None:
        self.dealer, self.spec, self.part = dealer, spec, part

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        import ray

        spec: ReadSpec = ray.get(self.spec)
        for row in table.to_pylist():
            tasks = ray.get(self.dealer.read_tasks.remote(row["first"], row["last"]))
            if not self.part.readers:
                for portion in read_portions(tasks, spec.columns, spec.seed, spec.portion_images):
                    yield portion.table()
                continue
            part = self.part
            for images in parts_of(tasks, part.dealing, part.readers, part.stream, part.ahead):
                for portion in images.portions(spec.portion_images):
                    yield portion.table()


class _Decode:
    """From a portion to its chunks. An actor: it has its imports done, and its next portion."""

    def __init__(self, dealer: Any, spec: list[Any], first_step: int) -> None:
        import ray
        import torch

        import pipeline.stream.decoder  # noqa: F401  (all imports are done when this ends)

        torch.set_num_threads(1)  # decoders run side by side, one core each
        # Ray collects garbage in all its processes when a store fills; that took 0.3 s here, nearly
        # all of it for what the imports made.
        gc.collect()
        gc.freeze()
        self.spec = ray.get(spec[0])
        self.dealer, self.first_step = dealer, first_step

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        from pipeline.stream.decoder import chunk_table, make_chunks

        for row in range(table.num_rows):
            portion = EncodedImages.of(table, row)
            for chunk in make_chunks(portion, self.spec):
                yield chunk_table(chunk)
            place = portion.pass_index, portion.start
            self.dealer.note_decoded.remote(self.first_step, place, len(portion))


class Dealer:
    """Plans the data of one stream, for one group of workers.

    Args:
        reading: the shards and which of their rows make up which step.
        specs: object references of a `ReadSpec` and a `StreamSpec`, passed on as they are.
        run: what is the same for all streams of a run.
    """

    def __init__(self, reading: Reading, specs: list[Any], run: RunSteps) -> None:
        from ray.data import DataContext

        from pipeline.driver.cluster import quiet_environment

        quiet_environment()
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = True
        context.target_max_block_size = 1  # one chunk, one block: see stream's docstring
        context.memory_usage_poll_interval_s = None  # a thread for each portion
        context.issue_detectors_config.detectors = []  # they run in every turn of the loop
        self.context = context
        self.reading, self.run = reading, run
        self.read_spec, self.spec = specs
        self.ready, self.planning = threading.Condition(), threading.Lock()
        self.decoded: dict[int, Decoded] = {}

    def serve(self, part: StreamPart, tasks: DecodeTasks) -> None:
        """Says what it takes of the windows, and what its decoders may take; before `open`."""
        self.part, self.tasks = part, tasks
        streams = part.dealing.streams
        cpus = tasks.at_once * tasks.cpus + READ_CPUS
        limits = Limits(cpus, streams) if streams > 1 else None
        pace_data(self.context, AHEAD, BUFFER, limits)

    def open(self, first_step: int) -> tuple[int, list[Any]]:
        """Plans the segment that starts at `first_step`.

        Returns:
            The step after it, and for each worker the iterator of its chunks.
        """
        length = self.run.segment * self._steps_per_read
        last = min(self.run.last_step, first_step + length)
        dataset = self._dataset(first_step, last)
        parts = dataset.streaming_split(self.part.workers, equal=False)
        images = self.part.dealing.images(self.part.stream, last - first_step)
        with self.ready:
            # The one before is still in work: it is opened while that one begins.
            current = {s: d for s, d in self.decoded.items() if d.last >= first_step}
            self.decoded = {**current, first_step: Decoded(last, images)}
        return last, parts

    def note_decoded(self, first_step: int, place: tuple[int, int], images: int) -> None:
        """A decoder has finished the portion at a place; one that is repeated counts once."""
        with self.ready:
            if first_step in self.decoded:
                self.decoded[first_step].note(place, images)
                self.ready.notify_all()

    def all_decoded(self, first_step: int, timeout_s: float) -> bool:
        """Whether every image of a segment has been decoded, or becomes so in that time."""

        def done() -> bool:
            return first_step not in self.decoded or self.decoded[first_step].missing <= 0

        with self.ready:
            return self.ready.wait_for(done, timeout_s)

    def read_tasks(self, first_step: int, last_step: int) -> list[ReadTask]:
        """What a read task reads; asked for when it runs, so that nothing is planned ahead."""
        with self.planning:
            return self.reading.tasks(first_step, last_step)

    @property
    def _steps_per_read(self) -> int:
        """Steps of one read task: of several streams, each takes a part of its windows."""
        order, streams = self.reading.order, self.part.dealing.streams
        return max(1, READ_WINDOWS * streams * order.window // order.global_batch)

    def _dataset(self, first_step: int, last_step: int) -> Any:
        import ray

        starts = range(first_step, last_step, self._steps_per_read)
        rows = [{"first": a, "last": min(a + self._steps_per_read, last_step)} for a in starts]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        me = ray.get_runtime_context().current_actor
        common: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
        common["ray_remote_args_fn"] = partial(near, self.part.node)
        # Of a fixed size: a pool that may shrink does so in the first quiet moment, and half of
        # the decoders are then gone for the rest of the run.
        pool = ray.data.ActorPoolStrategy(
            size=self.tasks.at_once, max_tasks_in_flight_per_actor=IN_FLIGHT
        )
        # Streams that share windows ask for them in order, so each has one read task.
        reads = 1 if self.part.readers else reads_at_once(self.tasks.at_once)
        # All streams may be on one node.
        cpus = READ_CPUS / reads / self.part.dealing.streams
        return dataset.map_batches(
            _Read(me, self.read_spec, self.part), **common, num_cpus=cpus, concurrency=reads
        ).map_batches(
            _Decode,
            fn_constructor_args=(me, [self.spec], first_step),
            compute=pool,
            **common,
            num_cpus=self.tasks.cpus,
        )
