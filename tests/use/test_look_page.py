"""Pictures: sizes, scales, frames, and the page that shows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.images.shown import three_channels
from pipeline.report.page import write_report
from pipeline.use import pictures
from pipeline.use.looking import Seen
from pipeline.use.masks import Classes
from pipeline.use.page import draw, overview, sections

GREY = np.full((40, 60, 3), 128, np.uint8)


@pytest.mark.parametrize(
    ("size", "shown"),
    [((40, 60), (240, 360)), ((320, 100), (320, 100)), ((4000, 2000), (1600, 800))],
)
def test_small_images_are_enlarged_and_large_ones_reduced(
    size: tuple[int, int], shown: tuple[int, int]
) -> None:
    assert pictures.shown_size(*size) == shown


def test_channels_as_colours() -> None:
    assert three_channels(np.zeros((2, 3, 1), np.uint8)).shape == (2, 3, 3)
    assert three_channels(np.zeros((2, 3, 6), np.uint8)).shape == (2, 3, 3)


def test_heat_ranks_from_dark_to_light() -> None:
    values = torch.arange(6.0).view(1, 6)
    out = pictures.heat(np.full((10, 60, 3), 0, np.uint8), values)
    brightness = out.astype(int).sum(2)[5, 5::10]
    assert (np.diff(brightness) > 0).all()
    flat = pictures.heat(GREY, torch.ones(2, 2))  # nothing varies: no division by zero
    assert (flat == flat[0, 0]).all()


def test_heat_is_greyscale_beneath() -> None:
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 90
    same = pictures.heat(np.full((8, 8, 3), 30, np.uint8), torch.ones(2, 2), (0, 1))
    assert np.array_equal(pictures.heat(red, torch.ones(2, 2), (0, 1)), same)


def test_a_patch_is_a_square_of_its_colour() -> None:
    colours = torch.rand(2, 3, 3)
    out = pictures.patches(colours, (40, 60))
    for row, column in np.ndindex(2, 3):
        part = out[20 * row : 20 * row + 20, 20 * column : 20 * column + 20].reshape(-1, 3)
        assert np.array_equal(np.unique(part, axis=0)[0], (colours[row, column] * 255).round())


def test_only_classes_with_a_colour_are_painted() -> None:
    mask = np.array([[0, 1, 255]]).repeat(3, 0)
    pixels = np.full((3, 3, 3), 100, np.uint8)
    out = pictures.painted(pixels, mask, np.array([[0, 0, 0], [200, 0, 0]], np.uint8))
    assert out[0, :, 0].tolist() == [100, 160, 100]
    assert out[0, :, 1].tolist() == [100, 40, 100]


def test_a_frame_leaves_its_patch_as_it_is() -> None:
    out = pictures.framed(GREY, (1, 2), (4, 6))
    assert np.array_equal(out[10:20, 20:30], GREY[10:20, 20:30])
    assert (out[9, 20:30] == 255).all() and (out[8, 20:30] == 0).all()
    assert (pictures.framed(GREY, (3, 5), (4, 6))[:28] == 128).all()


def seen(images: int) -> Seen:
    return Seen(
        colours=[torch.rand(4, 6, 3) for _ in range(images)],
        shares=(0.5, 0.2, 0.1),
        foreground=0.4,
        attention=[torch.rand(6, 4, 6) for _ in range(images)],
        marked=(1, 1),
        similarity=[torch.rand(4, 6) for _ in range(images)],
        scores=[torch.rand(4, 6, 2) for _ in range(images)],
    )


def test_the_page_has_all_and_escapes_names(tmp_path: Path) -> None:
    classes = Classes((0, 255), ("around", "object"), background=True)
    images = [("<b>.jpg", GREY), ("b c.png", GREY)]
    full = list(draw(images, seen(2), classes))
    assert list(full[0].pictures) == [
        "image", "attention", "heads", "components", "similarity", "classes"
    ]  # fmt: skip
    assert full[0].mask is not None and full[0].mask.shape == (40, 60)
    drawn = [one.small(classes) for one in full]
    assert drawn[0].shares[1] == (full[0].mask == 1).mean()
    assert [one.file(i, "mask") for i, one in enumerate(drawn, 1)] == [
        "01-b-mask.png", "02-b-c-mask.png"
    ]  # fmt: skip
    page = sections(drawn, seen(2), classes, {"model": "m"}, ["c.jpg is not read: empty ()"])
    write_report(tmp_path / "look.html", "Look", page, limit=6_000_000)
    text = (tmp_path / "look.html").read_text()
    assert text.count("<img") == 12
    assert "&lt;b&gt;.jpg" in text and "<b>.jpg" not in text
    assert "c.jpg is not read" in text and "CLS and registers are left out" in text
    assert overview(drawn, "attention", 32).shape == (68, 68, 3)  # two pairs, one a row


@pytest.mark.parametrize(
    ("heads", "said"), [(16, "all heads, each"), (24, "the first 16 of 24 heads, each")]
)
def test_heads_that_are_left_out_are_counted(tmp_path: Path, heads: int, said: str) -> None:
    many = Seen([torch.rand(2, 2, 3)], (1.0,), 0.5, attention=[torch.rand(heads, 2, 2)])
    drawn = [one.small(None) for one in draw([("a.jpg", GREY)], many, None)]
    write_report(tmp_path / "look.html", "Look", sections(drawn, many, None, {}), limit=6_000_000)
    assert said in (tmp_path / "look.html").read_text()


def test_without_attention_the_page_says_why(tmp_path: Path) -> None:
    plain = Seen([torch.rand(2, 2, 3)], (1.0,), 0.5, no_attention="it has no CLS token")
    drawn = list(draw([("a.jpg", GREY)], plain, None))
    assert list(drawn[0].pictures) == ["image", "components"]
    write_report(tmp_path / "look.html", "Look", sections(drawn, plain, None, {}))
    assert "There is no attention: it has no CLS token." in (tmp_path / "look.html").read_text()
