"""Draws of images: even, and others for another seed."""

from __future__ import annotations

import numpy as np

from pipeline.curate.decide.decide import draws


def test_draws_are_even():
    ids = np.random.default_rng(0).integers(0, 256, (40_000, 16), np.uint8)
    ids[1] = ids[0]
    drawn = draws(ids, 0)
    assert drawn[0] == drawn[1] and drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, 20, (0, 1))[0]
    assert abs(counts - 2000).max() < 5 * np.sqrt(2000)
    assert abs(np.corrcoef(drawn, draws(ids, 1))[0, 1]) < 0.03
    few = np.zeros((5000, 16), np.uint8)  # ids that differ in few bits
    few[:, 0], few[:, 15] = np.arange(5000) % 256, np.arange(5000) // 256
    assert abs(draws(few, 7).mean() - 0.5) < 0.02
