"""Rows of weight 0: every term and target is the same as computed on the other rows alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.loss.centre import Centre
from pipeline.loss.dino import dino_loss
from pipeline.loss.ibot import patch_weights
from pipeline.loss.koleo import koleo
from pipeline.loss.target import Target, sinkhorn_targets, softmax_targets

IMAGES, PROTOTYPES = 5, 13
COUNTS = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kept(x: Tensor) -> Tensor:
    """Crop-major rows of the images that count."""
    return x[COUNTS.repeat(len(x) // IMAGES) > 0]


def both(centring: str, logits: list[Tensor], weights: list[Tensor | None]) -> list[Target]:
    if centring == "sinkhorn":
        return sinkhorn_targets(logits, 0.05, weights=weights)
    return softmax_targets(logits, 0.1 * draw(PROTOTYPES, seed=9), 0.05, weights)


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_targets_and_dino(centring: str) -> None:
    teacher, other = draw(2 * IMAGES, PROTOTYPES) * 0.3, draw(4, PROTOTYPES, seed=3) * 0.3
    weighted, _ = both(centring, [teacher, other], [COUNTS.repeat(2), None])
    alone, _ = both(centring, [kept(teacher), other], [None, None])
    torch.testing.assert_close(kept(weighted.probabilities()), alone.probabilities())
    torch.testing.assert_close(weighted.entropy(), alone.entropy())
    assert weighted.prototypes_used() == alone.prototypes_used()
    torch.testing.assert_close(weighted.mean(), alone.mean())

    students = [draw(6 * IMAGES, PROTOTYPES, seed=1).requires_grad_() for _ in range(2)]
    terms = dino_loss(students[0], weighted, 4)
    expected = dino_loss(kept(students[1]), alone, 4)
    torch.testing.assert_close(terms, expected)
    (2 * terms[0] + 3 * terms[1]).backward()
    (2 * expected[0] + 3 * expected[1]).backward()
    torch.testing.assert_close(students[0].grad, students[1].grad)
    assert not students[0].grad[1].any() and students[0].grad[0].any()


def test_the_most_likely_prototype_of_a_row_that_does_not_count_is_not_used() -> None:
    logits = torch.eye(3)
    (target,) = softmax_targets([logits], torch.zeros(3), 0.1, [torch.tensor([1.0, 0.0, 1.0])])
    assert int(target.prototypes_used()) == 2


def test_the_centre_has_the_mean_of_the_rows_that_count() -> None:
    logits, weights = draw(4, 3), torch.tensor([0.0, 1.0, 1.0, 0.0])
    parts, whole = Centre(3), Centre(3)
    nothing = torch.zeros(4)
    parts.see([logits, 5 * logits], [weights, nothing])
    whole.see([logits[1:3]])
    torch.testing.assert_close(parts.use(), parts.value)
    torch.testing.assert_close(parts.value, 0.1 * logits[1:3].mean(0))
    torch.testing.assert_close(whole.use(), parts.value)
    parts.see([logits], [nothing])
    before = parts.value.clone()
    assert torch.equal(parts.use(), before)


def test_patches_are_weighted_over_the_views_that_count() -> None:
    masks = draw(4, 6) > 0
    masks[1] = masks[3] = False
    counts = torch.tensor([1.0, 0.0, 1.0, 0.0])
    places = masks.flatten().nonzero().squeeze(1)
    alone = masks[[0, 2]]
    torch.testing.assert_close(
        patch_weights(masks, places, counts),
        patch_weights(alone, alone.flatten().nonzero().squeeze(1)),
    )


def test_koleo() -> None:
    features = [draw(IMAGES, 4, seed=2).requires_grad_() for _ in range(2)]
    features[0].data[1] = features[0].data[0]  # nearest, were it to count
    loss, expected = koleo(features[0], COUNTS), koleo(features[1][COUNTS > 0])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(features[0].grad, features[1].grad)
    for count in (0, 1):
        lonely = torch.zeros(IMAGES)
        lonely[:count] = 1
        x = draw(IMAGES, 4).requires_grad_()
        loss = koleo(x, lonely)
        loss.backward()
        assert float(loss.detach()) == 0 and x.grad is not None and not x.grad.any()


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_nobody_counts(centring: str) -> None:
    (target,) = both(centring, [draw(4, PROTOTYPES)], [torch.zeros(4)])
    student = draw(6, PROTOTYPES).requires_grad_()
    terms = dino_loss(student, target, 1)
    sum(terms).backward()
    assert float(terms[0].detach()) == 0 == float(terms[1].detach())
    assert student.grad is not None and not student.grad.any()
    assert float(target.entropy()) == 0 == float(target.prototypes_used())


def test_weights_that_do_not_fit_are_refused() -> None:
    x = draw(4, 3)
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: softmax_targets([x], torch.zeros(3), 0.1, [torch.ones(3)]), "[[3]] for micro"),
        (lambda: sinkhorn_targets([x], 0.1, weights=[None, None]), "micro batches of [4] rows"),
        (lambda: Centre(3).see([x], [torch.ones(4, 1)]), "weights [[4, 1]]"),
        (lambda: koleo(x, torch.ones(3)), "weights [3] for features [4, 3]"),
        (lambda: patch_weights(x > 0, torch.arange(2), torch.ones(3)), "expected [4]"),
    ]
    for call, said in refused:
        with pytest.raises(PipelineError) as error:
            call()
        assert said in error.value.what and error.value.hint, error.value.what
