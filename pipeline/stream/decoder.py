"""Image shards to training workers through Ray Data, in the order that `order.ReadingOrder` fixes.

A read task fetches a window of encoded images (`reading`) and deals it out in portions; a decode
task decodes each image of a portion once, cuts its crops, draws colour numbers and masks, and
yields chunks of `chunk` images. A chunk is one row of a Ray Data block of its own: so blocks keep
the order of the plan, the splitter deals them to the workers in turn (`preserve_order` makes it
exact), and worker r of W gets chunks r, r + W, r + 2 W, … Which images make up a step therefore
depends on neither the number of workers nor a restart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.images.decode import REASONS, BadImage, decode_shrunk, image_size
from pipeline.shards.shards import ShardColumns
from pipeline.stream.reader import Portion
from pipeline.stream.rows import row_at, row_of
from pipeline.stream.worker import blocks
from pipeline.views.batch import Batch
from pipeline.views.crops import (
    CropSpec,
    crop_boxes,
    cut_crops,
    decode_shrink,
    empty_crops,
    scale_boxes,
)
from pipeline.views.draws import CROP_STREAM, PHOTOMETRIC_STREAM, uniforms
from pipeline.views.masks import masks_for
from pipeline.views.photometric import PHOTOMETRIC_DRAWS, PhotometricSpec, draw_photometric

Chunk = dict[str, np.ndarray]
PORTION_BYTES = 128 * 2**20  # of crops that a decode task makes: half a second of work for photos
_LARGE = "global_crops", "local_crops"
_REASON_NAMES = np.asarray(REASONS)  # chunks carry numbers


@dataclass(frozen=True)
class MaskSpec:
    """Which patches the student does not see (RECIPE section 5)."""

    grid: tuple[int, int]
    probability: float
    ratio: tuple[float, float]


@dataclass(frozen=True)
class StreamSpec:
    """What read and decode tasks need beside their piece or portion; small whatever the set is."""

    columns: ShardColumns
    seed: int
    global_batch: int
    steps_per_pass: int
    crops: CropSpec
    photometric: PhotometricSpec
    masks: MaskSpec
    chunk: int
    max_pixels: int
    scaled_decode: bool = True
    image_bytes: float = 0  # mean size of an encoded image, where it is known
    store_bytes: float = math.inf  # of the object store, for each decoder

    @property
    def portion(self) -> int:
        """Images of one decode task: whole chunks, about PORTION_BYTES of what is larger: crops, or
        encoded images eight times, since more of those wait. Less in a small object store, since a
        task that runs is not held back: its crops would be spilled.
        """
        largest = max(self.crops.bytes, 8 * self.image_bytes)
        limit = min(PORTION_BYTES, self.store_bytes / 2)
        return self.chunk * max(1, int(limit // (self.chunk * largest)))


def make_chunks(portion: Portion, spec: StreamSpec) -> Iterator[Chunk]:
    """The portion's chunks in order. Bad images stay in place with `valid` false and a reason."""
    share = portion.read_s / len(portion)
    for first in range(0, len(portion), spec.chunk):
        chunk = make_chunk(portion, first, min(first + spec.chunk, len(portion)), spec)
        chunk["work"][0] = share * len(chunk["labels"])
        chunk["work"][3] = portion.retries if first == 0 else 0
        yield chunk


def chunk_table(chunk: Chunk) -> pa.Table:
    """A chunk as the one row of a block; its crops are not copied."""
    head = {name: value for name, value in chunk.items() if name not in _LARGE}
    shapes = {name: chunk[name].shape for name in _LARGE}
    return row_of({"arrays": head, "shapes": shapes}, {name: chunk[name] for name in _LARGE})


def chunks_in(table: pa.Table) -> Iterator[Chunk]:
    """The chunks of a block, in it; they are read only."""
    for row in range(table.num_rows):
        head, large = row_at(table, row)
        crops = {
            name: np.frombuffer(large[name], np.uint8).reshape(shape)
            for name, shape in head["shapes"].items()
        }
        yield {**head["arrays"], **crops}


@dataclass(frozen=True)
class Draws:
    """What is decided about some images before any of them is decoded."""

    chunk: Chunk  # the arrays of a chunk; crops have room and no values
    boxes_u: np.ndarray  # [B, ...] uniform numbers from which boxes are made
    boxes: np.ndarray  # [B, V, 4], of the sizes that the shard gives
    flips: np.ndarray  # [B, V]
    shrinks: np.ndarray  # [B]


