"""The descriptor against scipy and plain loops."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn

from pipeline.curate.images import descriptor
from pipeline.curate.images.descriptor import describe, describe_grey, similarity, square, visiting
from tests.curate.images import scene


def reference(grey, top=0.0, left=0.0, side=1.0):
    """Of a window of [128, 128], the long way: every pixel cut into 50 x 50, 32 x 32 means, scipy's
    transform.
    """
    fine = 50

    def means(rows, start):
        edges = np.rint((start + side * np.arange(33) / 32) * 128 * fine).astype(int)
        tall = np.repeat(rows, fine, 0)
        return np.stack([tall[a:b].mean(0) for a, b in pairwise(edges)])

    small = means(means(grey, top).T, left).T
    waves = dctn(small, norm="ortho")[:12, :12].ravel()[1:]
    f = np.hypot(*np.divmod(np.arange(1, 144), 12))
    roots = np.sign(waves) * np.abs(waves) ** 0.25 * f ** (-1 / 3)
    return roots / np.linalg.norm(roots)


def grey_of(rgb):
    return square(Image.fromarray(rgb).convert("L"))


@pytest.mark.parametrize("seed", [1, 2])
def test_whole_and_crops_are_those_of_scipy(seed):
    rgb = scene(seed)
    full, crops = describe(rgb)
    assert full.dtype == np.float16 and crops.shape == (9, 143)
    np.testing.assert_allclose(full, reference(grey_of(rgb)), atol=2e-3)
    slack = 1 - 0.86
    np.testing.assert_allclose(crops[0], reference(grey_of(rgb), 0, 0, 0.86), atol=4e-3)
    np.testing.assert_allclose(crops[4], reference(grey_of(rgb), slack / 2, slack, 0.86), atol=4e-3)
    np.testing.assert_allclose(crops[8], reference(grey_of(rgb), 0.04, 0.04, 0.92), atol=4e-3)


def test_a_mirrored_image_differs_by_signs_alone():
    rgb = scene(3, 80, 128)
    full, crops = describe(rgb)
    mirrored, turned = describe(np.ascontiguousarray(rgb[:, ::-1]))
    np.testing.assert_array_equal(mirrored, full * descriptor.MIRROR)
    # left and right windows round differently, far below half precision
    places = [2, 1, 0, 4, 3, 7, 6, 5, 8]
    np.testing.assert_allclose(turned[places], crops * descriptor.MIRROR, atol=2e-4)


def test_what_shows_nothing_is_like_nothing():
    white, grey = (np.full((50, 60, 3), value, np.uint8) for value in (255, 90))
    noisy = white.copy()
    noisy[::7, ::5] = 254
    for image in (white, grey, noisy):
        full, crops = describe(image)
        assert not full.any() and not crops.any()
    a, b = (tuple(x[None] for x in describe(image)) for image in (white, grey))
    assert similarity(*a, *b, 0.0)[0] == 0


def test_a_batch_gives_the_bits_of_single_images():
    squares = np.stack([grey_of(scene(seed)) for seed in range(5)])
    full, crops = describe_grey(squares)
    for i, one in enumerate(squares):
        alone, views = describe_grey(one[None])
        assert alone[0].tobytes() == full[i].tobytes() and views[0].tobytes() == crops[i].tobytes()
    none, views = describe_grey(squares[:0])
    assert none.shape == (0, 143) and views.shape == (0, 9, 143)


def test_similarity_is_the_best_of_all_views():
    images = [scene(seed) for seed in range(6)]
    images[1] = np.ascontiguousarray(images[0][:, ::-1])
    images[3] = images[2][4:88, 6:110]
    full, crops = (np.stack(x) for x in zip(*map(describe, images), strict=True))
    a, b = np.array([0, 2, 3, 4, 5]), np.array([1, 3, 2, 5, 5])
    similarities = similarity(full[a], crops[a], full[b], crops[b], 0.05)
    for n, (i, j) in enumerate(zip(a, b, strict=True)):
        best = -2.0
        for x, y in ((i, j), (j, i)):
            whole = full[x].astype(float)
            for view, less in [(full[y], 0.0), *((c, 0.05) for c in crops[y])]:
                for sign in (1, descriptor.MIRROR.astype(float)):
                    best = max(best, float(whole @ (view.astype(float) * sign)) - less)
        assert similarities[n] == best
    same, cut, as_cut, other = similarities[:4]
    assert same > 0.99 and cut > 0.6 and cut == as_cut and other < 0.6
    visitors, is_crop = visiting(full, crops)
    assert visitors.shape == (6, 19, 143) and is_crop.tolist() == [False] + [True] * 18
