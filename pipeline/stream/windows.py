"""Windows that several streams take parts of, each read once.

A window's row groups are spread over the chunks of all streams. So one stream's reader fetches
them (`Dealing.reader`), and gives each stream the encoded images that it decodes.

Readers stay apart from the streams' other work: one that is killed starts again with nothing, and
what it is asked for then is read again.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.shards.row_group import RowGroup, read_group
from pipeline.shards.shards import ShardColumns
from pipeline.storage.retry import retries
from pipeline.stream.dealing import Dealing
from pipeline.stream.order import slice_rows
from pipeline.stream.reader import (
    READS_AT_ONCE,
    EncodedImages,
    ReadSpec,
    ReadTask,
    encoded_images,
)

HELD = 2  # windows of a reader at least: one is handed out while the next is fetched
PATIENCE_S = 5.0  # of a reader that started again

Groups = tuple[list[RowGroup], float]  # and the seconds that fetching them took
Key = tuple[int, int, int]  # pass, window, start: ascending in the order of the stream
NONE: Key = (-1, -1, -1)


def key_of(task: ReadTask) -> Key:
    """What tells a window from others."""
    part = task.window_slice
    return part.pass_index, part.window, part.start


@dataclass(frozen=True)
class _Window:
    groups: Future[Groups]
    lacking: set[int]  # streams that have not taken their part


class SharedWindows:
    """Reads the windows that fall to one stream's reader, for all streams.

    It holds a few windows, until no stream lacks its part of them. Streams ask in the order of the
    pass, so these are the earliest that somebody lacks. Who waits for a later one waits for workers
    that have not come so far, and what these need is here or with them.

    Args:
        columns: of the set.
        dealing: the streams.
        seed: of the run; it fixes the order inside a window.
        held: windows at most.
        patience_s: seconds after which there is room in any case. For a reader that started again:
            it learns what a stream has taken before only when that one asks.
    """

    def __init__(
        self,
        columns: ShardColumns,
        dealing: Dealing,
        seed: int,
        held: int = HELD,
        patience_s: float | None = None,
    ) -> None:
        self.columns, self.dealing, self.seed = columns, dealing, seed
        self.most, self.patience_s = held, patience_s
        self.fetches = ThreadPoolExecutor(held)
        self.reads = ThreadPoolExecutor(READS_AT_ONCE * (held - 1))
        self.changed = threading.Condition()
        self.held: dict[Key, _Window] = {}
        self.taken: dict[int, Key] = {}  # the last window of each stream
        self.waiting: list[Key] = []  # for room
        self.retries = retries()

    def part(self, task: ReadTask, stream: int, taken: Key = NONE) -> EncodedImages:
        """The images of a window that a stream takes, in order; waits for room.

        Args:
            task: the window.
            stream: the one that takes.
            taken: the last window of which it has its part.

        Raises:
            DataError: a file is gone or cannot be read.
        """
        key = key_of(task)
        with self.changed:
            self._note(stream, taken)
            self.waiting.append(key)
            self.changed.wait_for(lambda: self._may_enter(key), self.patience_s)
            self.waiting.remove(key)
            if key not in self.held:
                others = self.dealing.takers(task.window_slice)
                lacking = {s for s in others if self.taken.get(s, NONE) < key}
                fetched = self.fetches.submit(self._fetch, task)
                self.held[key] = _Window(fetched, lacking)
            window = self.held[key]
            window.lacking.add(stream)  # again, where its read task was killed
            self.changed.notify_all()
        try:
            return self._images(task, stream, *window.groups.result())
        finally:
            with self.changed:
                window.lacking.discard(stream)
                self._drop()

    def _note(self, stream: int, taken: Key) -> None:
        """A reader that started again was not there when the stream took these."""
        self.taken[stream] = max(taken, self.taken.get(stream, NONE))
        for key, window in self.held.items():
            if key <= taken:
                window.lacking.discard(stream)
        self._drop()

    def _drop(self) -> None:
        self.held = {key: window for key, window in self.held.items() if window.lacking}
        self.changed.notify_all()

    def _may_enter(self, key: Key) -> bool:
        """The first that is asked for goes first, or later ones would keep it out."""
        if key in self.held or not self.held or key < min(self.held):
            return True
        return len(self.held) < self.most and key == min(
            k for k in self.waiting if k not in self.held
        )

    def _fetch(self, task: ReadTask) -> Groups:
        begin = time.perf_counter()
        groups = list(self.reads.map(lambda place: read_group(self.columns, *place), task.places))
        return groups, time.perf_counter() - begin

    def _images(
        self, task: ReadTask, stream: int, groups: Sequence[RowGroup], read_s: float
    ) -> EncodedImages:
        whole = task.window_slice
        which, rows = slice_rows(whole, self.seed)
        mine = np.flatnonzero(self.dealing.stream_of(whole) == stream)
        images = encoded_images(
            groups, which[mine], rows[mine], whole.pass_index, whole.start + mine
        )
        with self.changed:
            before, self.retries = self.retries, retries()
            tried = self.retries - before
        return replace(images, read_s=images.read_s + read_s * len(mine) / len(rows), retries=tried)


class WindowReader:
    """The actor around `SharedWindows`: what it hands on is a block, or the error as a value."""

    def __init__(self, read_spec: list[Any], dealing: Dealing, held: int) -> None:
        import ray

        with warnings.catch_warnings(action="ignore"):  # of how Ray looks that up
            again = ray.get_runtime_context().was_current_actor_reconstructed
        spec: ReadSpec = ray.get(read_spec[0])
        patience = PATIENCE_S if again else None
        self.windows = SharedWindows(spec.columns, dealing, spec.seed, held, patience)

    def part(self, task: ReadTask, stream: int, taken: Key) -> Any:
        """A table of one row for `EncodedImages.of`, or the `DataError` that reading ended with."""
        try:
            return self.windows.part(task, stream, taken).table()
        except DataError as error:
            return error


def parts_of(
    tasks: Sequence[ReadTask],
    dealing: Dealing,
    readers: Sequence[Any],
    stream: int,
    ahead: int = HELD,
) -> Iterator[EncodedImages]:
    """A stream's part of each window, in order; the next ones are on their way meanwhile.

    Args:
        tasks: the windows, those that the stream takes nothing of as well.
        dealing: the streams.
        readers: handles of the `WindowReader`s of all streams.
        stream: the one that takes.
        ahead: parts that are asked for, the next one included.

    Raises:
        DataError: a file is gone or cannot be read.
    """
    import ray

    mine = (task for task in tasks if stream in dealing.takers(task.window_slice))
    asked: deque[tuple[Key, Any]] = deque()
    taken = NONE
    while True:
        for task in islice(mine, ahead - len(asked)):
            reader = readers[dealing.reader(task.window_slice)]
            asked.append((key_of(task), reader.part.remote(task, stream, taken)))
        if not asked:
            return
        taken, answer = asked.popleft()
        block = ray.get(answer)
        if isinstance(block, DataError):
            raise block
        yield EncodedImages.of(block)
