"""The actor beside the driver that owns the data sets of a training run.

It serves stretches of steps ("segments", several passes where they are short), so the end of a pass
is nothing special, and plans the next segment while one runs. It loads no torch: the read tasks do.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.control import Control
from pipeline.data.order import Piece, ReadingOrder

SEGMENT_PIECES = 4000  # read tasks of one Ray Data execution; its bookkeeping stays small


@dataclass(frozen=True)
class DecodeTasks:
    """CPUs that a read task takes, and how many run at once (None: what the free CPUs allow)."""

    cpus: float = 1.0
    at_once: int | None = None


class _ReadPieces:
    """The map function of the data set; the spec travels once, through the object store."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def __call__(self, table: pa.Table) -> Iterator[dict[str, np.ndarray]]:
        import ray
        import torch

        from pipeline.data.stream import read_piece

        torch.set_num_threads(1)  # tasks run side by side, one core each
        spec = ray.get(self.spec)
        for blob in table.column("piece").to_pylist():
            for chunk in read_piece(pickle.loads(blob), spec):
                yield {name: values[None] for name, values in chunk.items()}


class _Pace:
    """Slows Ray Data's scheduling loop to a pace that chunks need.

    While a read task waits for room, its next block counts as ready, so the loop's wait returns at
    once and the loop takes 60 % of a core for nothing (Ray 2.60, seen in a profile). Each turn
    handles all that is ready, so 50 turns a second are plenty.
    """

    TURN_S = 0.02

    def before_execution_starts(self, executor: Any) -> None: ...

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(self.TURN_S)

    def after_execution_succeeds(self, executor: Any) -> None: ...

    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...


class Feeder(Control):
    """Plans the data of a run.

    `open` plans a segment of steps for a group of workers (an `attempt`), `iterator` hands a worker
    its part. As `Control` it also carries messages between driver and workers.

    Args:
        order: which rows make up which step.
        spec: object reference of a `stream.StreamSpec`, passed on to the read tasks as it is.
        last_step: steps of the run.
        tasks: what its read tasks may take.
    """

    def __init__(
        self, order: ReadingOrder, spec: list[Any], last_step: int, tasks: DecodeTasks
    ) -> None:
        super().__init__()
        from ray.data import DataContext

        from pipeline.cluster import quiet_environment

        quiet_environment()
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = True
        context.target_max_block_size = 1  # one chunk, one block: see stream's docstring
        context.custom_execution_callback_classes.append(_Pace)
        self.order, self.last_step, self.tasks = order, last_step, tasks
        self.spec = spec[0]
        self.ready = threading.Condition()
        self.attempt = ""
        self.segments: dict[int, tuple[int, list[Any]]] = {}

    def open(self, attempt: str, first_step: int, workers: int) -> None:
        """Plans the segment that starts at `first_step`, unless that is done already."""
        with self.ready:
            if attempt != self.attempt:  # the worker group is a new one: drop the old one's data
                self.attempt, self.segments = attempt, {}
            if first_step in self.segments or first_step >= self.last_step:
                return
            last = self._segment_end(first_step)
            dataset = self._dataset(self.order.pieces(first_step, last))
            parts = dataset.streaming_split(workers, equal=False)
            current = {s: v for s, v in self.segments.items() if v[0] >= first_step}
            self.segments = current | {first_step: (last, parts)}
            self.ready.notify_all()

    def iterator(self, attempt: str, first_step: int, rank: int) -> tuple[int, Any]:
        """(step after the segment, iterator of this worker's chunks)."""
        with self.ready:
            opened = self.ready.wait_for(
                lambda: self.attempt == attempt and first_step in self.segments, timeout=600
            )
            if not opened:
                raise TimeoutError(f"no data for step {first_step} after 600 s")
            last, parts = self.segments[first_step]
            return last, parts[rank]

    def _segment_end(self, first_step: int) -> int:
        order = self.order
        steps = max(order.steps_per_pass, SEGMENT_PIECES * order.piece // order.global_batch)
        return min(self.last_step, first_step + steps)

    def _dataset(self, pieces: list[Piece]) -> Any:
        import ray

        rows = [{"piece": pickle.dumps(piece)} for piece in pieces]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        limits: dict[str, Any] = {"concurrency": self.tasks.at_once} if self.tasks.at_once else {}
        return dataset.map_batches(
            _ReadPieces(self.spec),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=self.tasks.cpus,
            **limits,
        )


def launch_feeder(spec: Any, last_step: int, tasks: DecodeTasks, workers: int) -> Any:
    """Starts the feeder on the driver's node, which is the one that is not taken away.

    Args:
        spec: the run's `stream.StreamSpec`.
        last_step: steps of the run.
        tasks: what its read tasks may take.
        workers: training workers that will ask.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Feeder).options(
        num_cpus=0, max_concurrency=workers + 8, scheduling_strategy=here
    )
    # In a list the reference stays a reference: the feeder has no use for the spec itself.
    return actor.remote(spec.order, [ray.put(spec)], last_step, tasks)
