"""The actor beside the driver to which a training run's workers turn: for data, and with messages.

Data comes in segments of steps, of several passes where these are short, so the end of a pass is
nothing special; the next segment is planned while one runs. It is dealt out by streams, each an
actor of its own (`dealer`) near the workers that it serves.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.driver.data_internals import end_split, near
from pipeline.driver.mailbox import Mailbox
from pipeline.plan.streams import Stream, streams_for
from pipeline.stream.dealer import Dealer, DecodeTasks, RunSteps, StreamPart, windows_ahead
from pipeline.stream.dealing import Dealing
from pipeline.stream.reader import Reading, ReadSpec
from pipeline.stream.windows import WindowReader

WAIT_S = 600.0  # for the other workers of a group, and for a segment


@dataclass(frozen=True)
class StreamRun:
    """What the streams of a run are made from.

    Attributes:
        reading: object reference of the `Reading`, in a list.
        read_spec: the same of the `ReadSpec`: in a list the feeder does not load them.
        spec: the same of the `StreamSpec`.
        batch: images of a step.
        chunk: images of a block.
        steps: of the run.
        asked: `resources.streams`.
    """

    reading: list[Any]
    read_spec: list[Any]
    spec: list[Any]
    batch: int
    chunk: int
    steps: RunSteps
    asked: int | Literal["auto"] = "auto"


@dataclass
class Group:
    """A group of workers and its data."""

    group_id: str
    nodes: dict[int, str] = field(default_factory=dict)  # by rank, as they come
    streams: list[Stream] = field(default_factory=list)
    actors: list[Any] = field(default_factory=list)  # dealers and readers
    dealers: list[Any] = field(default_factory=list)
    served: list[Any] = field(default_factory=list)  # when each knows what it serves
    opening: set[int] = field(default_factory=set)  # first steps
    segments: dict[int, tuple[int, list[list[Any]]]] = field(default_factory=dict)
    error: BaseException | None = None  # of planning a segment

    def place(self, rank: int) -> tuple[int, int]:
        """(stream, which of its workers) of a rank."""
        ((index, first),) = (
            (i, s.first) for i, s in enumerate(self.streams) if s.first <= rank < s.last
        )
        return index, rank - first

    def end(self) -> None:
        """Ends its data, so that its decoders give their CPUs back."""
        import ray

        for _, parts in self.segments.values():
            for part in parts:
                end_split(part)  # workers that still hold a part would keep the execution alive
        for actor in self.actors:
            ray.kill(actor)
        self.actors, self.dealers, self.served, self.segments = [], [], [], {}


class Feeder(Mailbox):
    """Hands the streams of a run to its workers.

    `open` plans a segment of steps for a group of workers, which has a `group_id` of its own;
    `iterator` hands a worker its part. As `Mailbox` it also carries messages between driver and
    workers.

    Args:
        run: what the streams are made from.
        tasks: what all decoders together may take.
        workers: that will ask, at most.
    """

    def __init__(self, run: StreamRun, tasks: DecodeTasks, workers: int) -> None:
        super().__init__()
        self.run, self.tasks, self.workers = run, tasks, workers
        self.spare: tuple[str, Any] | None = None  # a node, and the dealer that waits there
        self.ready = threading.Condition()
        self.group = Group("")
        self.replaced: set[str] = set()
        self.early: dict[str, dict[int, str]] = {}  # nodes of workers whose group is not open yet

    def open(self, group_id: str, first_step: int, workers: int) -> None:
        """Plans the segment that starts at `first_step`, unless that is done already.

        Nothing is waited for with the lock held: a node that does not answer must not keep the
        driver from starting another group.
        """
        with self.ready:
            if group_id in self.replaced:
                return  # a late word of a group that is gone
            if group_id != self.group.group_id:  # the worker group is a new one
                self._drop(group_id)
            group = self.group
            if first_step in group.segments or first_step in group.opening:
                return
            if first_step >= self.run.steps.last_step:
                return
            group.opening.add(first_step)
        try:
            self._open(group, first_step, workers)
        except BaseException as error:
            with self.ready:
                group.error = error  # for the workers: nobody waits for this call
                self.ready.notify_all()
            raise

    def _open(self, group: Group, first_step: int, workers: int) -> None:
        import ray

        with self.ready:
            there = self.ready.wait_for(
                lambda: len(group.nodes) == workers or group is not self.group, WAIT_S
            )
            if group is not self.group:
                return
            if not there:
                raise TimeoutError(
                    f"{len(group.nodes)} of {workers} workers asked for data in {WAIT_S:.0f} s"
                )
            if not group.dealers:
                self._launch(group)
            dealers = group.dealers
        ray.get(group.served)
        opened = ray.get([dealer.open.remote(first_step) for dealer in dealers])
        with self.ready:
            if group is not self.group:
                return
            current = {s: v for s, v in group.segments.items() if v[0] >= first_step}
            (last,) = {end for end, _ in opened}
            group.segments = {**current, first_step: (last, [parts for _, parts in opened])}
            group.opening.discard(first_step)
            self.ready.notify_all()

    def release(self, tasks: DecodeTasks | None = None) -> None:
        """Ends the data of the group that is gone or about to go, so that its decoders give their
        CPUs back. Who wants data after that is another group.

        Args:
            tasks: what the decoders of the next group may take; default: as before.
        """
        with self.ready:
            self.tasks = tasks or self.tasks
            self.replaced.update(self.early)  # asked, and went before they opened anything
            self.early = {}
            self._drop("")
        self.request("")

    def prepare(self) -> None:
        """Starts the dealer of the first group where there is one node, and so one stream: what it
        imports is there when the group asks.
        """
        import ray

        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        with self.ready:
            if self.spare is None and len(nodes) == 1 and self.run.asked in ("auto", 1):
                self.spare = nodes[0], self._dealer(nodes[0], self.workers)

    def _dealer(self, node: str, workers: int) -> Any:
        import ray

        actor = ray.remote(Dealer).options(
            num_cpus=0, max_concurrency=2 * workers + 16, **near(node)
        )
        specs = [*self.run.read_spec, *self.run.spec]
        return actor.remote(self.run.reading[0], specs, self.run.steps)

    def _spare_on(self, node: str, streams: int) -> Any:
        """The dealer that waits on a node, for its only stream; ended where it is of no use."""
        import ray

        waiting, self.spare = self.spare, None
        if waiting is None:
            return None
        if waiting[0] == node and streams == 1:
            return waiting[1]
        ray.kill(waiting[1])
        return None

    def _drop(self, group_id: str) -> None:
        """Forgets the group of workers that there is, in favour of another one."""
        if self.group.group_id:
            self.replaced.add(self.group.group_id)
        self.group.end()
        self.group = Group(group_id, self.early.pop(group_id, {}))
        self.ready.notify_all()

    def _launch(self, group: Group) -> None:
        """Starts a group's streams. They reserve nothing, and a node that is gone is no obstacle:
        then they come up elsewhere, until the group itself is replaced.
        """
        import ray

        nodes = [group.nodes[rank] for rank in range(len(group.nodes))]
        group.streams = streams_for(nodes, self.tasks.at_once, self.run.asked)
        bounds = (*(s.first for s in group.streams), len(nodes))
        dealing = Dealing(self.run.batch, self.run.chunk, bounds)
        count = len(group.streams)
        readers: list[Any] = []
        if count > 1:
            # One that is killed starts again, and is asked again: that is no failure of the group.
            # Who waits for room holds a thread, and must leave one to whom the others wait for: all
            # that streams ask for may be here, and be asked for again after a killed read task.
            asked = sum(windows_ahead(s.decoders) for s in group.streams)
            options = dict(max_concurrency=2 * asked + 16, max_restarts=-1, max_task_retries=-1)
            reader = ray.remote(WindowReader)
            readers = [
                reader.options(num_cpus=0, **options, **near(s.node)).remote(
                    self.run.read_spec, dealing, windows_ahead(s.decoders)
                )
                for s in group.streams
            ]
        for index, stream in enumerate(group.streams):
            dealer = self._spare_on(stream.node, count)
            dealer = dealer or self._dealer(stream.node, stream.last - stream.first)
            ahead = windows_ahead(stream.decoders)
            part = StreamPart(dealing, index, stream.node, tuple(readers), ahead)
            tasks = DecodeTasks(self.tasks.cpus, stream.decoders)
            group.dealers.append(dealer)
            group.served.append(dealer.serve.remote(part, tasks))
        group.actors = [*readers, *group.dealers]

    def iterator(
        self, group_id: str, first_step: int, rank: int, node: str = ""
    ) -> tuple[int, Any]:
        """(step after the segment, iterator of this worker's chunks).

        Args:
            group_id: of the worker's group.
            first_step: of the segment.
            rank: of the worker.
            node: id of the node that it is on.
        """
        with self.ready:
            if group_id == self.group.group_id:
                self.group.nodes[rank] = node
            elif group_id not in self.replaced:
                self.early.setdefault(group_id, {})[rank] = node
            self.ready.notify_all()
            opened = self.ready.wait_for(
                lambda: (
                    group_id in self.replaced
                    or self.group.error
                    or (self.group.group_id == group_id and first_step in self.group.segments)
                ),
                timeout=WAIT_S,
            )
            if group_id in self.replaced:
                raise RuntimeError("another group of workers has taken over")
            if self.group.error:
                raise self.group.error
            if not opened:
                raise TimeoutError(f"no data for step {first_step} after {WAIT_S:.0f} s")
            last, parts = self.group.segments[first_step]
            stream, place = self.group.place(rank)
            return last, parts[stream][place]

    def all_decoded(self, group_id: str, first_step: int, timeout_s: float, rank: int = 0) -> bool:
        """Whether every image of a segment that comes in the stream of a worker has been decoded,
        or becomes so in that time.
        """
        import ray

        with self.ready:
            if group_id != self.group.group_id or first_step not in self.group.segments:
                return True
            dealer = self.group.dealers[self.group.place(rank)[0]]
        return bool(ray.get(dealer.all_decoded.remote(first_step, timeout_s)))


def launch_feeder(
    reading: Reading,
    spec: Any,
    steps: RunSteps | int,
    tasks: DecodeTasks,
    workers: int,
    streams: int | Literal["auto"] = "auto",
) -> Any:
    """Starts the feeder on the driver's node, which is the one that is not taken away.

    It reserves nothing there: where others hold all CPUs of that node it would wait for ever.

    Args:
        reading: the shards and their order.
        spec: the run's `stream.StreamSpec`.
        steps: of the run; with the length of a segment in tests that make it small.
        tasks: what its decoders may take.
        workers: training workers that will ask, at most.
        streams: `resources.streams`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Feeder).options(
        num_cpus=0, max_concurrency=2 * workers + 16, scheduling_strategy=here
    )
    run = StreamRun(
        [ray.put(reading)],
        [ray.put(ReadSpec(spec.columns, spec.seed, spec.portion_images))],
        [ray.put(spec)],
        reading.order.global_batch,
        spec.chunk,
        steps if isinstance(steps, RunSteps) else RunSteps(steps),
        streams,
    )
    feeder = actor.remote(run, tasks, workers)
    feeder.prepare.remote()
    return feeder
