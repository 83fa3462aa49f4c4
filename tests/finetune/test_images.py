"""What a step is made of: the same images and crops whoever prepares them, and nothing lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.finetune import images as module
from pipeline.finetune.images import Batch, LabelledImages, Worker
from pipeline.shards.columns import image_id
from pipeline.views.crops import resize_centre_crop, resized
from tests.data import encoded
from tests.finetune.small import images, pixels, rows, settings, shards


def own(batch: Batch) -> np.ndarray:
    return batch.images[batch.own]


def all_steps(labelled: LabelledImages, steps: int = 7) -> list[Batch]:
    return list(labelled.batches(0, steps))


def test_an_epoch_has_every_image_once_and_each_epoch_another_order(tmp_path: Path) -> None:
    labelled = images(shards(tmp_path))
    assert labelled.steps_per_epoch == 3
    epochs = [[labelled.step_rows(3 * e + s) for s in range(3)] for e in range(2)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == list(range(12))
    assert not np.array_equal(epochs[0], epochs[1])


def test_large_sets_are_shuffled_in_windows_of_row_groups_in_random_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW_IMAGES", 8)
    labelled = images(shards(tmp_path, 24, group=4), batch_size=8)
    firsts = set()
    for epoch in range(4):
        parts = [labelled.step_rows(3 * epoch + step) for step in range(3)]
        assert sorted(np.concatenate(parts)) == list(range(24))
        for part in parts:  # two groups a window: what is read at once is bounded
            assert len({row // 4 for row in part.tolist()}) == 2
            assert part.tolist() != sorted(part)
        firsts.add(tuple(sorted({row // 4 for row in parts[0].tolist()})))
    assert len(firsts) > 1


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_neither_workers_nor_threads_nor_memory_change_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixup: float
) -> None:
    found = shards(tmp_path)
    alone = all_steps(images(found, mixup=mixup))
    monkeypatch.setattr(module, "CHUNK", 2)
    monkeypatch.setattr(module, "KEPT_BYTES", 1000)  # of two or three images
    others = [
        all_steps(images(found, Worker(rank, 3, threads=3), mixup=mixup)) for rank in range(3)
    ]
    for step, whole in enumerate(alone):
        parts = [other[step] for other in others]
        assert all(part.whole == whole.whole == 4 for part in parts)
        for what in (
            lambda b: b.images[b.own],
            lambda b: b.images[b.partner],
            lambda b: b.labels[b.own],
            lambda b: b.labels[b.partner],
            lambda b: b.share,
        ):
            assert np.array_equal(np.concatenate([what(part) for part in parts]), what(whole))
    assert mixup == 0 or len({float(x) for b in alone for x in b.share}) > 20


def test_a_later_start_goes_on_with_the_same_steps(tmp_path: Path) -> None:
    found = shards(tmp_path)
    whole, rest = all_steps(images(found)), list(images(found).batches(4, 7))
    assert len(rest) == 3
    for one, other in zip(whole[4:], rest, strict=True):
        assert np.array_equal(own(one), own(other))


def test_a_whole_unmirrored_crop_is_the_image_resized(tmp_path: Path) -> None:
    found = shards(tmp_path)
    labelled = images(found, crop_scale=(1.0, 1.0), flip=0.0, batch_size=12)
    (batch,) = all_steps(labelled, 1)
    number = {found_id: n for n, found_id in enumerate(map(bytes, rows(found).ids))}
    for at, row in zip(batch.own, labelled.step_rows(0), strict=True):
        picture = pixels(number[bytes(labelled.rows.ids[row])])
        assert batch.labels[at] == number[bytes(labelled.rows.ids[row])] % 2
        if picture.shape[0] == picture.shape[1]:  # of other shapes a crop is never all of it
            assert np.array_equal(batch.images[at], resized(picture, 8, 8))
    mirrored = images(found, crop_scale=(1.0, 1.0), flip=1.0, batch_size=12)
    (other,) = all_steps(mirrored, 1)
    assert np.array_equal(own(other), own(batch)[:, :, ::-1])


def test_a_bad_image_weighs_nothing_and_is_counted(tmp_path: Path) -> None:
    files = [encoded(pixels(number)) for number in range(8)]
    files[3] = b"not an image"
    found = shards(tmp_path, 8, 4, image=files, image_id=[image_id(x) for x in files])
    labelled = images(found, batch_size=8)
    (batch,) = all_steps(labelled, 1)
    assert batch.weights.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    assert not batch.images[3].any() and batch.images[4].any()
    assert labelled.bad == {
        image_id(files[3]): ("not_an_image", labelled.bad[image_id(files[3])][1])
    }
    scored = list(labelled.centre_crops(3))
    assert np.concatenate([at for _, at in scored]).tolist() == [0, 1, 2, 4, 5, 6, 7]


def test_a_row_that_another_epoch_keeps_meanwhile_is_still_read(tmp_path: Path) -> None:
    """With few images steps of two epochs are prepared at once, and both decode the same rows."""

    class KeptMeanwhile(dict[int, np.ndarray]):
        def get(self, row: int, default: object = None) -> None:  # asked before it is kept
            return None

    labelled = images(shards(tmp_path))
    expected = labelled._decoded(3, module._Held(np.ones(len(labelled.rows), bool)))
    labelled._kept = KeptMeanwhile(labelled._kept)
    again = labelled._decoded(3, module._Held(np.ones(len(labelled.rows), bool)))
    assert 3 in labelled._kept and expected is not None and again is not None
    np.testing.assert_array_equal(again, expected)


def test_scored_images_are_those_of_the_image_processor(tmp_path: Path) -> None:
    found = shards(tmp_path)
    labelled = LabelledImages(found, rows(found).part(1, 2), settings(), Worker(threads=2), 0)
    crops, at = zip(*labelled.centre_crops(4), strict=True)
    assert np.concatenate(at).tolist() == list(range(6))
    for number, crop in zip(range(6, 12), np.concatenate(crops), strict=True):
        assert np.array_equal(crop, resize_centre_crop(pixels(number), 8))
