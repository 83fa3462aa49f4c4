"""A worker's side of segments: the next one starts while the last chunks of this one are used up.

A segment is one Ray Data execution with decoders of its own, which take seconds to start. They can
only start when the CPUs of the earlier ones are free, that is when everything has been decoded;
what has been decoded and not used yet bridges the gap.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

Block = Any  # a pyarrow table: a chunk is a row
PREFETCH = 2  # chunks that are fetched before they are asked for
_ASK_S = 1.0  # how long a question to the feeder stays open


@dataclass(frozen=True)
class _Segment:
    end: int  # the step after it
    blocks: Iterator[Block]


def blocks(
    feeder: Any, attempt: str, rank: int, workers: int, first_step: int, last_step: int
) -> Iterator[Block]:
    """This worker's blocks from `first_step` to `last_step` (out), over all segments between.

    Reading and decoding begin with this call, not with the first block that is asked for.

    Args:
        feeder: the run's `feeder.Feeder`.
        attempt: names the group of workers; a new group has a new one.
        rank: of this worker.
        workers: of the group.
        first_step: of the run that is wanted.
        last_step: of the run.

    Raises:
        ray.exceptions.RayError: the feeder or an execution is gone.
    """
    if first_step >= last_step:
        return iter(())
    opening = _Ahead(feeder, attempt, rank, workers, None, first_step)
    return _blocks(opening, feeder, attempt, rank, workers, first_step, last_step)


def _blocks(
    opening: _Ahead,
    feeder: Any,
    attempt: str,
    rank: int,
    workers: int,
    begin: int,
    last_step: int,
) -> Iterator[Block]:
    while True:
        segment, ahead = opening.result(), None
        if segment.end < last_step:
            ahead = _Ahead(feeder, attempt, rank, workers, begin, segment.end)
        try:
            yield from segment.blocks
        except BaseException:  # the end of the generator too
            if ahead:
                ahead.cancel()
            raise
        if ahead is None:
            return
        begin, opening = segment.end, ahead


def _open(feeder: Any, attempt: str, rank: int, workers: int, step: int) -> _Segment:
    """Returns when the segment has given its first block."""
    import ray

    if rank == 0:
        feeder.open.remote(attempt, step, workers)
    end, part = ray.get(feeder.iterator.remote(attempt, step, rank))
    if rank == 0:
        feeder.open.remote(attempt, end, workers)  # planned; the first question for data starts it
    found = iter(
        part.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=PREFETCH)
    )
    first = next(found, None)
    return _Segment(end, iter(()) if first is None else chain([first], found))


class _Ahead:
    """Opens a segment in a thread, when the one before it (if any) is decoded or used up."""

    def __init__(
        self, feeder: Any, attempt: str, rank: int, workers: int, begin: int | None, step: int
    ) -> None:
        self._used_up, self._cancelled = threading.Event(), threading.Event()
        self._segment: _Segment | None = None
        self._error: BaseException | None = None

        def run() -> None:
            import ray

            try:
                while begin is not None and not self._used_up.is_set():
                    if ray.get(feeder.all_decoded.remote(attempt, begin, _ASK_S)):
                        break
                if not self._cancelled.is_set():
                    self._segment = _open(feeder, attempt, rank, workers, step)
            except BaseException as error:  # handed on by `result`
                self._error = error
            if self._cancelled.is_set():
                self._segment = None

        # A daemon: a worker that ends must not wait for a segment that it will not use.
        self._thread = threading.Thread(target=run, name="next-segment", daemon=True)
        self._thread.start()

    def result(self) -> _Segment:
        """The segment; waits for it."""
        self._used_up.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._segment is not None
        return self._segment

    def cancel(self) -> None:
        """It is not wanted any more; the thread ends with its next answer."""
        self._cancelled.set()
        self._used_up.set()
