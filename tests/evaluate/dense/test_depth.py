"""Errors and losses of depth against plain loops; heads on depths that patches say or not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.evaluate.dense.depth import (
    LinearDepth,
    Range,
    Seen,
    SmallDepth,
    depth_errors,
    fitted,
    gradient_loss,
    scale_loss,
)
from pipeline.evaluate.dense.fit import Schedule
from pipeline.evaluate.score import Score


def maps(seed: int, images: int = 3, side: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers and truths [n, side, side]; a fifth of the truth is unknown."""
    random = np.random.default_rng(seed)
    truth = random.uniform(1, 10, (images, side, side))
    answer = truth * random.uniform(0.6, 1.6, truth.shape)
    truth[random.random(truth.shape) < 0.2] = 0
    return torch.tensor(answer, dtype=torch.float32), torch.tensor(truth, dtype=torch.float32)


def known_pairs(answer: torch.Tensor, truth: torch.Tensor) -> list[tuple[float, float]]:
    pairs = zip(answer.flatten().tolist(), truth.flatten().tolist(), strict=True)
    return [(a, t) for a, t in pairs if t > 0]


@pytest.mark.parametrize("seed", range(3))
def test_errors_equal_a_plain_loop(seed: int) -> None:
    answer, truth = maps(seed)
    pairs = known_pairs(answer, truth)
    terms = np.array([depth_errors(a, t) for a, t in zip(answer, truth, strict=True)])
    ids = np.zeros((3, 16), np.uint8)

    def value(column: int, statistic: str) -> float:
        return Score("x", terms[:, [column, 3]], ids, statistic).value

    count = len(pairs)
    rmse = math.sqrt(sum((a - t) ** 2 for a, t in pairs) / count)
    assert value(0, "root_mean") == pytest.approx(rmse, rel=1e-9)
    relative = sum(abs(a - t) / t for a, t in pairs) / count
    assert value(1, "mean") == pytest.approx(relative, rel=1e-9)
    near = sum(max(a / t, t / a) < 1.25 for a, t in pairs) / count
    assert 0.2 < near < 0.9
    assert value(2, "mean") == pytest.approx(near, rel=1e-9)


def test_the_scale_loss_equals_its_formula() -> None:
    answer, truth = maps(0)
    g = [math.log(a) - math.log(t) for a, t in known_pairs(answer, truth)]
    mean = sum(g) / len(g)
    variance = sum((x - mean) ** 2 for x in g) / (len(g) - 1)
    expected = math.sqrt(variance + 0.15 * mean**2)
    assert float(scale_loss(answer, truth)) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_loss_equals_a_plain_loop() -> None:
    answer, truth = maps(1)
    expected = 0.0
    for scale in (1, 2, 4, 8):
        total, count = 0.0, 0
        for a, t in zip(answer, truth, strict=True):
            rows = range(0, 9, scale)
            count += sum(float(t[y, x]) > 0 for y in rows for x in rows)
            for y in rows:
                for x in rows:
                    for v, u in ((y + scale, x), (y, x + scale)):
                        if v < 9 and u < 9 and t[y, x] > 0 and t[v, u] > 0:
                            here = math.log(a[y, x]) - math.log(t[y, x])
                            there = math.log(a[v, u]) - math.log(t[v, u])
                            total += abs(here - there)
        expected += total / max(1, count)
    assert float(gradient_loss(answer, truth)) == pytest.approx(expected, rel=1e-5)


def test_losses_of_what_is_right_are_nothing_and_scale_costs_little() -> None:
    _, truth = maps(2)
    answer = torch.where(truth > 0, truth, torch.tensor(5.0))
    assert float(scale_loss(answer, truth)) < 1e-5
    assert float(gradient_loss(answer, truth)) == pytest.approx(0, abs=1e-6)
    assert float(gradient_loss(2 * answer, truth)) == pytest.approx(0, abs=1e-5)
    of_scale = math.sqrt(0.15) * math.log(2)
    assert float(scale_loss(2 * answer, truth)) == pytest.approx(of_scale, rel=1e-3)


