import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.stream.decoder import chunk_table
from pipeline.stream.worker import _micro_batches
from pipeline.views import photometric as ph
from pipeline.views.batch import Batch

B, L, S, s, P = 3, 4, 28, 14, 4
PLAIN = ph.PhotometricSpec(mean=(0.0,) * 3, std=(1 / 255,) * 3)


def chunk(images: int = B) -> dict[str, np.ndarray]:
    """Crop i of image j is filled with 10 * i + j, its parameters too, its mask is bit pattern."""
    value = (10 * np.arange(2 + L)[None, :] + np.arange(images)[:, None]).astype(np.uint8)
    filled = value[:, :, None, None, None]
    photometric = np.zeros((images, 2 + L, ph.PARAMS), np.float32)
    photometric[..., : ph.HUE] = 1
    masks = np.zeros((images, 2, P), bool)
    for image in range(images):
        for crop in range(2):
            masks[image, crop, (image + 2 * crop) % P] = True
    return {
        "image_ids": np.arange(images * 16, dtype=np.uint8).reshape(images, 16),
        "global_crops": np.broadcast_to(filled[:, :2], (images, 2, S, S, 3)).copy(),
        "local_crops": np.broadcast_to(filled[:, 2:], (images, L, s, s, 3)).copy(),
        "photometric": photometric,
        "masks": masks,
        "labels": np.arange(images, dtype=np.int64) - 1,
        "valid": np.ones(images, bool),
    }


def test_views_are_crop_major():
    views = Batch.from_chunk(chunk()).views(PLAIN)
    assert views.global_views.shape == (2 * B, 3, S, S) and views.images == B
    assert views.local_views.shape == (L * B, 3, s, s)
    expected = [10 * crop + image for crop in range(2 + L) for image in range(B)]
    ours = torch.cat((views.global_views[:, 0, 0, 0], views.local_views[:, 0, 0, 0]))
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float32))
    hidden = [(image + 2 * crop) % P for crop in range(2) for image in range(B)]
    assert views.masks.int().argmax(1).tolist() == hidden


def test_parameters_go_with_their_crop():
    data = chunk()
    data["photometric"][..., ph.JITTER] = 1
    factor = 0.5 + 0.1 * np.arange(2 + L) + 0.01 * np.arange(B)[:, None]
    data["photometric"][..., ph.BRIGHTNESS] = factor
    views = Batch.from_chunk(data).views(PLAIN)
    ours = torch.cat((views.global_views[:, 0, 0, 0], views.local_views[:, 0, 0, 0])).view(-1, B)
    expected = [
        [(10 * crop + image) * factor[image, crop] for image in range(B)] for crop in range(2 + L)
    ]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float32))


def test_views_dtype_and_another_photometric_function():
    batch = Batch.from_chunk(chunk())
    assert batch.views(PLAIN, torch.bfloat16).local_views.dtype == torch.bfloat16

    def only_scale(crops, params, spec, dtype):
        return crops.permute(0, 3, 1, 2).to(dtype)

    views = batch.views(PLAIN, photometric=only_scale)
    torch.testing.assert_close(views.global_views, batch.views(PLAIN).global_views)


FILLED = ("global_crops", "local_crops", "photometric")


def test_invalid_rows_are_listed_and_filled_with_another_image():
    data = chunk() | {
        "valid": np.array([True, False, True]),
        "reason": np.array(["", "truncated", ""]),
        "detail": np.array(["", "ends after 12 bytes", ""], dtype=object),
    }
    data["photometric"] += np.arange(B, dtype=np.float32)[:, None, None] / 8
    batch = Batch.from_chunk(data)
    assert batch.images == B and batch.weights.tolist() == [1, 0, 1]
    for name in FILLED:
        ours = getattr(batch, name).numpy()
        assert (ours[[0, 2]] == data[name][[0, 2]]).all() and (ours[1] == ours[0]).all()
    assert batch.masks.sum(dim=(1, 2)).tolist() == [2, 0, 2] and data["masks"].all(2).sum() == 0
    assert (batch.image_ids.numpy() == data["image_ids"]).all()
    identity = bytes(range(16, 32)).hex()
    assert batch.bad == ((identity, "truncated", "ends after 12 bytes"),)
    views = batch.views(PLAIN)
    assert views.weights.tolist() == [1, 0, 1] and views.global_views.shape[0] == 2 * B
    assert batch.without_fillers().labels.tolist() == [-1, 1]
    del data["reason"], data["detail"]
    assert Batch.from_chunk(data).bad == ((identity, "undecodable", ""),)


