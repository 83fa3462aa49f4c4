"""Images of labelled rows: random crops to train on, centre crops to score.

What an image looks like in an epoch is a function of (seed, epoch, image id), and which images are
in a step one of (seed, step). So no result depends on threads, on workers or on a restart.

A row group is read when the first of its images is needed, and of it each worker keeps the rows
that are its own. Decoded images stay in memory while there is room, so small sets are decoded once.
Images are shuffled within windows of row groups that are themselves in random order; a window is
larger than most labelled sets.

Shapes: B images of a step on this worker, U images that they are made of, S side, C channels.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.finetune.rows import Rows, group_starts
from pipeline.finetune.settings import Settings, steps_per_epoch
from pipeline.images.decode import MAX_PIXELS, BadImage, decode_image
from pipeline.shards.row_group import RowGroup, read_group
from pipeline.shards.shard_set import ShardSet
from pipeline.stream.order import keyed
from pipeline.views.crops import CropSpec, crop_boxes, resize_centre_crop, resized
from pipeline.views.draws import CROP_STREAM, uniforms

WINDOW_IMAGES = 32_768  # that are shuffled together; encoded photographs of 3 GiB, over all workers
KEPT_BYTES = 2**30  # of decoded images, a worker
AHEAD = 4  # steps that are prepared while one is computed
CHUNK = 16  # images of one task of a thread

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Batch:
    """What one worker computes a step from.

    Attributes:
        images: uint8 [U, S, S, C]; an image that cannot be decoded is black.
        labels: int64 [U].
        weights: float32 [U], 0 for an image that cannot be decoded, else 1.
        own: int64 [B], which of them the step is of.
        partner: int64 [B], which is mixed into each.
        share: float32 [B], share of its own image in each; 1 without mixup.
        whole: images of the step on all workers.
    """

    images: Array
    labels: Array
    weights: Array
    own: Array
    partner: Array
    share: Array
    whole: int


@dataclass(frozen=True)
class Worker:
    """Which of several workers this is, and how many threads decode for it."""

    rank: int = 0
    count: int = 1
    threads: int = 1


class LabelledImages:
    """The images of some rows of a set.

    Attributes:
        bad: by id, reason and detail of each image that could not be decoded so far.
    """

    def __init__(
        self, shards: ShardSet, rows: Rows, settings: Settings, worker: Worker, max_pixels: int
    ) -> None:
        self.shards, self.rows, self.settings, self.worker = shards, rows, settings, worker
        self.max_pixels = max_pixels or MAX_PIXELS
        self.bad: dict[str, tuple[str, str]] = {}
        self._kept: dict[int, Array] = {}
        self._room, self._lock = KEPT_BYTES, threading.Lock()
        bounds = list(group_starts(rows)) if len(rows) else []
        self._starts = np.asarray([start for start, _ in bounds], np.int64)
        self._group_locks = [threading.Lock() for _ in bounds]
        self.order = lru_cache(2)(self._order)

    # ---- Which images are in which step.

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a pass over the rows."""
        return steps_per_epoch(len(self.rows), self.settings.batch_size)

    def _order(self, epoch: int) -> Array:
        """All rows in the order of a pass, int64 [n]."""
        seed, count = self.settings.seed, len(self.rows)
        ends = [*self._starts[1:].tolist(), count]
        groups = keyed(seed, epoch, "groups").permutation(len(ends))
        order = np.concatenate([np.arange(self._starts[g], ends[g]) for g in groups])
        for window in range(0, count, WINDOW_IMAGES):
            part = order[window : window + WINDOW_IMAGES]
            order[window : window + WINDOW_IMAGES] = part[
                keyed(seed, epoch, window, "window").permutation(len(part))
            ]
        return order

    def step_rows(self, step: int) -> Array:
        """The rows of a step, on all workers together."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        batch = self.settings.batch_size
        rows: Array = self.order(epoch)[inside * batch : (inside + 1) * batch]
        return rows

    def _mine(self, step: int) -> tuple[Array, Array, Array]:
        """Rows of a step on this worker, the row that is mixed into each, and shares."""
        rows, worker = self.step_rows(step), self.worker
        share: Array = np.ones(len(rows), np.float32)
        if a := self.settings.mixup:
            share = keyed(self.settings.seed, step, "mixup").beta(a, a, len(rows))
        mine = np.array_split(np.arange(len(rows)), worker.count)[worker.rank]
        partners = rows[::-1][mine] if self.settings.mixup else rows[mine]
        return rows[mine], partners, share[mine].astype(np.float32)

    # ---- Random crops, step by step.

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """The batches of steps from `first` to before `last`, prepared by threads."""
        with ThreadPoolExecutor(self.worker.threads) as pool:
            waiting: deque[tuple[int, list[Future[tuple[Array, Array]]], Array]] = deque()
            of_epoch: dict[int, _Held] = {}

            def begin(step: int) -> None:
                epoch = step // self.steps_per_epoch
                if epoch not in of_epoch:
                    of_epoch[epoch] = _Held(self._epoch_rows(epoch, step))
                    of_epoch.pop(epoch - 2, None)
                own, partners, _ = self._mine(step)
                unique = np.unique(np.concatenate([own, partners]))
                parts = [unique[at : at + CHUNK] for at in range(0, len(unique), CHUNK)]
                tasks = [pool.submit(self._crops, epoch, part, of_epoch[epoch]) for part in parts]
                waiting.append((step, tasks, unique))

            try:
                for step in range(first, min(last, first + AHEAD)):
                    begin(step)
                for ahead in range(first + AHEAD, last + AHEAD):
                    step, tasks, unique = waiting.popleft()
                    done = [task.result() for task in tasks]
                    if ahead < last:
                        begin(ahead)
                    yield self._batch(step, done, unique)
                    if not waiting:
                        return
            finally:
                for _, tasks, _ in waiting:
                    for task in tasks:
                        task.cancel()

    def _batch(self, step: int, done: Sequence[tuple[Array, Array]], unique: Array) -> Batch:
        own, partners, share = self._mine(step)
        return Batch(
            np.concatenate([images for images, _ in done]),
            self.rows.labels[unique],
            np.concatenate([weights for _, weights in done]),
            np.searchsorted(unique, own),
            np.searchsorted(unique, partners),
            share,
            len(self.step_rows(step)),
        )

    def _epoch_rows(self, epoch: int, step: int) -> Array:
        """Which rows, bool [n], this worker needs from a step to the end of its epoch."""
        needed = np.zeros(len(self.rows), bool)
        for other in range(step, (epoch + 1) * self.steps_per_epoch):
            own, partners, _ = self._mine(other)
            needed[own] = needed[partners] = True
        return needed

    def _crops(self, epoch: int, part: Array, epoch_images: _Held) -> tuple[Array, Array]:
        """Random crops uint8 [b, S, S, C] of some rows, and their weights."""
        settings = self.settings
        size, channels = settings.image_size, len(settings.mean)
        spec = CropSpec(
            size,
            local_crops=0,
            global_scale=settings.crop_scale,
            flip_probability=settings.flip,
            channels=channels,
        )
        decoded = [self._decoded(row, epoch_images) for row in part.tolist()]
        shapes = np.asarray([(1, 1) if x is None else x.shape[:2] for x in decoded])
        drawn = uniforms(settings.seed, epoch, self.rows.ids[part], spec.draws, CROP_STREAM)
        boxes, flips = crop_boxes(drawn, shapes[:, 1], shapes[:, 0], spec)
        crops = np.zeros((len(part), size, size, channels), np.uint8)
        for at, pixels in enumerate(decoded):
            if pixels is not None:
                # of the two global crops that a spec has, the first
                top, left, height, width = boxes[at, 0].tolist()
                crop = resized(pixels[top : top + height, left : left + width], size, size)
                crops[at] = crop[:, ::-1] if flips[at, 0] else crop
        return crops, np.asarray([x is not None for x in decoded], np.float32)

    def _decoded(self, row: int, epoch_images: _Held) -> Array | None:
        """The pixels of a row [H, W, C]; None where they cannot be decoded."""
        if (kept := self._kept.get(row)) is not None:
            return kept
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        with self._group_locks[group]:
            if row not in epoch_images.images:
                table, start, after = self._read(group)
                for other in range(start, after):
                    # a thread of another epoch may have kept this very row a moment ago
                    if epoch_images.needed[other] and (other == row or other not in self._kept):
                        epoch_images.images[other] = _checked(table, int(self.rows.rows[other]))
            epoch_images.needed[row] = False  # a row is in one step of an epoch, once
            encoded = epoch_images.images.pop(row)
        pixels = self._pixels(row, encoded)
        if pixels is not None:
            with self._lock:
                if row not in self._kept and pixels.nbytes <= self._room:
                    self._kept[row] = pixels
                    self._room -= pixels.nbytes
        return pixels

    # ---- From bytes to pixels.

    def _pixels(self, row: int, encoded: bytes | BadImage) -> Array | None:
        try:
            if isinstance(encoded, BadImage):
                raise encoded
            channels = len(self.settings.mean)
            value_range = self.shards.columns.value_range
            return decode_image(encoded, channels, self.max_pixels, value_range)
        except BadImage as error:
            self.bad[bytes(self.rows.ids[row]).hex()] = (error.reason, error.detail)
            return None

    def _read(self, group: int) -> tuple[RowGroup, int, int]:
        """A row group, and the first and last + 1 of our rows in it."""
        start = int(self._starts[group])
        after = int(self._starts[group + 1]) if group + 1 < len(self._starts) else len(self.rows)
        file = self.shards.files[int(self.rows.files[start])]
        table = read_group(self.shards.columns, file.path, int(self.rows.groups[start]))
        return table, start, after

    # ---- Centre crops, to score.

    def centre_crops(self, batch_size: int) -> Iterator[tuple[Array, Array]]:
        """Batches of images uint8 [b, S, S, C] as the exported image processor makes them, and
        the rows that they are of; those that cannot be decoded are left out.
        """
        size = self.settings.image_size

        def prepared(numbered: tuple[int, bytes | BadImage]) -> tuple[int, Array] | None:
            pixels = self._pixels(*numbered)
            return None if pixels is None else (numbered[0], resize_centre_crop(pixels, size))

        waiting: list[tuple[int, Array]] = []
        with ThreadPoolExecutor(self.worker.threads) as pool:
            for group in range(len(self._starts)):
                table, start, after = self._read(group)
                places = self.rows.rows[start:after].tolist()
                items = [(start + i, _checked(table, place)) for i, place in enumerate(places)]
                waiting += [one for one in pool.map(prepared, items) if one is not None]
                while len(waiting) >= batch_size:
                    yield _stacked(waiting[:batch_size])
                    waiting = waiting[batch_size:]
        if waiting:
            yield _stacked(waiting)


@dataclass
class _Held:
    """Encoded images of an epoch between the reading of their row group and their use.

    Attributes:
        needed: bool [n], the rows that are still to come on this worker.
        images: by row.
    """

    needed: Array
    images: dict[int, bytes | BadImage] = field(default_factory=dict)


def _checked(table: RowGroup, place: int) -> bytes | BadImage:
    try:
        return table.checked(place)
    except BadImage as error:
        return error


def _stacked(items: Sequence[tuple[int, Array]]) -> tuple[Array, Array]:
    rows, images = zip(*items, strict=True)
    return np.stack(images), np.asarray(rows, np.int64)
