"""Read tasks: a window's encoded images, fetched row group by row group, dealt out in portions.

Reading is apart from decoding so that the two overlap (a read task waits for storage, a decode task
for its core), and so that decode tasks are short: what runs ahead of its turn in the order has to
be kept, so short tasks keep little. No torch in here; read tasks start fast and stay small.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError
from pipeline.images.bad_image import check_id
from pipeline.shards.row_group import RowGroup, read_group
from pipeline.shards.shards import ShardColumns, ShardSet
from pipeline.storage.retry import retries
from pipeline.stream.order import Ints, ReadingOrder, WindowSlice, slice_rows
from pipeline.stream.rows import row_at, row_of

UNPACKED_LIMIT = 2**30  # bytes of hub-style shards that may be shuffled without packing
AHEAD_BYTES = 512 * 2**20  # of a window in memory beside which the next one is fetched already
READS_AT_ONCE = 4  # row groups of one window; storage that is far away likes several


@dataclass(frozen=True)
class ReadTask:
    """A slice of the order, and where its row groups are: (path of the file, row group in it)."""

    window_slice: WindowSlice
    places: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class ReadSpec:
    """What read tasks need of a `StreamSpec`, which loads torch where it is unpacked."""

    columns: ShardColumns
    seed: int
    portion_images: int  # of one decode task


@dataclass(frozen=True)
class Reading:
    """A shard set and the order in which it is read. It stays with the one who plans."""

    shards: ShardSet
    order: ReadingOrder

    @cached_property
    def _first_groups(self) -> Ints:
        """Index of the first row group of each file."""
        counts = [len(file.row_groups) for file in self.shards.files]
        return np.concatenate([[0], np.cumsum(counts)])

    def tasks(self, first_step: int, last_step: int) -> list[ReadTask]:
        """The read tasks for steps `first_step` (in) to `last_step` (out), in order."""
        tasks = []
        for window_slice in self.order.slices(first_step, last_step):
            files = np.searchsorted(self._first_groups, window_slice.groups, side="right") - 1
            inside = window_slice.groups - self._first_groups[files]
            places = zip(files.tolist(), inside.tolist(), strict=True)
            paths = tuple((self.shards.files[file].path, group) for file, group in places)
            tasks.append(ReadTask(window_slice, paths))
        return tasks


def reading_of(shards: ShardSet, *, seed: int, global_batch: int, window: int) -> Reading:
    """The order for a shard set.

    Shards that pack wrote are ordered by id, a random permutation, so a window of a few row groups
    mixes them. Others may be sorted by class, so they are shuffled as a whole.

    Raises:
        DataError: where unpacked shards are too large for that.
    """
    rows = group_rows(shards)
    if not shards.packed:
        size = sum(file.bytes for file in shards.files)
        if size > UNPACKED_LIMIT:
            raise DataError(
                f"{shards.files[0].path} and its neighbours ({size / 2**30:.1f} GiB) were not "
                "written by pack: their order may be sorted by class",
                "pack them first: python jobs/pack.py data.source=… data.shards=…",
            )
        window = max(1, int(rows.sum()) // global_batch) * global_batch
    return Reading(shards, ReadingOrder(rows, seed, global_batch, window))


def group_rows(shards: ShardSet) -> Ints:
    """Rows of each row group of the set, file after file."""
    return np.asarray([n for file in shards.files for n in file.row_groups], np.int64)


@dataclass(frozen=True)
class EncodedImages:
    """Images of one pass, still encoded: a portion, the work of one decode task."""

    pass_index: int
    positions: Ints  # [n] in the pass, ascending; those of a chunk follow each other
    image_ids: np.ndarray[Any, np.dtype[np.uint8]]  # [n, 16]
    labels: Ints  # [n], -1 where there is none
    sizes: Ints  # [n, 2] height and width, 0 where the shard does not say
    offsets: Ints  # [n + 1] in `encoded`
    encoded: Any  # bytes of all images, one after the other
    read_s: float  # what fetching them took
    retries: int  # calls to storage that were tried again for them
    named: bool = False  # the ids were stored beside the images: `checked` compares them

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def start(self) -> int:
        """Position in the pass of the first image."""
        return int(self.positions[0])

    def image(self, i: int) -> bytes:
        """The encoded image at a place."""
        return bytes(self.encoded[self.offsets[i] : self.offsets[i + 1]])

    def checked(self, i: int) -> bytes:
        """The encoded image at a place; callers decode it.

        A pass compares half of the stored ids with the bytes, the next pass the other half. To
        compare all of them would take 3 % of a decoder's time.

        Raises:
            BadImage: a stored id is of other bytes.
        """
        encoded = self.image(i)
        if self.named and (self.pass_index + int(self.image_ids[i, -1])) % 2 == 0:
            check_id(encoded, self.image_ids[i].tobytes())
        return encoded

    def portions(self, images: int) -> Iterator[EncodedImages]:
        """Cuts it, in order; the encoded bytes are not copied."""
        for first in range(0, len(self), images):
            part = slice(first, first + images)
            ends = self.offsets[first : first + images + 1]
            values = {
                name: getattr(self, name)[part]
                for name in ("positions", "image_ids", "labels", "sizes")
            }
            yield replace(
                self,
                **values,
                offsets=ends - ends[0],
                encoded=memoryview(self.encoded)[ends[0] : ends[-1]],
                read_s=self.read_s * (len(ends) - 1) / len(self),
                retries=0 if first else self.retries,
            )

    def table(self) -> pa.Table:
        """One row of a Ray Data block."""
        head = {name: value for name, value in self.__dict__.items() if name != "encoded"}
        return row_of(head, {"encoded": self.encoded})

    @classmethod
    def of(cls, table: pa.Table, row: int = 0) -> EncodedImages:
        """From a row of a block; the images are not copied."""
        head, large = row_at(table, row)
        return cls(**head, encoded=large["encoded"])


def read_portions(
    tasks: Sequence[ReadTask], columns: ShardColumns, seed: int, portion: int
) -> Iterator[EncodedImages]:
    """Fetches the row groups of slices and deals their images out in order.

    The next slice is fetched while this one is dealt out, so storage that is far away costs little.
    Only where a window is larger than `AHEAD_BYTES` (a whole set that was not packed), one is held
    at a time.

    Args:
        tasks: what to read.
        columns: of the set.
        seed: of the run; it fixes the order inside a window.
        portion: images of one portion; the last one of a slice may be shorter.

    Raises:
        DataError: a file is gone or cannot be read.
    """
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(READS_AT_ONCE) as pool:

        def fetch(task: ReadTask) -> tuple[list[RowGroup], float]:
            begin = time.perf_counter()
            groups = list(pool.map(lambda place: read_group(columns, *place), task.places))
            return groups, time.perf_counter() - begin

        counted = retries()
        fetched = ahead.submit(fetch, tasks[0])
        for n, task in enumerate(tasks):
            groups, read_s = fetched.result()
            more = n + 1 < len(tasks)
            overlap = more and sum(group.images.nbytes for group in groups) <= AHEAD_BYTES
            if overlap:
                fetched = ahead.submit(fetch, tasks[n + 1])
            whole = task.window_slice
            which, rows = slice_rows(whole, seed)
            for at in range(0, len(rows), portion):
                part = slice(at, at + portion)
                share = read_s * len(rows[part]) / len(rows)
                positions = np.arange(whole.start + at, whole.start + at + len(rows[part]))
                images = encoded_images(
                    groups, which[part], rows[part], whole.pass_index, positions
                )
                before, counted = counted, retries()
                yield replace(images, read_s=images.read_s + share, retries=counted - before)
            if more and not overlap:
                del groups
                fetched = ahead.submit(fetch, tasks[n + 1])


def encoded_images(
    groups: Sequence[RowGroup],
    which: Ints,
    rows: Ints,
    pass_index: int = 0,
    positions: Ints | None = None,
) -> EncodedImages:
    """Copies the encoded images of some rows behind each other.

    Args:
        groups: row groups that were read.
        which: the group of each image.
        rows: its place in that group.
        pass_index: the pass they are for.
        positions: the position in it of each; None: from 0 on.
    """
    begin = time.perf_counter()
    pairs = list(zip(which.tolist(), rows.tolist(), strict=True))
    values = [groups[group].encoded[row] for group, row in pairs]
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int64)

    def column(name: str) -> Any:
        return np.stack([getattr(groups[group], name)[row] for group, row in pairs])

    columns = {name: column(name) for name in ("image_ids", "labels", "sizes")}
    return EncodedImages(
        pass_index=pass_index,
        positions=np.arange(len(pairs)) if positions is None else positions,
        offsets=offsets,
        encoded=b"".join(values),
        read_s=time.perf_counter() - begin,
        retries=0,
        named=all(group.named for group in groups),
        **columns,
    )
