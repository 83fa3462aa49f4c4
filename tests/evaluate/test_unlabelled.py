"""Scores without labels, against ten-line versions and against truth that is planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.errors import DataError
from pipeline.evaluate import unlabelled
from pipeline.evaluate.unlabelled import (
    alignment,
    patch_smoothness,
    rank_me,
    singular_values,
    uniformity,
)


def features(count: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=generator)
    return mixed @ torch.randn(width, width, generator=generator) + 0.5


@pytest.mark.parametrize("shape", [(300, 12), (12, 12), (7, 30), (1, 4)])
def test_rank_me_is_equation_1(shape: tuple[int, int]) -> None:
    z = features(*shape)
    values = np.linalg.svd(z.double().numpy(), compute_uv=False)
    p = values / np.abs(values).sum() + 1e-7
    assert rank_me(z) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert rank_me(100 * z) == pytest.approx(rank_me(z), rel=1e-6)


@pytest.mark.parametrize("directions", [1, 3, 8])
def test_rank_me_counts_planted_directions(directions: int) -> None:
    basis, _ = torch.linalg.qr(
        torch.randn(20, directions, generator=torch.Generator().manual_seed(1))
    )
    z = torch.eye(directions).repeat(50, 1) @ basis.T
    assert rank_me(z) == pytest.approx(directions, rel=1e-4)  # 1e-7 is added to each of 20 shares


def test_rank_me_rises_with_the_images_up_to_the_width() -> None:
    ranks = [
        rank_me(torch.randn(n, 64, generator=torch.Generator().manual_seed(0)))
        for n in (16, 64, 4096)
    ]
    assert ranks[0] < 16 and ranks == sorted(ranks) and 62 < ranks[2] <= 64


def test_singular_values_keep_small_directions() -> None:
    """A direction of 1e-9 would drown in the squares of a Gram matrix."""
    z = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)).double()
    z[:, 5] *= 1e-9
    expected = np.linalg.svd(z.numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(z), expected, rtol=1e-6)


def test_what_has_no_rank() -> None:
    assert math.isnan(rank_me(torch.tensor([[1.0, math.nan], [0.0, 1.0]])))
    assert rank_me(torch.zeros(5, 3)) == 0
    with pytest.raises(DataError, match="0 images are too few"):
        rank_me(torch.zeros(0, 3))


@pytest.mark.parametrize("pairs_at_once", [1, 40, 1 << 24])
def test_uniformity_is_a_mean_over_pairs(
    pairs_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unlabelled, "PAIRS_AT_ONCE", pairs_at_once)
    z = features(23, 5)
    unit = functional.normalize(z.double(), dim=1)
    expected = torch.pdist(unit).square().mul(-2).exp().mean().log()
    assert uniformity(z) == pytest.approx(float(expected), abs=1e-6)


def test_uniformity_of_planted_spreads() -> None:
    assert uniformity(torch.ones(9, 4)) == pytest.approx(0, abs=1e-9)
    assert uniformity(torch.eye(50)) == pytest.approx(-4)  # all at right angles
    with pytest.raises(DataError, match="1 images are too few"):
        uniformity(torch.ones(1, 4))


def test_alignment_is_a_squared_distance() -> None:
    x, copies = features(6, 4), features(18, 4, 1).view(6, 3, 4)
    values = alignment(x, copies)
    assert values.shape == (6, 3)
    for i in range(6):
        for a in range(3):
            one, other = (v.double() / v.double().norm() for v in (x[i], copies[i, a]))
            assert float(values[i, a]) == pytest.approx(float(((one - other) ** 2).sum()), abs=1e-6)
    assert float(alignment(x, 3 * x[:, None]).max()) == pytest.approx(0, abs=1e-9)
    right_angle = alignment(torch.tensor([[1.0, 0]]), torch.tensor([[[0, 2.0]]]))
    assert float(right_angle) == pytest.approx(2)


def test_patch_smoothness_is_a_loop_over_pairs() -> None:
    rows, columns = 3, 4
    patches = features(2 * 12, 5).view(2, 12, 5)
    values = patch_smoothness(patches, (rows, columns))
    for image, value in zip(patches.double(), values, strict=True):
        near, every = [], []
        for p in range(12):
            for q in range(p + 1, 12):
                cosine = float(functional.cosine_similarity(image[p], image[q], dim=0))
                every.append(cosine)
                apart = abs(p // columns - q // columns) + abs(p % columns - q % columns)
                if apart == 1:
                    near.append(cosine)
        assert len(near) == 17
        assert float(value) == pytest.approx(np.mean(near) - np.mean(every), abs=1e-6)


def test_smooth_patches_and_patches_in_any_order() -> None:
    steps = torch.linspace(0, 3, 64)
    smooth = torch.stack([steps.cos(), steps.sin()], 1)[None]
    shuffled = smooth[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    assert float(patch_smoothness(smooth, (1, 64))) > 0.4
    assert abs(float(patch_smoothness(shuffled, (1, 64)))) < 0.1
    assert float(patch_smoothness(torch.ones(1, 64, 3), (8, 8))) == pytest.approx(0, abs=1e-9)
    for number, grid in ((64, (8, 7)), (1, (1, 1))):
        with pytest.raises(DataError, match=f"{number} patches are not the patches of a grid"):
            patch_smoothness(torch.ones(1, number, 3), grid)