def test_a_chunk_of_bad_images_alone_is_black_and_each_is_listed_once():
    data = chunk() | {"valid": np.zeros(B, bool)}
    data["global_crops"] += 9
    parts = [Batch.from_chunk(data), Batch.from_chunk(chunk(2))]
    batch = Batch.concat(parts)
    assert batch.weights.tolist() == [0] * B + [1] * 2
    assert not batch.global_crops[:B].any() and not batch.local_crops[:B].any()
    assert not batch.masks[:B].any() and batch.masks[B:].any()
    assert [identity for identity, *_ in batch.bad] == [
        bytes(range(16 * i, 16 * i + 16)).hex() for i in range(B)
    ]
    assert [part.weights.tolist() for part in batch.split(5)] == [[0]] * B + [[1]] * 2
    assert [len(part.bad) for part in batch.split(5)] == [B, 0, 0, 0, 0]
    assert batch.without_fillers().images == 2
    assert Batch.concat([Batch.from_chunk(chunk()), Batch.from_chunk(chunk())]).weights is None


def test_concat_and_split_are_inverse():
    first, second = chunk(2), chunk(4)
    second["valid"][0] = False
    batch = Batch.concat([Batch.from_chunk(first), Batch.from_chunk(second)])
    assert batch.images == 6 and len(batch.bad) == 1
    with pytest.raises(DataError, match="6 images does not divide into 4 parts"):
        batch.split(4)
    parts = batch.split(6)
    again = Batch.concat(parts)
    for name in (*FILLED, "image_ids", "masks", "labels", "weights"):
        assert torch.equal(getattr(again, name), getattr(batch, name))
    assert again.bad == batch.bad and [p.images for p in parts] == [1] * 6


def test_moving_leaves_the_photometric_numbers_on_the_host():
    batch = Batch.from_chunk(chunk()).to("meta")
    assert batch.global_crops.device.type == batch.masks.device.type == "meta"
    assert batch.photometric.device.type == "cpu"


def test_read_only_arrays_and_no_local_crops():
    data = chunk()
    data["local_crops"] = data["local_crops"][:, :0]
    data["photometric"] = data["photometric"][:, :2]
    for array in data.values():
        array.flags.writeable = False
    views = Batch.from_chunk(data).views(PLAIN)
    assert views.local_views.shape == (0, 3, s, s) and views.images == B


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("masks", lambda x: x[:, :1], r"masks of a chunk is bool \[3, 1, 4\], expected bool"),
        ("global_crops", lambda x: x[:, :, :5], r"global_crops .*expected uint8 \[B, 2, S, S, C\]"),
        ("photometric", lambda x: x[:, :5], r"photometric .*L = 4"),
        ("labels", lambda x: x.astype(np.int32), "labels of a chunk is int32"),
        ("valid", lambda x: x[:2], "valid of a chunk is bool"),
        ("image_ids", lambda x: x[:, :8], "image_ids"),
    ],
)
def test_wrong_arrays_are_named(name, change, message):
    data = chunk()
    data[name] = change(data[name])
    with pytest.raises(DataError, match=message):
        Batch.from_chunk(data)


def test_a_missing_array_is_named():
    data = chunk()
    del data["labels"]
    with pytest.raises(DataError, match="no 'labels'"):
        Batch.from_chunk(data)


def test_a_micro_batch_has_as_many_images_whatever_could_be_decoded() -> None:
    bad, good = chunk(), chunk()
    bad["valid"][:] = False
    size = len(bad["valid"])

    def counted(*chunks: dict[str, np.ndarray]) -> list[tuple[int, int, int]]:
        tables = [chunk_table(one | {"reason": np.zeros(size, np.int8)}) for one in chunks]
        batches = list(_micro_batches(iter(tables), 2, 1, False))
        return [(b.images, int(b.weights_or_ones.sum()), len(b.bad)) for b in batches]

    assert counted(bad, good, good, bad, bad, bad, good, good) == [
        (2 * size, size, size),
        (2 * size, size, size),
        (2 * size, 0, 2 * size),
        (2 * size, 2 * size, 0),
    ]


def test_micro_batches_hold_the_same_images_for_any_number_of_workers():
    """Twelve chunks a step, six micro batches of two: dealt to 6, 3, 2 and 1 workers."""

    def tables(step: int) -> list:
        blocks = []
        for number in range(12):
            one = chunk(1) | {"reason": np.zeros(1, np.int8)}
            one["image_ids"] = np.full((1, 16), 12 * step + number, np.uint8)
            blocks.append(chunk_table(one))
        return blocks

    def dealt(workers: int) -> dict[tuple[int, int], list[int]]:
        each = 6 // workers
        ids = {}
        for rank in range(workers):
            mine = [table for step in range(2) for table in tables(step)[rank::workers]]
            for number, batch in enumerate(_micro_batches(iter(mine), 2, each, False)):
                step, part = divmod(number, each)
                ids[step, rank + part * workers] = batch.image_ids[:, 0].tolist()
        return ids

    expected = {(s, g): [12 * s + g, 12 * s + g + 6] for s in range(2) for g in range(6)}
    for workers in (6, 3, 2, 1):
        assert dealt(workers) == expected
