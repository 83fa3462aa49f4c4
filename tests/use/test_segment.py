"""Masks from a reference: exact on made shapes, and equal to brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import PipelineError
from pipeline.use.network import fitted, patch_maps
from pipeline.use.segment import (
    TEMPERATURE,
    VOID,
    Reference,
    class_shares,
    patch_at,
    pixel_classes,
    segment,
    similarity,
    upsampled,
)
from tests.use.made import SPEC, Colours, drawn, images

RED_GREEN_BLUE = torch.eye(3)
METHODS = ["mean", "nearest"]


def painted(mask: Tensor) -> Tensor:
    """Masks `[B, H, W]` of classes 0 to 2 as images in three colours, with some noise."""
    noise = images(len(mask), *mask.shape[1:], seed=3) * 0.05
    return RED_GREEN_BLUE[mask].permute(0, 3, 1, 2) + noise


def bands(*bounds: int) -> Tensor:
    """Classes 0, 1, 2, 0, … from left to right, `[1, 48, 64]`."""
    columns = torch.bucketize(torch.arange(64), torch.tensor(bounds), right=True) % 3
    return columns.expand(1, 48, 64).contiguous()


@pytest.mark.parametrize("method", METHODS)
def test_made_shapes_are_found_to_the_pixel(method: str) -> None:
    reference, target = bands(24, 40), bands(8, 32, 56)
    made = segment(Colours(), painted(target), painted(reference), reference, method)  # type: ignore[arg-type]
    assert torch.equal(made, target)
    one, other = (reference == 1).long(), (target == 1).long()  # a thing and what is around it
    made = segment(Colours(), painted(other), painted(one), one, method)  # type: ignore[arg-type]
    assert torch.equal(made, other)


@pytest.mark.parametrize("method", METHODS)
def test_made_shapes_of_any_form_are_found_to_the_patch(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    grid = torch.randint(3, (2, 6, 8), generator=generator)
    whole = grid.repeat_interleave(8, 1).repeat_interleave(8, 2)
    reference = Reference.of(patch_maps(Colours(), painted(whole[:1])), whole[:1])
    scores = reference.scores(patch_maps(Colours(), painted(whole[1:])), method)  # type: ignore[arg-type]
    assert torch.equal(scores.argmax(-1), grid[1:])


def test_by_the_mean_patch_in_ten_lines() -> None:
    network, x, y = drawn(SPEC), images(2, 28, 42), images(2, 35, 28, seed=1)
    masks = torch.randint(3, (2, 35, 28), generator=torch.Generator().manual_seed(2))
    masks[0, :9] = VOID
    reference = Reference.of(patch_maps(network, y), masks)
    scores = reference.scores(patch_maps(network, x))
    tokens = F.normalize(patch_maps(network, y), dim=-1).numpy()
    for one in range(3):
        total = np.zeros(48)
        for r, i, j in np.ndindex(2, 5, 4):
            under = masks[r, 7 * i : 7 * i + 7, 7 * j : 7 * j + 7]
            total += tokens[r, i, j] * float((under == one).float().mean())
        expected = patch_maps(network, x).numpy() @ (total / np.linalg.norm(total))
        expected = expected / np.linalg.norm(patch_maps(network, x).numpy(), axis=-1)
        np.testing.assert_allclose(scores[..., one].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 10_000])
def test_by_the_nearest_patches_by_brute_force(k: int) -> None:
    network, x, y = drawn(SPEC), images(1, 28, 42), images(2, 35, 28, seed=1)
    masks = torch.randint(3, (2, 35, 28), generator=torch.Generator().manual_seed(2))
    masks[1] = VOID
    masks[0, 20:] = VOID
    reference = Reference.of(patch_maps(network, y), masks)
    scores = reference.scores(patch_maps(network, x), "nearest", k)
    known = patch_maps(network, y)[0].flatten(0, 1).double().numpy()
    known = known / np.linalg.norm(known, axis=1, keepdims=True)
    shares = class_shares(masks[0], (5, 4), 3).flatten(0, 1).numpy()
    known, shares = known[shares.sum(1) > 0], shares[shares.sum(1) > 0]
    for patch, votes in zip(
        patch_maps(network, x)[0].flatten(0, 1), scores[0].flatten(0, 1), strict=True
    ):
        unit = patch.double().numpy() / np.linalg.norm(patch.double().numpy())
        cosines = known @ unit
        best = sorted(range(len(known)), key=lambda t: -cosines[t])[:k]
        weights = np.array([np.exp(cosines[t] / TEMPERATURE) for t in best])
        expected = sum(w * shares[t] for w, t in zip(weights / weights.sum(), best, strict=True))
        np.testing.assert_allclose(votes.numpy(), expected, atol=1e-4)


def test_similarity_is_the_cosine() -> None:
    patches = images(2, 4, 5, channels=6)  # any floats: [2, 6, 4, 5]
    one = patches[0, 0, 0]
    expected = torch.cosine_similarity(patches, one[None, None, None], dim=-1)
    torch.testing.assert_close(similarity(patches, one), expected)
    assert similarity(patches, one)[0, 0, 0] == pytest.approx(1)
    assert similarity(patches, torch.stack([one, -one])).shape == (2, 6, 4, 2)
    assert similarity(torch.zeros(5), one) == 0


def test_upsampling_keeps_the_middle_of_each_patch() -> None:
    scores = torch.rand(1, 3, 4, 2, generator=torch.Generator().manual_seed(0))
    wide = upsampled(scores, (9, 12))
    assert wide.shape == (1, 2, 9, 12)
    torch.testing.assert_close(wide[0, :, 1::3, 1::3], scores[0].permute(2, 0, 1))


def test_class_by_class_is_the_highest_score() -> None:
    scores = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = upsampled(scores, (20, 31)).argmax(1)
    assert torch.equal(pixel_classes(scores, (20, 31)), expected)
    assert (pixel_classes(torch.ones(1, 2, 2, 3), (4, 4)) == 0).all()  # the first of equals


def test_a_pixel_belongs_to_the_patch_that_covers_it() -> None:
    covered = torch.zeros(42, 28, dtype=torch.long)
    for y, x in np.ndindex(42, 28):
        row, column = patch_at(x, y, (42, 28), (6, 4))
        assert (row, column) == (y // 7, x // 7)
        covered[y, x] = row * 4 + column
    assert covered.unique().numel() == 24
    assert patch_at(99, 49, (50, 100), (3, 7)) == (2, 6)
    with pytest.raises(PipelineError, match="pixel 28,0 of an image of 28 x 42 pixels"):
        patch_at(28, 0, (42, 28), (6, 4))


def test_sentences() -> None:
    maps = torch.randn(1, 2, 2, 4)
    with pytest.raises(PipelineError, match="2 masks for 1 reference images"):
        Reference.of(maps, torch.zeros(2, 4, 4, dtype=torch.long))
    with pytest.raises(PipelineError, match="is empty"):
        Reference.of(maps, torch.full((1, 4, 4), VOID))
    with pytest.raises(PipelineError, match="masks of one class"):
        Reference.of(maps, torch.zeros(1, 4, 4, dtype=torch.long))
    with pytest.raises(PipelineError, match="class 0 is in no reference mask"):
        Reference.of(maps, torch.ones(1, 4, 4, dtype=torch.long))
    with pytest.raises(PipelineError, match="only one vector an image"):
        patch_maps(torch.nn.Flatten(), images(1, 28, 28))


@pytest.mark.parametrize(("height", "width"), [(480, 360), (100, 333), (5, 900), (28, 28)])
def test_fitted_images_are_whole(height: int, width: int) -> None:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, width // 2 :] = 200
    out = fitted(pixels, 56, 7)
    scale = 56 / min(height, width)
    assert out.shape[0] % 7 == 0 and out.shape[1] % 7 == 0 and min(out.shape[:2]) == 56
    for was, length in ((height, out.shape[0]), (width, out.shape[1])):
        assert abs(was * scale - length) <= 3.5
    assert out[0, 0, 0] == 0 and out[-1, -1, 0] == 200


@pytest.mark.parametrize("shape", [(7,), (), (1, 2, 3)])
def test_a_reference_of_another_width_is_one_sentence(shape: tuple[int, ...]) -> None:
    with pytest.raises(PipelineError, match="cannot be compared with"):
        similarity(torch.randn(4, 4, 3), torch.randn(shape))
