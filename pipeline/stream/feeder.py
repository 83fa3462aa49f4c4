"""The actor beside the driver that owns the data sets of a training run.

It serves segments of steps, of several passes where these are short, so the end of a pass is
nothing special, and plans the next segment while one runs. It loads no torch: decode tasks do.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.driver.mailbox import Mailbox
from pipeline.driver.ray_internals import end_split, pace_data
from pipeline.plan.nodes import READ_CPUS
from pipeline.stream.reader import EncodedImages, Reading, ReadTask, read_portions

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


def reads_at_once(decoders: int) -> int:
    """Read tasks for so many decoders."""
    return 1 + decoders // DECODERS_PER_READ


@dataclass
class Decoded:
    """What has been decoded of a segment; a portion that is done twice counts once."""

    images: int = 0
    places: set[tuple[int, int]] = field(default_factory=set)

    def note(self, place: tuple[int, int], images: int) -> None:
        """The portion at (pass, position) is done."""
        if place not in self.places:
            self.places.add(place)
            self.images += images


class _Read:
    """From the steps of a read task to its portions; the spec travels once, by the object store."""

    def __init__(self, feeder: Any, spec: Any) -> None:
        self.feeder, self.spec = feeder, spec

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        import ray

        spec = ray.get(self.spec)
        for row in table.to_pylist():
            tasks = ray.get(self.feeder.read_tasks.remote(row["first"], row["last"]))
            for portion in read_portions(tasks, spec.columns, spec.seed, spec.portion_images):
                yield portion.table()


class _Decode:
    """From a portion to its chunks. An actor: it has its imports done, and its next portion."""

    def __init__(self, feeder: Any, spec: list[Any], group_id: str, first_step: int) -> None:
        import ray
        import torch

        import pipeline.stream.decoder  # noqa: F401  (all imports are done when this ends)

        torch.set_num_threads(1)  # decoders run side by side, one core each
        # Ray collects garbage in all its processes when a store fills; that took 0.3 s here, nearly
        # all of it for what the imports made.
        gc.collect()
        gc.freeze()
        self.spec = ray.get(spec[0])
        self.feeder, self.segment = feeder, (group_id, first_step)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        from pipeline.stream.decoder import chunk_table, make_chunks

        for row in range(table.num_rows):
            portion = EncodedImages.of(table, row)
            for chunk in make_chunks(portion, self.spec):
                yield chunk_table(chunk)
            place = portion.pass_index, portion.start
            self.feeder.note_decoded.remote(*self.segment, place, len(portion))


class Feeder(Mailbox):
    """Plans the data of a run.

    `open` plans a segment of steps for a group of workers, which has a `group_id` of its own;
    `iterator` hands a worker its part. As `Mailbox` it also carries messages between driver and
    workers.

    Args:
        reading: the shards and which of their rows make up which step.
        spec: object reference of a `stream.StreamSpec`, passed on to the read tasks as it is.
        last_step: steps of the run.
        tasks: what its decoders may take.
        segment: read tasks of one Ray Data execution.
    """

    def __init__(
        self,
        reading: Reading,
        spec: list[Any],
        last_step: int,
        tasks: DecodeTasks,
        segment: int = SEGMENT,
    ) -> None:
        super().__init__()
        from ray.data import DataContext

        from pipeline.driver.cluster import quiet_environment

        quiet_environment()
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = True
        context.target_max_block_size = 1  # one chunk, one block: see stream's docstring
        context.memory_usage_poll_interval_s = None  # a thread for each portion
        pace_data(context, AHEAD, BUFFER)
        context.issue_detectors_config.detectors = []  # they run in every turn of the loop
        self.reading, self.last_step, self.tasks = reading, last_step, tasks
        self.spec, self.segment = spec[0], segment
        self.ready, self.planning = threading.Condition(), threading.Lock()
        self.group_id = ""
        self.replaced: set[str] = set()
        self.segments: dict[int, tuple[int, list[Any]]] = {}
        self.decoded: dict[int, Decoded] = {}

    def open(self, group_id: str, first_step: int, workers: int) -> None:
        """Plans the segment that starts at `first_step`, unless that is done already."""
        with self.ready:
            if group_id in self.replaced:
                return  # a late word of a group that is gone
            if group_id != self.group_id:  # the worker group is a new one: drop the old one's data
                self._drop(group_id)
            if first_step in self.segments or first_step >= self.last_step:
                return
            last = self._segment_end(first_step)
            dataset = self._dataset(group_id, first_step, last)
            parts = dataset.streaming_split(workers, equal=False)
            current = {s: v for s, v in self.segments.items() if v[0] >= first_step}
            self.segments = current | {first_step: (last, parts)}
            self.decoded = {s: self.decoded.get(s, Decoded()) for s in self.segments}
            self.ready.notify_all()

    def release(self, tasks: DecodeTasks | None = None) -> None:
        """Ends the data of the group that is gone or about to go, so that its decoders give their
        CPUs back. Who wants data after that is another group.

        Args:
            tasks: what the decoders of the next group may take; default: as before.
        """
        with self.ready:
            self.tasks = tasks or self.tasks
            self._drop("")
        self.request("")

    def _drop(self, group_id: str) -> None:
        """Forgets the group of workers that there is, in favour of another one."""
        if self.group_id:
            self.replaced.add(self.group_id)
        for _, parts in self.segments.values():
            end_split(parts)  # workers that still hold a part would keep the execution alive
        self.group_id, self.segments, self.decoded = group_id, {}, {}
        self.ready.notify_all()

    def iterator(self, group_id: str, first_step: int, rank: int) -> tuple[int, Any]:
        """(step after the segment, iterator of this worker's chunks)."""
        with self.ready:
            opened = self.ready.wait_for(
                lambda: (
                    group_id in self.replaced
                    or (self.group_id == group_id and first_step in self.segments)
                ),
                timeout=600,
            )
            if group_id in self.replaced:
                raise RuntimeError("another group of workers has taken over")
            if not opened:
                raise TimeoutError(f"no data for step {first_step} after 600 s")
            last, parts = self.segments[first_step]
            return last, parts[rank]

    def note_decoded(
        self, group_id: str, first_step: int, place: tuple[int, int], images: int
    ) -> None:
        """A decoder has finished the portion at a place; one that is repeated counts once."""
        with self.ready:
            if group_id == self.group_id and first_step in self.decoded:
                self.decoded[first_step].note(place, images)
                self.ready.notify_all()

    def all_decoded(self, group_id: str, first_step: int, timeout_s: float) -> bool:
        """Whether every image of a segment has been decoded, or becomes so in that time."""

        def done() -> bool:
            if group_id != self.group_id or first_step not in self.segments:
                return True
            steps = self.segments[first_step][0] - first_step
            images = steps * self.reading.order.global_batch
            return self.decoded[first_step].images >= images

        with self.ready:
            return self.ready.wait_for(done, timeout_s)

    def read_tasks(self, first_step: int, last_step: int) -> list[ReadTask]:
        """What a read task reads; asked for when it runs, so that nothing is planned ahead."""
        with self.planning:
            return self.reading.tasks(first_step, last_step)

    @property
    def _steps_per_read(self) -> int:
        """Steps of one read task."""
        order = self.reading.order
        return max(1, READ_WINDOWS * order.window // order.global_batch)

    def _segment_end(self, first_step: int) -> int:
        return min(self.last_step, first_step + self.segment * self._steps_per_read)

    def _dataset(self, group_id: str, first_step: int, last_step: int) -> Any:
        import ray

        starts = range(first_step, last_step, self._steps_per_read)
        rows = [{"first": a, "last": min(a + self._steps_per_read, last_step)} for a in starts]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        me = ray.get_runtime_context().current_actor
        common = {"batch_size": None, "batch_format": "pyarrow"}
        # Of a fixed size: a pool that may shrink does so in the first quiet moment, and half of
        # the decoders are then gone for the rest of the run.
        pool = ray.data.ActorPoolStrategy(
            size=self.tasks.at_once, max_tasks_in_flight_per_actor=IN_FLIGHT
        )
        reads = reads_at_once(self.tasks.at_once)
        return dataset.map_batches(
            _Read(me, self.spec), **common, num_cpus=READ_CPUS / reads, concurrency=reads
        ).map_batches(
            _Decode,
            fn_constructor_args=(me, [self.spec], group_id, first_step),
            compute=pool,
            **common,
            num_cpus=self.tasks.cpus,
        )


def launch_feeder(
    reading: Reading,
    spec: Any,
    last_step: int,
    tasks: DecodeTasks,
    workers: int,
    segment: int = SEGMENT,
) -> Any:
    """Starts the feeder on the driver's node, which is the one that is not taken away.

    It reserves nothing there: where others hold all CPUs of that node it would wait for ever.

    Args:
        reading: the shards and their order.
        spec: the run's `stream.StreamSpec`.
        last_step: steps of the run.
        tasks: what its decoders may take.
        workers: training workers that will ask, at most.
        segment: read tasks of one Ray Data execution; tests make it small.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Feeder).options(
        num_cpus=0, max_concurrency=2 * workers + 16, scheduling_strategy=here
    )
    # In a list the reference stays a reference: the feeder has no use for the spec itself.
    return actor.remote(reading, [ray.put(spec)], last_step, tasks, segment)
