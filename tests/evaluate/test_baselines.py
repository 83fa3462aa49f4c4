"""Small pixels, colours and the most frequent class, against loops and numpy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import DataError
from pipeline.evaluate.baselines import (
    colour_vectors,
    colour_width,
    majority_hits,
    pixel_vectors,
    pixel_width,
    without_mean,
)
from pipeline.evaluate.features import LabelledFeatures
from pipeline.evaluate.neighbours.knn import knn_classify
from pipeline.images.decode import decode_image
from tests.data import noise


def test_pixels_are_means_of_squares() -> None:
    images = np.stack([noise(seed, 48) for seed in range(3)])
    vectors = pixel_vectors(images)
    assert vectors.dtype == torch.float32 and vectors.shape == (3, pixel_width(3))
    squares = images.reshape(3, 16, 3, 16, 3, 3).mean((2, 4))
    np.testing.assert_allclose(
        vectors.view(3, 3, 16, 16).permute(0, 2, 3, 1), squares / 255, atol=1e-6
    )


@pytest.mark.parametrize("side", [7, 16, 50])
def test_squares_of_other_sizes_overlap(side: int) -> None:
    image = noise(1, side)[..., :1]
    vector = pixel_vectors(image[None]).view(16, 16)
    for row, column in ((0, 0), (3, 9), (15, 15)):
        (top, bottom), (left, right) = (
            (i * side // 16, -(-(i + 1) * side // 16)) for i in (row, column)
        )
        assert float(vector[row, column]) == pytest.approx(
            image[top:bottom, left:right].mean() / 255, abs=1e-6
        )


def test_colours_are_counted_as_a_loop_counts_them() -> None:
    images = np.stack([noise(seed, 9) for seed in range(4)])
    vectors = colour_vectors(images)
    assert vectors.shape == (4, colour_width(3)) == (4, 512)
    for vector, image in zip(vectors, images, strict=True):
        counts = Counter(tuple((pixel // 32).tolist()) for pixel in image.reshape(-1, 3))
        for (red, green, blue), count in counts.items():
            place = 64 * red + 8 * green + blue
            assert float(vector[place]) == pytest.approx((count / 81) ** 0.5, abs=1e-6)
        assert int((vector > 0).sum()) == len(counts)


def test_a_cosine_of_colours_is_the_overlap_of_two_histograms() -> None:
    dark, bright = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 255, np.uint8)
    half = np.concatenate([dark[:, :4], bright[:, 4:]], 1)
    one, other, both = (colour_vectors(x)[0] for x in (dark, bright, half))
    assert float(one @ other) == 0
    assert float(one @ both) == pytest.approx(0.5**0.5)  # sqrt(1 * 0.5), Bhattacharyya
    shuffled = half.reshape(1, 64, 3)[:, np.random.default_rng(0).permutation(64)]
    torch.testing.assert_close(colour_vectors(shuffled.reshape(half.shape))[0], both)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_colours_of_other_channels_are_counted_each_by_itself(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 10, 10, channels)).astype(np.uint8)
    vectors = colour_vectors(images)
    assert vectors.shape == (3, colour_width(channels))
    for vector, image in zip(vectors, images, strict=True):
        counts = [
            np.histogram(image[..., c], 64, (0, 256))[0] / (100 * channels) for c in range(channels)
        ]
        np.testing.assert_allclose(vector, np.sqrt(np.concatenate(counts)), atol=1e-6)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))


def test_the_majority_is_right_where_the_class_is() -> None:
    reference = np.array([-1, -1, -1, 2, 2, 1, 0, 2])
    assert majority_hits(reference, np.array([2, 1, -1, 2])).tolist() == [True, False, False, True]
    balanced = np.repeat(np.arange(4), 5)
    assert majority_hits(balanced, balanced).mean() == 0.25
    with pytest.raises(DataError, match="no image of the reference has a label"):
        majority_hits(np.array([-1, -1]), np.array([0]))


def _cifar(folder: Path, name: str, every: int) -> tuple[Any, torch.Tensor]:
    images, labels = [], []
    for path in sorted(folder.glob(f"{name}-*")):
        table = pq.read_table(path)
        picked = table.take(np.arange(0, len(table), every))
        images += [decode_image(one["bytes"]) for one in picked["image"].to_pylist()]
        labels += picked["label"].to_pylist()
    return np.stack(images), torch.tensor(labels)


@pytest.mark.long
def test_real_photos_are_told_apart_better_than_by_chance_by_both(shared: Path) -> None:
    folder = shared / "data" / "cifar10"
    (images, labels), (asked, truth) = _cifar(folder, "train", 25), _cifar(folder, "test", 25)
    accuracy = {}
    for name, vectors in (("pixels", pixel_vectors), ("colours", colour_vectors)):
        sets = without_mean(vectors(images), vectors(asked))
        voters, queries = (
            LabelledFeatures(x, y) for x, y in zip(sets, (labels, truth), strict=True)
        )
        accuracy[name] = knn_classify(voters, queries)[20]
    # 2,000 vote and 400 are asked: 0.46 and 0.41 with all 50,000 and 10,000; chance is 0.1.
    assert 0.2 < accuracy["pixels"] < 0.55 and 0.2 < accuracy["colours"] < 0.55
