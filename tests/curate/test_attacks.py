"""Nine copies: drawn by the id, and each what its name says."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.curate.threshold.attacks import ATTACKS, attack
from tests.curate.images import scene

RGB = scene(1, 160, 200)


def test_each_is_what_its_name_says():
    one = {name: attack(RGB, name, bytes(16)) for name in ATTACKS}
    assert len(one) == 9 and all(x.dtype == np.uint8 and x.ndim == 3 for x in one.values())
    stream = io.BytesIO()
    Image.fromarray(RGB).save(stream, "JPEG", quality=30)
    np.testing.assert_array_equal(one["jpeg"], np.asarray(Image.open(stream)))
    assert one["half"].shape == (80, 100, 3)
    np.testing.assert_array_equal(one["mirror"], RGB[:, ::-1])
    assert (one["grey"] == one["grey"][..., :1]).all()
    assert not one["rotate"][0, 0].any() or not one["rotate"][0, -1].any()  # black corners
    assert one["overlay"].shape[0] > 160 and np.abs(
        np.diff(one["blur"].astype(int), axis=1)
    ).mean() < (np.abs(np.diff(RGB.astype(int), axis=1)).mean())


def test_crops_keep_60_to_90_percent_and_are_cut_out():
    shares = []
    for n in range(60):
        crop = attack(RGB, "crop", n.to_bytes(16, "big"))
        shares.append(crop.shape[0] * crop.shape[1] / RGB[..., 0].size)
        windows = np.lib.stride_tricks.sliding_window_view(RGB[..., 0], crop.shape[:2])
        assert (windows[:, :, ::20, ::20] == crop[::20, ::20, 0]).all((2, 3)).any()
    assert 0.59 < min(shares) < 0.65 and 0.85 < max(shares) < 0.91


def test_strengths_depend_on_id_and_seed_alone():
    for name in ("crop", "light", "overlay", "rotate"):
        again = attack(RGB, name, b"a" * 16)
        np.testing.assert_array_equal(again, attack(RGB.copy(), name, b"a" * 16))
        others = [attack(RGB, name, bytes([n]) * 16, seed=n) for n in range(8)]
        assert any(x.shape != again.shape or (x != again).any() for x in others)


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (9, 9)])
def test_tiny_images(shape):
    rgb = scene(2, 200, 200)[: shape[0], : shape[1]]
    for name in ATTACKS:
        assert min(attack(np.ascontiguousarray(rgb), name, bytes(16)).shape[:2]) >= 1
