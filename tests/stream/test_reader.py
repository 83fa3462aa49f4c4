"""Reading: the right bytes in the right place, and what travels with them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.shards.columns import image_id
from pipeline.shards.row_group import image_array
from pipeline.stream import reader as reading_module
from pipeline.stream.decoder import StreamSpec, make_chunks
from pipeline.stream.reader import EncodedImages, Reading, read_portions, reading_of
from pipeline.views.batch import Batch, Spent
from pipeline.views.crops import CropSpec
from pipeline.views.masks import MaskSpec
from pipeline.views.photometric import PhotometricSpec
from tests.data import encoded, noise, own_table, stored

IMAGES, BATCH = 30, 6


def picture(i: int) -> bytes:
    return encoded(noise(i, 20 + i, 40 - i % 7))


def hub(folder: Path, images: list[bytes | None]) -> Reading:
    table = pa.table({"image": pa.array(images, pa.binary()), "label": range(len(images))})
    shards = stored(table, folder / "a.parquet", 7)
    return reading_of(shards, seed=1, global_batch=BATCH, window=BATCH)


def spec_of(reading: Reading) -> StreamSpec:
    return StreamSpec(
        columns=reading.shards.columns,
        seed=1,
        global_batch=BATCH,
        steps_per_pass=reading.order.steps_per_pass,
        crops=CropSpec(global_size=16, local_size=8, local_crops=2),
        photometric=PhotometricSpec(),
        masks=MaskSpec((4, 4), 0.5, (0.1, 0.5)),
        chunk=2,
        max_pixels=10_000,
    )


def portions(reading: Reading, size: int) -> list[EncodedImages]:
    tasks = reading.tasks(0, 2 * reading.order.steps_per_pass)
    return list(read_portions(tasks, reading.shards.columns, 1, size))


@pytest.mark.parametrize("size", [1, 4, 100])
def test_each_image_is_where_the_order_says(tmp_path: Path, size: int) -> None:
    images: list[bytes | None] = [picture(i) for i in range(IMAGES)]
    images[3] = None
    reading = hub(tmp_path, images)
    dealt = [EncodedImages.of(p.table()) for p in portions(reading, size)]
    assert max(map(len, dealt)) == min(size, IMAGES)  # the window of a hub set is the set
    position = 0
    for portion in dealt:
        begin = portion.pass_index * reading.order.steps_per_pass * BATCH
        places = begin + portion.positions
        assert places.tolist() == list(range(position, position + len(portion)))
        for i, label in enumerate(portion.labels.tolist()):
            assert portion.image(i) == (images[label] or b"")
            assert bytes(portion.image_ids[i]).hex() == image_id(images[label] or b"")
        position += len(portion)
    labels = [label for p in dealt if p.pass_index == 0 for label in p.labels.tolist()]
    assert sorted(labels) == list(range(IMAGES))


def test_images_are_not_copied_when_a_row_group_or_a_block_is_opened() -> None:
    array = pa.array([b"abc" * 1000, b"def"], pa.binary())
    assert image_array(pa.chunked_array([array])).buffers()[2].address == array.buffers()[2].address
    table = EncodedImages(
        0, *(np.zeros(0),) * 5, encoded=b"x" * 4096, read_s=0.0, retries=0
    ).table()
    inside = table.column("encoded").chunk(0).buffers()[2]
    portion = EncodedImages.of(table)
    assert np.frombuffer(portion.encoded, np.uint8).ctypes.data == inside.address


def test_seconds_and_retries_travel_to_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = hub(tmp_path, [picture(i) for i in range(IMAGES - 1)] + [b"no image"])
    counts = iter(range(0, 1000, 3))  # three more at each look
    monkeypatch.setattr(reading_module, "retries", lambda: next(counts))
    dealt = portions(reading, 4)
    assert all(p.retries == 3 and p.read_s > 0 for p in dealt)
    chunks = [list(make_chunks(p, spec_of(reading))) for p in dealt]
    parts = [Batch.from_chunk(chunk) for several in chunks for chunk in several]
    spent = Batch.concat(parts).spent
    assert spent.images == 2 * IMAGES  # the bad one took time as well
    assert spent.retries == 3 * len(dealt)
    assert spent.read_s == pytest.approx(sum(p.read_s for p in dealt))
    assert spent.decode_s > 0 and spent.crop_s > 0
    assert Spent(1, 1, 2, 3, 4).plus(Spent(5, 6, 7, 8, 9)) == Spent(6, 7, 9, 11, 13)


def packed(folder: Path, images: list[bytes], error: int) -> Reading:
    """A shard as pack writes it, but with sizes that are wrong by so many pixels."""
    sizes = np.array([Image.open(io.BytesIO(image)).size for image in images], np.int32) + error
    width, height = sizes.T
    table = own_table(images, range(len(images)), width=width, height=height)
    shards = stored(table, folder / "part-00000.parquet", IMAGES)
    return reading_of(shards, seed=1, global_batch=BATCH, window=BATCH)


def test_a_shard_that_is_wrong_about_sizes_changes_no_crop(tmp_path: Path) -> None:
    images = [picture(i) for i in range(IMAGES)]
    right, wrong = packed(tmp_path / "a", images, 0), packed(tmp_path / "b", images, 5)
    assert not np.array_equal(portions(right, 6)[0].sizes, portions(wrong, 6)[0].sizes)
    for one, two in zip(portions(right, 6), portions(wrong, 6), strict=True):
        unknown = replace(one, sizes=np.zeros_like(one.sizes))
        for a, b, c in zip(
            *(make_chunks(p, spec_of(right)) for p in (one, two, unknown)), strict=True
        ):
            for name in ("global_crops", "local_crops"):
                np.testing.assert_array_equal(a[name], b[name])
                np.testing.assert_array_equal(a[name], c[name])


def test_the_spec_of_a_task_does_not_grow_with_the_set(tmp_path: Path) -> None:
    import pickle

    reading = hub(tmp_path, [picture(i) for i in range(IMAGES)])
    file = reading.shards.files[0]
    large = replace(reading.shards, files=(file,) * 1000)
    order = replace(reading.order, group_rows=np.tile(reading.order.group_rows, 1000))
    sizes = [
        [len(pickle.dumps(spec_of(r))), len(pickle.dumps(r.tasks(0, 5)))]
        for r in (reading, Reading(large, order))
    ]
    assert abs(sizes[0][0] - sizes[1][0]) < 100
    assert sizes[1][1] < 2 * sizes[0][1]


def test_a_portion_that_is_decoded_twice_counts_once() -> None:
    from pipeline.stream.dealer import Decoded

    decoded = Decoded(5, 20)
    for place, images in (((0, 0), 6), ((0, 6), 6), ((0, 0), 6), ((1, 0), 4)):
        decoded.note(place, images)
    assert decoded.missing == 4
