"""Images of weight 0 in a step: as if they were not there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline.model.pair import HeadSpec
from pipeline.train.step import ObjectiveSpec
from pipeline.views.batch import Views
from tests.train.small_run import OTHER_HEAD, Run, assert_same, views

COUNTS = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])


def without_masks(both: Views, counts: torch.Tensor) -> Views:
    """Images of weight 0 have no masked patches."""
    masks = both.masks & (counts.repeat(both.global_crops) > 0)[:, None]
    return replace(both, masks=masks, weights=counts)


def alone(both: Views, counts: torch.Tensor) -> Views:
    def rows(x: torch.Tensor) -> torch.Tensor:
        return x[counts.repeat(len(x) // both.images) > 0]

    images = int(counts.sum())
    return Views(rows(both.global_views), rows(both.local_views), rows(both.masks), images)


@pytest.mark.parametrize("ibot", [None, OTHER_HEAD], ids=["shared", "separate"])
@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_a_step_is_that_of_the_images_that_count(ibot: HeadSpec | None, centring: Any) -> None:
    spec = ObjectiveSpec(centring=centring)
    weighted, expected = Run(spec, ibot), Run(spec, ibot)
    for seed in range(2):  # the second step has a centre
        first, second = without_masks(views(5, seed), COUNTS), views(5, seed + 5)
        ours = weighted.step(first, second).scalars
        theirs = expected.step(alone(first, COUNTS), second).scalars
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=2e-5, atol=2e-5, msg=name)
    assert_same(weighted.weights(), expected.weights(), atol=1e-5)


@pytest.mark.parametrize("centring", ["softmax", "sinkhorn"])
def test_a_batch_of_no_image_that_counts(centring: Any) -> None:
    run = Run(ObjectiveSpec(centring=centring), OTHER_HEAD)
    none = torch.zeros(5)
    scalars = run.step(without_masks(views(5), none)).scalars
    assert {float(x) for name, x in scalars.items() if name.startswith("loss/")} == {0.0}
    gradients = [x.grad for x in run.pair.student.parameters()]
    assert all(x is not None and not x.any() for x in gradients)