def draw(portion: Portion, first: int, last: int, spec: StreamSpec) -> Draws:
    """Boxes, flips, colour numbers and masks of images `first` to `last` (out) of a portion."""
    crops, count = spec.crops, last - first
    image_ids = portion.image_ids[first:last]
    key = spec.seed, portion.pass_index, image_ids
    boxes_u = uniforms(*key, crops.draws, CROP_STREAM)
    colour_u = uniforms(*key, crops.views * PHOTOMETRIC_DRAWS, PHOTOMETRIC_STREAM)
    step_in_pass, place = divmod(portion.start + first, spec.global_batch)
    chunk: Chunk = {
        "image_ids": image_ids,
        "labels": portion.labels[first:last],
        **dict(zip(("global_crops", "local_crops"), empty_crops(count, crops), strict=True)),
        "photometric": draw_photometric(
            colour_u.reshape(count, crops.views, PHOTOMETRIC_DRAWS), spec.photometric
        ),
        "masks": masks_for(
            spec.seed,
            portion.pass_index * spec.steps_per_pass + step_in_pass,
            np.arange(place, place + count),
            spec.global_batch,
            spec.masks.grid,
            spec.masks.probability,
            spec.masks.ratio,
        ),
        "valid": np.ones(count, bool),
        "reason": np.zeros(count, np.int8),
        "work": np.zeros(4),
    }
    sizes = portion.sizes[first:last]
    boxes, flips = crop_boxes(boxes_u, sizes[:, 1], sizes[:, 0], crops)
    return Draws(chunk, boxes_u, boxes, flips, _shrinks(boxes, spec))


def _shrinks(boxes: np.ndarray, spec: StreamSpec) -> np.ndarray:
    """By how much images with these boxes [..., V, 4] may be decoded smaller: [...]."""
    if spec.scaled_decode:
        return decode_shrink(boxes, spec.crops)
    return np.ones(boxes.shape[:-2], np.int64)


def make_chunk(portion: Portion, first: int, last: int, spec: StreamSpec) -> Chunk:
    """Decodes and cuts images `first` to `last` (out) of a portion.

    Returns:
        The arrays of `Batch`, with `valid` and `reason` [B], and `work` float64 [4]: seconds of
        reading, decoding and all else (draws, masks, cutting) of all images together, and calls to
        storage that were tried again; the first and the last are set by the caller.
    """
    start = time.perf_counter()
    crops, sizes = spec.crops, portion.sizes[first:last]
    drawn = draw(portion, first, last, spec)
    chunk, boxes, flips, shrinks = drawn.chunk, drawn.boxes, drawn.flips, drawn.shrinks
    how = crops.channels, spec.max_pixels, spec.columns.value_range
    decode_s = 0.0
    for i in range(last - first):
        begin = time.perf_counter()
        try:
            encoded = portion.checked(first + i)
            if not sizes[i].all():  # the shard does not say, but the file does
                height, width = image_size(encoded, crops.channels, spec.max_pixels)
                boxes[i], flips[i] = crop_boxes(drawn.boxes_u[i], width, height, crops)
                shrinks[i] = _shrinks(boxes[i], spec)
            image, shrink = decode_shrunk(encoded, int(shrinks[i]), *how)
            if sizes[i].all() and (image.shape[:2] != -(-sizes[i] // shrink)).any():
                # The shard is wrong about its image: believe the pixels.
                image, shrink = decode_shrunk(encoded, 1, *how)
                boxes[i], _ = crop_boxes(drawn.boxes_u[i], image.shape[1], image.shape[0], crops)
        except BadImage as bad:
            chunk["valid"][i], chunk["reason"][i] = False, REASONS.index(bad.reason)
            chunk["global_crops"][i], chunk["local_crops"][i] = 0, 0
            continue
        finally:
            decode_s += time.perf_counter() - begin
        cut_crops(
            image,
            scale_boxes(boxes[i], shrink, *image.shape[:2]),
            flips[i],
            crops,
            out=(chunk["global_crops"][i], chunk["local_crops"][i]),
        )
    chunk["work"][1:3] = decode_s, time.perf_counter() - start - decode_s
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
    pin: bool = False,
    accumulation: int = 1,
) -> Iterator[Batch]:
    """This worker's micro batches from `first_step` on, in order, host side.

    Micro batch j of worker r is the one that worker r + j * workers would have if there were one
    for each micro batch: which images it has does not depend on the number of workers.

    Reading and decoding begin with this call.

    Args:
        feeder: handle of the `feeder.Feeder`.
        attempt: what this group of workers calls itself; another one starts anew.
        rank: of this worker.
        workers: in the group.
        first_step: of the run, or of what is left of it.
        last_step: steps of the run.
        micro_batch: images of one batch.
        chunk: images of one block; divides `micro_batch`.
        pin: put batches into page-locked memory, for a GPU.
        accumulation: micro batches of a step.
    """
    found = blocks(feeder, attempt, rank, workers, first_step, last_step)
    return _micro_batches(found, micro_batch // chunk, accumulation, pin)


def _micro_batches(
    found: Iterator[Any], chunks: int, accumulation: int, pin: bool
) -> Iterator[Batch]:
    """Chunk k of a worker's step belongs to micro batch k mod accumulation.

    Chunk c of a step comes to worker c mod W. With W * accumulation workers it would come to worker
    c mod (W * accumulation), and this is that one's batch.
    """
    held: list[list[Batch]] = [[] for _ in range(accumulation)]
    arrived = 0
    for block in found:
        for chunk in chunks_in(block):
            chunk["reason"] = _REASON_NAMES[chunk["reason"]]
            parts = held[arrived % accumulation]
            last = len(parts) + 1 == chunks
            parts.append(Batch.from_chunk(chunk, last and not any(part.images for part in parts)))
            arrived += 1
            if arrived % accumulation == 0 and last:
                yield from (Batch.concat(parts, pin) for parts in held)
                held = [[] for _ in range(accumulation)]
