"""A worker's side of the stream: its micro batches, over all segments.

A segment is one Ray Data execution with decoders of its own, which take seconds to start. They can
only start when the CPUs of the earlier ones are free, that is when everything has been decoded;
what has been decoded and not used yet bridges the gap. So the next segment starts while the last
chunks of this one are used up.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pipeline.stream.decoder import chunks_in
from pipeline.views.batch import Batch

Block = Any  # a pyarrow table: a chunk is a row
PREFETCH = 2  # chunks that are fetched before they are asked for
_ASK_S = 1.0  # how long a question to the feeder stays open


@dataclass(frozen=True)
class StreamRequest:
    """Which steps a worker wants from the feeder, and as whom."""

    feeder: Any  # handle of the run's `feeder.Feeder`
    group_id: str  # of the group of workers; a new group has a new one, and the feeder starts anew
    rank: int  # of this worker
    workers: int  # in the group
    first_step: int  # of the run, or of what is left of it
    last_step: int  # out: the steps of the run


def batches(
    request: StreamRequest,
    micro_batch: int,
    chunk: int,
    accumulation: int = 1,
    pin: bool = False,
) -> Iterator[Batch]:
    """This worker's micro batches from the first step on, in order, host side.

    Micro batch j of worker r is the one that worker r + j * workers would have if there were one
    for each micro batch: which images it has does not depend on the number of workers.

    Reading and decoding begin with this call, not with the first batch that is asked for.

    Args:
        request: the steps.
        micro_batch: images of one batch.
        chunk: images of one block; divides `micro_batch`.
        accumulation: micro batches of a step.
        pin: put batches into page-locked memory, for a GPU.

    Raises:
        ray.exceptions.RayError: the feeder or an execution is gone.
    """
    if request.first_step >= request.last_step:
        return iter(())
    opening = _Ahead(request, request.first_step, after=None)
    return _micro_batches(_blocks(request, opening), micro_batch // chunk, accumulation, pin)


def _micro_batches(
    blocks: Iterator[Block], chunks: int, accumulation: int, pin: bool
) -> Iterator[Batch]:
    """Chunk k of a worker's step belongs to micro batch k mod accumulation.

    Chunk c of a step comes to worker c mod W. With W * accumulation workers it would come to worker
    c mod (W * accumulation), and this is that one's batch.
    """
    step: list[list[Batch]] = [[] for _ in range(accumulation)]
    arrived = 0
    for block in blocks:
        for chunk in chunks_in(block):
            parts = step[arrived % accumulation]
            last = len(parts) + 1 == chunks
            parts.append(Batch.from_chunk(chunk))
            arrived += 1
            if arrived % accumulation == 0 and last:
                yield from (Batch.concat(parts, pin) for parts in step)
                step = [[] for _ in range(accumulation)]


@dataclass(frozen=True)
class _Segment:
    end: int  # the step after it
    blocks: Iterator[Block]


def _blocks(request: StreamRequest, opening: _Ahead) -> Iterator[Block]:
    """This worker's blocks of the segment that is `opening` and of all that follow."""
    begin = request.first_step
    while True:
        segment, ahead = opening.result(), None
        if segment.end < request.last_step:
            ahead = _Ahead(request, segment.end, after=begin)
        try:
            yield from segment.blocks
        except BaseException:  # the end of the generator too
            if ahead:
                ahead.cancel()
            raise
        if ahead is None:
            return
        begin, opening = segment.end, ahead


def _open(request: StreamRequest, step: int) -> _Segment:
    """Returns when the segment that begins at a step has given its first block."""
    import ray

    feeder, group_id = request.feeder, request.group_id
    if request.rank == 0:
        feeder.open.remote(group_id, step, request.workers)
    node = ray.get_runtime_context().get_node_id()
    end, part = ray.get(feeder.iterator.remote(group_id, step, request.rank, node))
    if request.rank == 0:
        # planned; the first question for data starts it
        feeder.open.remote(group_id, end, request.workers)
    blocks = iter(
        part.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=PREFETCH)
    )
    first = next(blocks, None)
    return _Segment(end, iter(()) if first is None else chain([first], blocks))


class _Ahead:
    """Opens the segment that begins at `step`, in a thread, when the one that began at `after` (if
    any) is decoded or used up.
    """

    def __init__(self, request: StreamRequest, step: int, after: int | None) -> None:
        self._used_up, self._cancelled = threading.Event(), threading.Event()
        self._segment: _Segment | None = None
        self._error: BaseException | None = None

        def run() -> None:
            import ray

            try:
                while after is not None and not self._used_up.is_set():
                    decoded = request.feeder.all_decoded.remote(
                        request.group_id, after, _ASK_S, request.rank
                    )
                    if ray.get(decoded):
                        break
                if not self._cancelled.is_set():
                    self._segment = _open(request, step)
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
