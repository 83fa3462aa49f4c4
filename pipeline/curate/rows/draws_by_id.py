"""Draws that depend on image ids and the seed alone: a number for each image, by hash."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.views.draws import GOLDEN as GOLDEN
from pipeline.views.draws import mix as mix
from pipeline.views.draws import uniforms

Array = np.ndarray[Any, Any]
# Streams of `pipeline.views.draws.uniforms`, each for one use; those of training are 0 and 1.
ATTACKS, CALIBRATION, DRY_RUN = 2, 3, 4
SEEDING, REFILL, BALANCE, RETRIEVE = 16, 17, 18, 19


def draw(seed: int, what: int, ids: Array, stream: int) -> Array:
    """One uniform number in [0, 1) for each image, float64 [n].

    Args:
        seed: of the run.
        what: number of the round or of the set that is drawn for.
        ids: uint8 [n, 16].
        stream: one of the constants above.
    """
    return uniforms(seed, what, np.ascontiguousarray(ids), 1, stream)[:, 0]


def race(seed: int, what: int, ids: Array, weights: Array, stream: int) -> Array:
    """Arrival times of exponential clocks with these rates, float64 [n].

    The m earliest are a sample of m without replacement in proportion to the weights (Efraimidis
    and Spirakis, 2006). Rate 0 never arrives.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        times = -np.log1p(-draw(seed, what, ids, stream)) / weights
    return np.where(weights > 0, times, np.inf)


def hash64(seed: int, ids: Array) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A number for each id, uniform in 64 bits and another one for each seed (SplitMix64)."""
    start = mix(np.array([seed], np.uint64) + GOLDEN)
    words = np.ascontiguousarray(ids).view("<u8").reshape(-1, 2).astype(np.uint64)
    return mix(words[:, 0] ^ mix(words[:, 1] ^ start))


def numbers_as_ids(count: int) -> Array:
    """Ids for things that are numbered, such as centroids: uint8 [count, 16]."""
    words = np.zeros((count, 2), ">u8")
    words[:, 1] = np.arange(count)
    return words.view(np.uint8).reshape(count, 16)
