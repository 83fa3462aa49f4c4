"""Image shards to training workers through Ray Data, in the order that `order.ReadingOrder` fixes.

A read task fetches a window of encoded images (`reader`) and deals it out in portions; a decode
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

import numpy as np
import pyarrow as pa

from pipeline.images.decode import REASONS, BadImage, decode_shrunk, image_size
from pipeline.shards.shards import ShardColumns
from pipeline.stream.reader import EncodedImages
from pipeline.stream.rows import row_at, row_of
from pipeline.views.crops import (
    CropSpec,
    crop_boxes,
    cut_crops,
    decode_shrink,
    empty_crops,
    scale_boxes,
)
from pipeline.views.draws import CROP_STREAM, PHOTOMETRIC_STREAM, uniforms
from pipeline.views.masks import MaskSpec, masks_for
from pipeline.views.photometric import PHOTOMETRIC_DRAWS, PhotometricSpec, draw_photometric

Chunk = dict[str, np.ndarray]
PORTION_BYTES = 128 * 2**20  # of crops that a decode task makes: half a second of work for photos
_LARGE = "global_crops", "local_crops"
_REASON_NAMES = np.asarray(REASONS)  # chunks carry numbers
# What making a chunk took: the fields of `views.batch.Spent` behind the first.
SPENT = np.dtype([(name, np.float64) for name in ("read_s", "decode_s", "crop_s", "retries")])


@dataclass(frozen=True)
class StreamSpec:
    """What read and decode tasks need beside their slice or portion; small whatever the set is."""

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
    def portion_images(self) -> int:
        """Images of one decode task: whole chunks, about PORTION_BYTES of what is larger: crops, or
        encoded images eight times, since more of those wait. Less in a small object store, since a
        task that runs is not held back: its crops would be spilled.
        """
        largest = max(self.crops.bytes, 8 * self.image_bytes)
        limit = min(PORTION_BYTES, self.store_bytes / 2)
        return self.chunk * max(1, int(limit // (self.chunk * largest)))


def make_chunks(portion: EncodedImages, spec: StreamSpec) -> Iterator[Chunk]:
    """The portion's chunks in order. Bad images stay in place with `valid` false and a reason."""
    share = portion.read_s / len(portion)
    for first in range(0, len(portion), spec.chunk):
        chunk = make_chunk(portion, first, min(first + spec.chunk, len(portion)), spec)
        chunk["spent"]["read_s"] = share * len(chunk["labels"])
        chunk["spent"]["retries"] = portion.retries if first == 0 else 0
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
        reason = _REASON_NAMES[head["arrays"]["reason"]]
        yield {**head["arrays"], **crops, "reason": reason}


@dataclass(frozen=True)
class Draws:
    """What is decided about some images before any of them is decoded."""

    chunk: Chunk  # the arrays of a chunk; crops have room and no values
    boxes_u: np.ndarray  # [B, ...] uniform numbers from which boxes are made
    boxes: np.ndarray  # [B, V, 4], of the sizes that the shard gives
    flips: np.ndarray  # [B, V]
    shrinks: np.ndarray  # [B]


def draw(portion: EncodedImages, first: int, last: int, spec: StreamSpec) -> Draws:
    """Boxes, flips, colour numbers and masks of images `first` to `last` (out) of a portion."""
    crops, count = spec.crops, last - first
    image_ids = portion.image_ids[first:last]
    key = spec.seed, portion.pass_index, image_ids
    boxes_u = uniforms(*key, crops.draws, CROP_STREAM)
    colour_u = uniforms(*key, crops.views * PHOTOMETRIC_DRAWS, PHOTOMETRIC_STREAM)
    step_in_pass, place = divmod(int(portion.positions[first]), spec.global_batch)
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
            spec.masks,
        ),
        "valid": np.ones(count, bool),
        "reason": np.zeros(count, np.int8),
        "spent": np.zeros((), SPENT),
    }
    sizes = portion.sizes[first:last]
    boxes, flips = crop_boxes(boxes_u, sizes[:, 1], sizes[:, 0], crops)
    return Draws(chunk, boxes_u, boxes, flips, _shrinks(boxes, spec))


def _shrinks(boxes: np.ndarray, spec: StreamSpec) -> np.ndarray:
    """By how much images with these boxes [..., V, 4] may be decoded smaller: [...]."""
    if spec.scaled_decode:
        return decode_shrink(boxes, spec.crops)
    return np.ones(boxes.shape[:-2], np.int64)


def make_chunk(portion: EncodedImages, first: int, last: int, spec: StreamSpec) -> Chunk:
    """Decodes and cuts images `first` to `last` (out) of a portion.

    Returns:
        The arrays of `Batch`, with `valid` and `reason` [B], and one `SPENT` of all images
        together; what is of reading, `read_s` and `retries`, is set by the caller.
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
    chunk["spent"]["decode_s"] = decode_s
    chunk["spent"]["crop_s"] = time.perf_counter() - start - decode_s
    return chunk