def test_losses_of_nothing_known_have_gradients_that_are_nought() -> None:
    answer = torch.ones(2, 8, 8, requires_grad=True)
    nothing = torch.zeros(2, 8, 8)
    (scale_loss(answer, nothing) + gradient_loss(answer, nothing)).backward()  # type: ignore[no-untyped-call]
    assert answer.grad is not None
    assert not answer.grad.any()


def test_the_range_is_of_known_depths_and_not_of_one_wrong_pixel() -> None:
    depths = torch.zeros(4, 100, 100)
    depths[:2] = torch.linspace(2, 5, 20_000).view(2, 100, 100)
    depths[0, 0, 0] = 65_535
    span = Range.of(depths)
    assert 2 <= span.low < 2.02
    assert 4.98 < span.high <= 5


def smooth(images: int) -> tuple[Seen, torch.Tensor]:
    """Patches [n, 4, 4, 6] of which two features say the depth, which is constant in a patch."""
    random = torch.Generator().manual_seed(3)
    ramp = torch.linspace(0, 1, 4)[:, None].expand(4, 4)
    logs = torch.rand(images, 1, 1, generator=random) + ramp
    tokens = torch.randn(images, 4, 4, 6, generator=random)
    tokens[..., 0], tokens[..., 1] = logs * 30, logs.square() * 5
    depths = logs.exp().repeat_interleave(4, 1).repeat_interleave(4, 2)
    return Seen(tokens, torch.randn(images, 6, generator=random)), depths


@pytest.mark.long
@pytest.mark.parametrize("kind", [LinearDepth, SmallDepth])
def test_heads_learn_a_depth_that_patches_say(kind: type[LinearDepth] | type[SmallDepth]) -> None:
    seen, depths = smooth(24)
    # The floor of the bins is left slowly where there are six features; networks have hundreds.
    lr = 0.3 if kind is LinearDepth else 1e-2
    schedule = Schedule(steps=200, batch=8, lr=lr, weight_decay=1e-2)
    rows, others = torch.arange(16), torch.arange(16, 24)
    known = depths[rows][:, ::4, ::4]
    head = fitted(kind, seen.rows(rows), known, schedule)
    answer = head(seen.rows(others))
    assert answer.shape == (8, 16, 16)
    truth = depths[others]
    error = ((answer - truth).abs() / truth).mean()
    constant = ((depths[rows].mean() - truth).abs() / truth).mean()
    assert error < 0.25 < 0.4 < constant
    again = fitted(kind, seen.rows(rows), known, schedule)(seen.rows(others))
    assert torch.equal(answer, again)


def test_the_layer_before_the_upsampling_says_what_it_says_after_it() -> None:
    """The 1 x 1 layer on upsampled features, as DINOv2 orders them."""
    seen, depths = smooth(2)
    head = LinearDepth(seen, Range.of(depths), torch.Generator().manual_seed(0))
    (patch_mean, patch_deviation), (cls_mean, cls_deviation) = head.patch, head.cls
    patches = ((seen.tokens - patch_mean) / patch_deviation).permute(0, 3, 1, 2)
    cls = ((seen.cls - cls_mean) / cls_deviation)[..., None, None].expand(-1, -1, 4, 4)
    features = torch.cat([patches, cls], 1)
    large = torch.nn.functional.interpolate(features, scale_factor=4, mode="bilinear")
    logits = torch.einsum("kd,bdhw->bkhw", head.weight * 50, large)
    shares = logits.relu() + 0.1
    bins = torch.linspace(head.bins[0], head.bins[-1], 256)
    expected = (shares / shares.sum(1, keepdim=True) * bins[:, None, None]).sum(1)
    with torch.no_grad():
        head.weight.mul_(50)
    assert torch.allclose(head(seen), expected, rtol=1e-4)
    # It is fitted in the middle of patches, where the same function has the patch's own logits.
    logits = torch.einsum("kd,bdhw->bkhw", head.weight, features)
    shares = logits.relu() + 0.1
    expected = (shares / shares.sum(1, keepdim=True) * bins[:, None, None]).sum(1)
    assert torch.allclose(head(seen, times=1), expected, rtol=1e-4)
    assert float(expected.detach().std()) > 0.01  # it is not the mean of the bins everywhere
