"""Mean IoU against plain loops; the linear layer on classes that patches tell apart or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.evaluate.dense.fit import UNKNOWN_CLASS, Schedule, moments, sampled
from pipeline.evaluate.dense.segmentation import LinearClasses, class_ious, confusion, overlaps
from pipeline.evaluate.score import Score

SHORT = Schedule(steps=60, batch=4, lr=3e-2)


def pictures(seed: int, images: int = 5, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers and truths [n, 12, 10], a third of the pixels right by construction; some void."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, classes, (images, 12, 10))
    answer = np.where(
        random.random(truth.shape) < 0.3, truth, random.integers(0, classes, truth.shape)
    )
    truth[random.random(truth.shape) < 0.1] = UNKNOWN_CLASS
    return torch.from_numpy(answer), torch.from_numpy(truth)


def plain_iou(answer: torch.Tensor, truth: torch.Tensor, one: int) -> float:
    """IoU of one class over the pixels of all images."""
    both = either = 0
    for a, t in zip(answer.flatten().tolist(), truth.flatten().tolist(), strict=True):
        if t != UNKNOWN_CLASS:
            both += a == one and t == one
            either += a == one or t == one
    return both / either if either else float("nan")


def miou(answer: torch.Tensor, truth: torch.Tensor, classes: int) -> Score:
    terms = [overlaps(confusion(a, t, classes)) for a, t in zip(answer, truth, strict=True)]
    ids = np.arange(16 * len(terms), dtype=np.uint8).reshape(-1, 16)
    return Score("segmentation_linear_miou", np.stack(terms), ids, "mean_iou")


@pytest.mark.parametrize("seed", range(4))
def test_mean_iou_equals_a_plain_loop(seed: int) -> None:
    answer, truth = pictures(seed)
    expected = [plain_iou(answer, truth, one) for one in range(4)]
    assert class_ious(confusion(answer, truth, 4)) == pytest.approx(expected, abs=1e-12)
    assert miou(answer, truth, 4).value == pytest.approx(np.mean(expected), abs=1e-12)


def test_a_class_that_is_nowhere_does_not_count() -> None:
    answer, truth = pictures(0, classes=3)
    assert miou(answer, truth, 5).value == pytest.approx(miou(answer, truth, 3).value, abs=1e-12)
    assert np.isnan(class_ious(confusion(answer, truth, 5))[3:]).all()


def test_a_class_that_is_only_answered_counts_as_nought() -> None:
    answer, truth = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]])
    assert miou(answer, truth, 3).value == pytest.approx((1 + 1 / 2 + 0) / 3)


def test_void_is_neither_right_nor_wrong() -> None:
    answer, truth = torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, UNKNOWN_CLASS]])
    assert miou(answer, truth, 2).value == 1


def test_moments_are_those_of_numpy() -> None:
    tokens = torch.randn(70, 3, 2, 5, generator=torch.Generator().manual_seed(0)) * 3 + 100
    tokens[..., 4] = 7
    mean, deviation = moments(tokens)
    flat = tokens.reshape(-1, 5).double().numpy()
    assert mean.numpy() == pytest.approx(flat.mean(0), rel=1e-6)
    assert deviation.numpy()[:4] == pytest.approx(flat.std(0)[:4], rel=1e-6)
    assert deviation[4] == 1  # constant: not divided by 0


@pytest.mark.parametrize("side", [3, 4, 7, 20])
def test_a_sampled_map_is_its_middles_and_where_they_are_unknown_what_is_known(side: int) -> None:
    random = np.random.default_rng(side)
    values = random.integers(1, 99, (12, 10)) * (random.random((12, 10)) < 0.3)
    small = sampled(torch.from_numpy(values), side)[0]
    for row in range(side):
        for column in range(side):
            middle = values[int((row + 0.5) * 12 / side), int((column + 0.5) * 10 / side)]
            cell = values[
                row * 12 // side : -(-(row + 1) * 12 // side),
                column * 10 // side : -(-(column + 1) * 10 // side),
            ].flatten()
            known = cell[cell > 0]
            expected = middle or (known[0] if len(known) else 0)
            assert small[row, column] == expected


def planted(separation: float, images: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches [n, 6, 6, 5] whose first feature says the class of the patch, masks at four times."""
    random = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 3, (images, 6, 6), generator=random)
    tokens = torch.randn(images, 6, 6, 5, generator=random)
    tokens[..., :3] += separation * torch.nn.functional.one_hot(classes, 3)
    masks = classes.repeat_interleave(4, 1).repeat_interleave(4, 2).to(torch.uint8)
    return tokens * 100 + 1000, masks  # of no mean and deviation that a layer would like


def test_the_layer_finds_classes_that_patches_say() -> None:
    tokens, masks = planted(20)
    layer = LinearClasses.fitted(tokens, masks, 3, SHORT)
    centres = layer.scores(tokens).argmax(-1)
    assert (centres == masks[:, ::4, ::4]).float().mean() > 0.99


def test_the_layer_finds_nothing_where_there_is_nothing() -> None:
    tokens, masks = planted(0)
    layer = LinearClasses.fitted(tokens[:4], masks[:4], 3, SHORT)
    assert (layer.scores(tokens[4:]).argmax(-1) == masks[4:, ::4, ::4]).float().mean() < 0.45


def test_the_layer_takes_the_rates_of_the_classes_where_patches_are_constant() -> None:
    masks = torch.zeros(4, 8, 8, dtype=torch.uint8)
    masks[:, :, 6:] = 1  # a quarter
    masks[:, :4] = UNKNOWN_CLASS  # void half changes no rate
    layer = LinearClasses.fitted(torch.ones(4, 2, 2, 3), masks, 2, Schedule(300, 4, 3e-2))
    rates = layer.scores(torch.ones(3)).softmax(-1)
    assert rates.tolist() == pytest.approx([0.75, 0.25], abs=0.02)


def test_the_same_seed_gives_the_same_layer_and_another_nearly() -> None:
    tokens, masks = planted(1)
    first, again, other = (
        LinearClasses.fitted(tokens, masks, 3, Schedule(200, 4, 1e-2, seed=seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    same = first.scores(tokens).argmax(-1) == other.scores(tokens).argmax(-1)
    assert same.float().mean() > 0.97


def test_masks_of_void_alone_do_no_harm() -> None:
    tokens, masks = planted(20)
    masks[0] = UNKNOWN_CLASS
    one_by_one = Schedule(steps=64, batch=1, lr=3e-2)
    layer = LinearClasses.fitted(tokens, masks, 3, one_by_one)
    assert torch.isfinite(layer.weight).all()
    assert (layer.scores(tokens[1:]).argmax(-1) == masks[1:, ::4, ::4]).float().mean() > 0.95
