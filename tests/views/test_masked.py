"""Masked patches: their places, and the length that they are filled up to."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from pipeline.views.masked import MULTIPLE, PatchFinder, masked_patches, usual_length
from pipeline.views.masks import MaskSpec, masks_for


@pytest.mark.parametrize(
    ("grid", "micro", "total", "probability", "ratio", "padding"),
    [
        ((4, 4), 64, 64, 0.5, (0.1, 0.5), 0.19),  # configs/cifar10.yaml
        ((14, 14), 16, 16, 0.5, (0.1, 0.5), 0.15),  # a ViT-S/16 on one device
        ((14, 14), 16, 256, 0.5, (0.1, 0.5), 0.75),  # and a sixteenth of a step
        ((16, 16), 8, 32, 0.3, (0.2, 0.8), 1.2),
        ((14, 14), 8, 8, 1.0, (0.3, 0.3), 0.1),  # every view alike
        ((14, 14), 2, 2, 0.5, (0.1, 0.5), 0.7),  # so few views that each one's share tells
        ((2, 2), 3, 3, 0.5, (0.1, 0.5), 50),  # so few that all of them are the bound
    ],
)
def test_nearly_every_micro_batch_has_the_usual_length(
    grid: tuple[int, int],
    micro: int,
    total: int,
    probability: float,
    ratio: tuple[float, float],
    padding: float,
) -> None:
    spec = MaskSpec(grid, probability, ratio)
    usual = usual_length(micro, total, spec)
    finder = PatchFinder(usual)
    lengths, rows = [], []
    for step in range(200):
        masks = torch.from_numpy(masks_for(7, step, np.arange(micro), total, spec))
        masked = finder(masks.transpose(0, 1).flatten(0, 1), None)
        lengths.append(len(masked.places))
        rows.append(masked.rows)
    others = [length for length in lengths if length != usual]
    assert len(others) <= 2  # one in 700 is expected
    assert all(length > usual and length % MULTIPLE == 0 for length in others)
    assert usual <= max(np.mean(rows), 1) * (1 + padding)
    # Nothing is reserved that is never used: the largest comes close.
    assert usual - max(rows) < MULTIPLE + 2.5 * np.std(rows) + 0.05 * usual


def test_places_are_those_of_a_loop_and_fillers_have_none() -> None:
    masks = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    weights = torch.tensor([1.0, 0.0, 1.0])  # of three images, crop-major: views 1 and 4
    expected = [5 * v + p for v in range(6) for p in range(5) if masks[v, p] and v not in (1, 4)]
    masked = PatchFinder(20)(masks, weights)
    assert masked.rows == len(expected) and len(masked.places) == 20
    assert masked.places[: masked.rows].tolist() == expected
    assert not masked.places[masked.rows :].any()
    every = PatchFinder(30, every=True)(masks, weights)
    assert every.places[: every.rows].tolist() == [p for p in range(30) if p // 5 not in (1, 4)]
    assert len(every.places) == 30
    assert len(PatchFinder(0)(masks, None).places) == 0  # iBOT has no weight


def test_more_than_usual_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    finder = PatchFinder(MULTIPLE)
    masks = torch.ones(4, 2 * MULTIPLE, dtype=torch.bool)
    with caplog.at_level(logging.INFO, "pipeline.views"):
        for rows in (1, MULTIPLE + 1, 2 * MULTIPLE, 4 * MULTIPLE):
            some = masks.flatten().cumsum(0).view_as(masks) <= rows
            length = len(finder(some, None).places)
            assert length == max(MULTIPLE, -(-rows // MULTIPLE) * MULTIPLE)
    assert len(caplog.records) == 1
    assert f"{MULTIPLE + 1} masked patches, more than the usual {MULTIPLE}" in caplog.text


def test_never_longer_than_all_patches() -> None:
    scored = torch.ones(2, 3, dtype=torch.bool)
    assert len(masked_patches(scored).places) == 6
    assert usual_length(1, 1, MaskSpec((2, 2))) == 8
