"""The rule of scaled decoding against plain loops and against crops of the whole image."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from pipeline.images.decode import decode_image, decode_shrunk
from pipeline.views.crops import (
    SHRINK_MARGIN,
    CropSpec,
    crop_boxes,
    cut_crops,
    decode_shrink,
    scale_boxes,
    uniforms,
)
from tests.images import hostile as h

SPEC = CropSpec(local_crops=3)
SIDES = [224, 224, 98, 98, 98]


def one_shrink(boxes: list[list[int]], margin: float) -> int:
    for shrink in (8, 4, 2):
        if all(
            height // shrink >= margin * side and width // shrink >= margin * side
            for (_, _, height, width), side in zip(boxes, SIDES, strict=True)
        ):
            return shrink
    return 1


@pytest.mark.parametrize("margin", [1.0, 1.5, 2.0])
def test_the_shrink_is_that_of_the_loop(margin):
    rng = np.random.default_rng(0)
    boxes = rng.integers(90, 6000, (3000, 5, 4)) * rng.random((3000, 1, 1))
    boxes = np.rint(boxes + np.array(SIDES)[:, None] * rng.integers(0, 9, (3000, 1, 1))).astype(int)
    shrinks = decode_shrink(boxes, SPEC, margin)
    assert shrinks.tolist() == [one_shrink(image, margin) for image in boxes.tolist()]
    assert set(shrinks.tolist()) == {1, 2, 4, 8}
    assert int(decode_shrink(boxes[7], SPEC, margin)) == shrinks[7]


def test_the_edges_of_the_rule():
    def shrink(side: int, margin: float = SHRINK_MARGIN) -> int:
        boxes = np.array([[0, 0, side, side]] * 2 + [[0, 0, 5000, 5000]] * 3)
        return int(decode_shrink(boxes, SPEC, margin))

    assert [shrink(n, 1) for n in (100, 447, 448, 895, 896, 1791, 1792)] == [1, 1, 2, 2, 4, 4, 8]
    assert [shrink(n) for n in (895, 896, 1791, 1792, 3583, 3584)] == [1, 2, 2, 4, 4, 8]
    assert [shrink(n, 1.5) for n in (671, 672, 1344, 2688)] == [1, 2, 4, 8]
    small = np.array([[0, 0, 5000, 5000]] * 4 + [[0, 0, 5000, 391]])  # one local crop, one side
    assert int(decode_shrink(small, SPEC)) == 1


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 9000), st.integers(1, 9000), st.data())
def test_boxes_stay_inside_near_their_place_and_large_enough(height, width, data):
    places = []
    for _ in SIDES:
        tall, wide = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        top, left = (
            data.draw(st.integers(0, height - tall)),
            data.draw(st.integers(0, width - wide)),
        )
        places.append((top, left, tall, wide))
    boxes = np.array(places, np.int64)
    for shrink in (1, 2, 4, 8):
        small = (-(-height // shrink), -(-width // shrink))
        scaled = scale_boxes(boxes, shrink, *small)
        assert scaled.dtype == np.int64 and scaled.shape == boxes.shape
        assert (scaled[:, :2] >= 0).all() and (scaled[:, 2:] >= 1).all()
        assert (scaled[:, :2] + scaled[:, 2:] <= small).all()
        assert (np.abs(scaled * shrink - boxes) <= shrink).all()
        assert shrink > 1 or (scaled == boxes).all()
    shrink = int(decode_shrink(boxes, SPEC, data.draw(st.sampled_from((1.0, 2.0)))))
    scaled = scale_boxes(boxes, shrink, -(-height // shrink), -(-width // shrink))
    enough = np.minimum(boxes[:, 2:], np.array(SIDES)[:, None])
    assert (scaled[:, 2:] >= enough).all()


def detailed(height: int, width: int) -> np.ndarray:
    """Smooth shapes with sharp edges, and no noise that any two filters would treat differently."""
    rows, columns = np.mgrid[0:height, 0:width] / 100
    planes = [np.sin(rows * 2 + columns), np.cos(columns * 3 - rows), np.sin(rows * columns / 9)]
    picture = np.stack(planes, -1) * 100 + 128
    picture[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 60)
    return np.clip(picture, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("value", [1, 6, 7])
def test_crops_of_the_smaller_image_are_those_of_the_whole(value):
    exif = Image.Exif()
    exif[0x0112] = value
    encoded = h.encode(detailed(1600, 2400), "JPEG", quality=92, exif=exif)
    spec = CropSpec(global_size=112, local_size=48, local_crops=6)
    ids = np.arange(64, dtype=np.uint8).reshape(4, 16)
    whole = decode_image(encoded)
    used = set()
    for u in uniforms(1, 0, ids, spec.draws):
        boxes, flips = crop_boxes(u, whole.shape[1], whole.shape[0], spec)
        image, shrink = decode_shrunk(encoded, int(decode_shrink(boxes, spec)))
        used.add(shrink)
        scaled = scale_boxes(boxes, shrink, *image.shape[:2])
        of_whole, others = (
            cut_crops(whole, boxes, flips, spec),
            cut_crops(image, scaled, flips, spec),
        )
        for a, b in zip(of_whole, others, strict=True):
            assert np.abs(a.astype(int) - b).mean() < 3.5
        # Moved by a tenth of the image they are others, so the bound above says something.
        moved = cut_crops(np.roll(whole, 160, 0), boxes, flips, spec)
        assert np.abs(of_whole[0].astype(int) - moved[0]).mean() > 10
    assert used and used <= {2, 4}
