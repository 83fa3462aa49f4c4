"""What is flat: graphics of many kinds stay, and images that show nothing go."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.curate.images import quality
from pipeline.curate.images.measure import measure
from pipeline.curate.images.quality import Rules, marks
from pipeline.pack.demo.flaws import FLAT_TILES
from pipeline.pack.demo.tiles import make_demo
from tests.curate.graphics import EMPTY, GRAPHICS, empty, graphic

EACH = 50


def flat(images, rules=None):
    """Which of some images a rule calls flat, and the measures of all."""
    measured = [measure(image) for image in images]
    values = {name: np.array([getattr(m, name) for m in measured], float)
              for name in quality._MEASURES}  # fmt: skip
    values = quality._derived(values)
    reason, rule, _ = marks(np.zeros(len(measured), bool), values, rules or Rules(max_aspect=0))
    return reason == "flat", list(zip(rule, values["sharpness"], values["edges"], strict=True))


@pytest.mark.parametrize("kind", GRAPHICS)
def test_graphics_stay(kind):
    lost, about = flat([graphic(kind, number) for number in range(EACH)])
    assert lost.sum() == 0, [about[i] for i in np.flatnonzero(lost)]


@pytest.mark.parametrize("kind", EMPTY)
def test_what_shows_nothing_goes(kind):
    """Every other one as JPEG."""
    gone, about = flat([empty(kind, n, (0, 75, 0, 92)[n % 4]) for n in range(EACH)])
    # In doubt an image stays: a few small ones with much noise, as JPEG.
    allowed = 2 if kind == "sensor noise" else 0
    assert (~gone).sum() <= allowed, [(i, about[i]) for i in np.flatnonzero(~gone)]


def test_edges_save_from_three_rules_and_no_others():
    logo = [graphic("logo", 0)]
    strict = {"min_entropy": 3.0, "min_contrast": 200.0, "min_sharpness": 1e9, "max_aspect": 0}
    assert not flat(logo, Rules(**strict))[0].any()
    assert flat(logo, Rules(**strict, min_edges=0))[0].all()
    assert flat(logo, Rules(**strict, min_edges=1e6))[0].all()
    assert flat(logo, Rules(max_aspect=0, max_brightness=1.0))[0].all()


def test_fine_textures_are_no_noise():
    """Independent pixels of a large deviation, and small ones with larger structures under them."""
    rng = np.random.default_rng(0)
    gravel = [rng.integers(0, 256, (side, side, 3), np.uint8) for side in (32, 64, 160, 300)]
    low = [rng.integers(90, 150, (12, 12), np.uint8) for _ in range(8)]
    hills = [
        np.asarray(Image.fromarray(x).resize((200, 200), Image.Resampling.BICUBIC)) for x in low
    ]
    noisy = [
        (x[..., None] + rng.normal(0, 8, (200, 200, 3))).clip(0, 255).astype("u1") for x in hills
    ]
    assert not flat(gravel)[0].any() and not flat(noisy)[0].any()


@pytest.mark.long
def test_the_demos_flat_tiles_all_go_and_its_photographs_stay(tmp_path):
    make_demo(tmp_path / "demo")
    rules = Rules(min_sharpness=0.0)  # as in its recipe

    def found(pattern):
        files = sorted((tmp_path / "demo").rglob(pattern))
        files = files if "flat" in pattern else files[::8]
        return flat([np.asarray(Image.open(file).convert("RGB")) for file in files], rules)[0]

    planted, tiles = found("train/*/flat_*.jpg"), found("train/*/tile_*.jpg")
    assert len(planted) == FLAT_TILES == planted.sum()
    assert len(tiles) > 400 and not tiles.any()
