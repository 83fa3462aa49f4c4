"""The stream for one and for six channels, read without Ray, against a plain loop over each image.

The loop opens files with Pillow and numpy, cuts plane by plane with torch, and does the colours
with torchvision.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.nn import functional

from pipeline.images.decode import REASONS
from pipeline.stream.decoder import Chunk, StreamSpec, make_chunks
from pipeline.stream.reader import Reading, read_portions, reading_of
from pipeline.views import photometric as ph
from pipeline.views.batch import Batch
from pipeline.views.crops import CropSpec, crop_boxes
from pipeline.views.draws import CROP_STREAM, uniforms
from pipeline.views.masks import MaskSpec
from tests.data import stored
from tests.images import hostile as h

tv = pytest.importorskip("torchvision.transforms.v2.functional")

IMAGES, BATCH = 24, 8
SEED = 3


def grey_files() -> list[bytes]:
    """Grey and colour, PNG and JPEG, in turn; one numpy file; one that is broken."""
    files = []
    for i in range(IMAGES):
        picture = h.pattern(40 + i, 50 + i % 5, seed=i)
        picture = picture[..., 1] if i % 2 else picture
        files.append(h.encode(picture, ("PNG", "JPEG")[i // 2 % 2]))
    stream = io.BytesIO()
    np.save(stream, h.pattern(30, 33)[..., 0])
    files[4], files[5] = stream.getvalue(), h.broken("png_cut")
    return files


def six_files() -> list[bytes]:
    """Numpy files, 8 and 16 bits; one JPEG and one array of three channels, which cannot serve."""
    files = []
    for i in range(IMAGES):
        both = np.dstack([h.pattern(40 + i, 50, seed=i), h.pattern(40 + i, 50, seed=90 + i)])
        stream = io.BytesIO()
        np.save(stream, both.astype(np.uint16) * 256 + 7 if i % 3 else both)
        files.append(stream.getvalue())
    stream = io.BytesIO()
    np.save(stream, h.pattern())
    files[4], files[5] = stream.getvalue(), h.jpeg()
    return files


def pixels(encoded: bytes, channels: int) -> np.ndarray:
    """What the loop sees: uint8 [H, W, C]."""
    if encoded.startswith(b"\x93NUMPY"):
        array = np.load(io.BytesIO(encoded))
        array = (array // 256).astype(np.uint8) if array.dtype == np.uint16 else array
        return array.reshape(*array.shape[:2], channels)
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("L"))[..., None]


def shard(folder: Path, files: list[bytes], channels: int) -> tuple[Reading, StreamSpec]:
    table = pa.table(
        {"image": pa.array(files, pa.binary()), "label": pa.array(range(IMAGES), pa.int64())}
    )
    shards = stored(table, folder / "part.parquet", 10)
    values = tuple(0.1 + 0.1 * c for c in range(channels))
    reading = reading_of(shards, seed=SEED, global_batch=BATCH, window=BATCH)
    return reading, StreamSpec(
        columns=shards.columns,
        seed=SEED,
        global_batch=BATCH,
        steps_per_pass=reading.order.steps_per_pass,
        crops=CropSpec(global_size=28, local_size=14, local_crops=3, channels=channels),
        photometric=ph.PhotometricSpec(mean=values, std=values),
        masks=MaskSpec((2, 2), 0.5, (0.1, 0.5)),
        chunk=4,
        max_pixels=10_000,
    )


def chunks(reading: Reading, spec: StreamSpec) -> Iterator[tuple[int, Chunk]]:
    """A second pass too: the numbers of a pass are its own."""
    tasks = reading.tasks(0, 2 * spec.steps_per_pass)
    for portion in read_portions(tasks, spec.columns, spec.seed, spec.portion_images):
        for chunk in make_chunks(portion, spec):
            yield portion.pass_index, chunk


def cut(image: np.ndarray, box: list[int], flip: bool, side: int) -> torch.Tensor:
    """One crop, plane by plane: uint8 [C, side, side]."""
    top, left, height, width = box
    part = image[top : top + height, left : left + width].transpose(2, 0, 1).copy()
    planes = [
        functional.interpolate(
            torch.from_numpy(plane)[None, None], (side, side), mode="bicubic", antialias=True
        )[0, 0]
        for plane in part
    ]
    crop = torch.stack(planes)
    return crop.flip(2) if flip else crop


def colours(crop: torch.Tensor, row: list[float], spec: ph.PhotometricSpec) -> torch.Tensor:
    """Brightness, contrast, blur, solarize and normalisation of uint8 [C, H, W]."""
    x = crop.float() / 255
    for column in ph.ORDERS[int(row[ph.ORDER])] if row[ph.JITTER] else ():
        if column == ph.BRIGHTNESS:
            x = (x * row[column]).clamp(0, 1)
        elif column == ph.CONTRAST:
            x = (row[column] * x + (1 - row[column]) * x.mean()).clamp(0, 1)
    if row[ph.BLUR_SIGMA]:
        x = torch.cat([tv.gaussian_blur(p[None], [9, 9], [row[ph.BLUR_SIGMA]] * 2) for p in x])
    if row[ph.SOLARIZE]:
        x = tv.solarize(x, (128 - 1e-4) / 255)  # flat parts of 128 blur to 128 and round-off
    centre, scale = (torch.tensor(v)[:, None, None] for v in (spec.mean, spec.std))
    return (x - centre) / scale


@pytest.mark.parametrize(
    ("channels", "files", "lost"), [(1, grey_files, [5]), (6, six_files, [4, 5])]
)
def test_crops_and_views_equal_a_loop_over_the_images(channels, files, lost, tmp_path):
    encoded = files()
    reading, spec = shard(tmp_path, encoded, channels)
    seen: list[int] = []
    worst = 0.0
    for pass_index, chunk in chunks(reading, spec):
        assert chunk["global_crops"].shape == (4, 2, 28, 28, channels)
        assert chunk["local_crops"].shape == (4, 3, 14, 14, channels)
        views = Batch.from_chunk(chunk).views(spec.photometric)
        kept = np.flatnonzero(chunk["valid"])
        weights = np.ones(4) if views.weights is None else views.weights.numpy()
        np.testing.assert_array_equal(weights, chunk["valid"])
        u = uniforms(SEED, pass_index, chunk["image_ids"], spec.crops.draws, CROP_STREAM)
        for i in kept:
            label = int(chunk["labels"][i])
            seen.append(label)
            image = pixels(encoded[label], channels)
            boxes, flips = crop_boxes(u[i], image.shape[1], image.shape[0], spec.crops)
            for view, (box, flip) in enumerate(zip(boxes.tolist(), flips, strict=True)):
                is_global = view < 2
                crops = chunk["global_crops"] if is_global else chunk["local_crops"]
                number = view if is_global else view - 2
                crop = cut(image, box, bool(flip), 28 if is_global else 14)
                np.testing.assert_array_equal(crops[i, number], crop.permute(1, 2, 0))
                row = chunk["photometric"][i, view].tolist()
                actual = views.global_views if is_global else views.local_views
                ours = actual[number * 4 + i]  # bad images keep their place
                error = (ours - colours(crop, row, spec.photometric)).abs()
                if row[ph.SOLARIZE]:  # jumps at its threshold: a value or two may fall apart
                    error = error.flatten().sort().values[:-3]
                worst = max(worst, float(error.max()))
    assert worst < 5e-5  # round-off over a deviation of at least 0.1
    expected = [label for label in range(IMAGES) if label not in lost]
    assert sorted(set(seen)) == expected
    assert len(seen) == 2 * len(expected)


@pytest.mark.parametrize(
    ("channels", "files", "reasons"),
    [(1, grey_files, {5: "truncated"}), (6, six_files, {4: "undecodable", 5: "undecodable"})],
)
def test_what_cannot_serve_keeps_its_place_and_has_a_reason(channels, files, reasons, tmp_path):
    reading, spec = shard(tmp_path, files(), channels)
    reasons_found = {
        int(label): REASONS[reason]
        for _, chunk in chunks(reading, spec)
        for label, valid, reason in zip(
            chunk["labels"], chunk["valid"], chunk["reason"], strict=True
        )
        if not valid
    }
    assert reasons_found == reasons


def test_the_number_of_channels_changes_nothing_that_is_drawn(tmp_path):
    grey, colour = (tmp_path / name for name in ("grey", "colour"))
    files = grey_files()
    files[4] = h.jpeg()
    for folder in (grey, colour):
        folder.mkdir()
    ones, threes = chunks(*shard(grey, files, 1)), chunks(*shard(colour, files, 3))
    for (_, one), (_, three) in zip(ones, threes, strict=True):
        for name in ("image_ids", "labels", "photometric", "masks", "valid"):
            np.testing.assert_array_equal(one[name], three[name], err_msg=name)
        grey_ones = (one["labels"] % 2 == 1) & one[
            "valid"
        ]  # grey files: RGB is three times the same
        for name in ("global_crops", "local_crops"):
            for c in range(3):
                np.testing.assert_array_equal(
                    three[name][grey_ones][..., c], one[name][grey_ones][..., 0]
                )
