"""Image shards to training workers through Ray Data, in the order that `order.ReadingOrder` fixes.

One read task handles a piece: it reads the row groups, decodes each image once, cuts its crops,
draws colour numbers and masks, and yields chunks of `chunk` images. A chunk is one row of a Ray
Data block of its own: so blocks keep the order of the plan, the splitter deals them to the workers
in turn (`preserve_order` makes it exact), and worker r of W gets chunks r, r + W, r + 2 W, …
Which images make up a step therefore depends on neither the number of workers nor a restart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.batch import Batch
from pipeline.data.crops import CropSpec, crop_boxes, cut_crops
from pipeline.data.decode import REASONS, BadImage, decode_image
from pipeline.data.draws import CROP_STREAM, PHOTOMETRIC_STREAM, uniforms
from pipeline.data.masks import masks_for
from pipeline.data.order import Piece, ReadingOrder
from pipeline.data.photometric import PHOTOMETRIC_DRAWS, PhotometricSpec, draw_photometric
from pipeline.data.schema import ShardSet, read_row_group
from pipeline.errors import DataError

UNPACKED_LIMIT = 2**30  # bytes of hub-style shards that may be shuffled without packing
Chunk = dict[str, np.ndarray]
_REASON_NAMES = np.asarray(REASONS)  # blocks carry numbers; text does not fit into tensor columns


@dataclass(frozen=True)
class MaskSpec:
    """Which patches the student does not see (RECIPE section 5)."""

    grid: tuple[int, int]
    probability: float
    ratio: tuple[float, float]


@dataclass(frozen=True)
class StreamSpec:
    """What a read task needs beside its piece."""

    shards: ShardSet
    order: ReadingOrder
    crops: CropSpec
    photometric: PhotometricSpec
    masks: MaskSpec
    chunk: int
    max_pixels: int

    def group_place(self, group: int) -> tuple[int, int]:
        """(file, row group in it) of a global row group index."""
        counts = np.cumsum([len(file.row_groups) for file in self.shards.files])
        file = int(np.searchsorted(counts, group, side="right"))
        return file, group - (int(counts[file - 1]) if file else 0)


def reading_order(
    shards: ShardSet, *, seed: int, global_batch: int, window: int, piece: int
) -> ReadingOrder:
    """The order for a shard set.

    Shards that pack wrote are ordered by id, a random permutation, so a window of a few row groups
    mixes them. Others may be sorted by class, so they are shuffled as a whole.

    Raises:
        DataError: where unpacked shards are too large for that.
    """
    rows = np.asarray([n for file in shards.files for n in file.row_groups], np.int64)
    if not shards.packed:
        size = sum(file.bytes for file in shards.files)
        if size > UNPACKED_LIMIT:
            raise DataError(
                f"{shards.files[0].path} and its neighbours ({size / 2**30:.1f} GiB) were not "
                "written by pack: their order may be sorted by class",
                "pack them first: python jobs/pack.py data.source=… data.shards=…",
            )
        window = max(1, int(rows.sum()) // global_batch) * global_batch
    return ReadingOrder(rows, seed, global_batch, window, min(piece, window))


def read_piece(piece: Piece, spec: StreamSpec) -> Iterator[Chunk]:
    """The piece's chunks in order. Bad images stay in place with `valid` false and a reason."""
    groups, rows = spec.order.rows(piece)
    tables = {int(g): read_row_group(spec.shards, *spec.group_place(int(g))) for g in set(groups)}
    for at in range(0, len(groups), spec.chunk):
        encoded, ids, labels = [], [], []
        for group, row in zip(
            groups[at : at + spec.chunk], rows[at : at + spec.chunk], strict=True
        ):
            table = tables[int(group)]
            encoded.append(table.image(int(row)))
            ids.append(table.image_ids[row])
            labels.append(table.labels[row])
        yield make_chunk(
            encoded, np.stack(ids), np.asarray(labels), piece.pass_index, piece.start + at, spec
        )


def make_chunk(
    encoded: list[bytes],
    image_ids: np.ndarray,
    labels: np.ndarray,
    pass_index: int,
    position: int,
    spec: StreamSpec,
) -> Chunk:
    """Decodes and cuts images that stand at `position`, `position` + 1, … of a pass."""
    count, crops = len(encoded), spec.crops
    global_shape = (2, crops.global_size, crops.global_size, crops.channels)
    local_shape = (crops.local_crops, crops.local_size, crops.local_size, crops.channels)
    seed = spec.order.seed
    boxes_u = uniforms(seed, pass_index, image_ids, crops.draws, CROP_STREAM)
    colour_u = uniforms(
        seed, pass_index, image_ids, crops.views * PHOTOMETRIC_DRAWS, PHOTOMETRIC_STREAM
    )
    step_in_pass, first = divmod(position, spec.order.global_batch)
    step = pass_index * spec.order.steps_per_pass + step_in_pass
    chunk: Chunk = {
        "image_ids": image_ids,
        "labels": labels,
        "global_crops": np.zeros((count, *global_shape), np.uint8),
        "local_crops": np.zeros((count, *local_shape), np.uint8),
        "photometric": draw_photometric(
            colour_u.reshape(count, crops.views, PHOTOMETRIC_DRAWS), spec.photometric
        ),
        "masks": masks_for(
            seed,
            step,
            np.arange(first, first + count),
            spec.order.global_batch,
            spec.masks.grid,
            spec.masks.probability,
            spec.masks.ratio,
        ),
        "valid": np.ones(count, bool),
        "reason": np.zeros(count, np.int8),
    }
    for i, data in enumerate(encoded):
        try:
            image = decode_image(data, crops.channels, spec.max_pixels)
        except BadImage as bad:
            chunk["valid"][i], chunk["reason"][i] = False, REASONS.index(bad.reason)
            continue
        height, width = image.shape[:2]
        boxes, flips = crop_boxes(boxes_u[i], width, height, crops)
        chunk["global_crops"][i], chunk["local_crops"][i] = cut_crops(image, boxes, flips, crops)
    return chunk


def batches(
    feeder: Any,
    attempt: str,
    rank: int,
    workers: int,
    first_step: int,
    last_step: int,
    micro_batch: int,
    chunk: int,
) -> Iterator[Batch]:
    """This worker's micro batches from `first_step` on, in order, host side."""
    import ray

    step = first_step
    while step < last_step:
        if rank == 0:
            feeder.open.remote(attempt, step, workers)
        end, iterator = ray.get(feeder.iterator.remote(attempt, step, rank))
        if rank == 0:
            feeder.open.remote(attempt, end, workers)
        held: list[Batch] = []
        for block in iterator.iter_batches(
            batch_size=None, batch_format="numpy", prefetch_batches=2
        ):
            found = {name: values[0] for name, values in block.items()}
            found["reason"] = _REASON_NAMES[found["reason"]]
            held.append(Batch.from_chunk(found))
            if len(held) * chunk == micro_batch:
                yield Batch.concat(held)
                held = []
        step = end
