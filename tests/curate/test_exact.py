"""Nearest centres and pairs above a threshold against sorted products in doubles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.curate.rows import exact

Array = np.ndarray[Any, Any]


def vectors(n: int, d: int, seed: int, levels: int = 0) -> Array:
    """Random unit vectors; with few levels many products are equal."""
    rng = np.random.default_rng(seed)
    plain = rng.standard_normal((n, d)) if not levels else rng.integers(-levels, levels + 1, (n, d))
    return exact.unit_half(plain)


def reference(x: Array, c: Array, count: int) -> Array:
    products = x.astype(np.float64) @ c.astype(np.float64).T
    numbers = np.broadcast_to(np.arange(len(c)), products.shape)
    return np.lexsort((numbers, -products), axis=1)[:, :count]


@pytest.mark.long
@pytest.mark.parametrize("on", ["", "cpu"])
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40),
    k=st.integers(1, 90),
    d=st.integers(1, 24),
    count=st.integers(1, 9),
    levels=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_nearest_is_the_sorted_products(
    on: str, n: int, k: int, d: int, count: int, levels: int, seed: int
) -> None:
    x, c = vectors(n, d, seed, levels), vectors(k, d, seed + 1, levels)
    which, similarity = exact.nearest(x, c, count, on)
    expected = reference(x, c, min(count, k))
    assert np.array_equal(which, expected)
    products = x.astype(np.float64) @ c.astype(np.float64).T
    assert np.array_equal(similarity, np.take_along_axis(products, expected, 1))


@pytest.mark.parametrize("on", ["", "cpu"])
def test_nearest_tells_centres_apart_that_single_precision_cannot(on: str) -> None:
    base = vectors(1, 384, 0).astype(np.float32)
    rng = np.random.default_rng(1)
    close = base + rng.choice([-1, 0, 1], (200, 384)) * np.float32(2.0**-14)
    c = np.concatenate([close.astype(np.float16), close[:20].astype(np.float16)])
    x = vectors(50, 384, 2)
    x[:10] = c[:10]
    assert np.array_equal(exact.nearest_numbers(x, c, 8, on), reference(x, c, 8))


def test_nearest_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, c = vectors(300, 16, 3), vectors(100, 16, 4)
    whole = exact.nearest_numbers(x, c, 4)
    monkeypatch.setattr(exact, "BLOCK", 1000)
    assert np.array_equal(exact.nearest_numbers(x, c, 4), whole)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 30),
    m=st.integers(0, 30),
    levels=st.integers(0, 2),
    threshold=st.floats(-0.5, 1.0),
    seed=st.integers(0, 1000),
)
def test_pairs_above_are_all_pairs_above(
    n: int, m: int, levels: int, threshold: float, seed: int
) -> None:
    a, b = vectors(n, 12, seed, levels), vectors(m, 12, seed + 1, levels)
    products = a.astype(np.float64) @ b.astype(np.float64).T
    i, j, similarity = exact.pairs_above(a, b, threshold)
    assert np.array_equal(np.stack([i, j], 1), np.argwhere(products > threshold))
    assert np.array_equal(similarity, products[i, j])
    # a threshold for each row, and vectors that are single precision already
    each = threshold + 0.1 * np.arange(n) / max(1, n)
    wide = a.astype(np.float32), b.astype(np.float32)
    i, j, _ = exact.pairs_above(*wide, each)
    assert np.array_equal(np.stack([i, j], 1), np.argwhere(products > each[:, None]))


def test_a_product_at_the_threshold_is_not_above_it() -> None:
    a, b = vectors(20, 384, 5), vectors(20, 384, 6)
    at = float(exact.dots(a[:1], b[:1])[0])
    i, j, _ = exact.pairs_above(a[:1], b, at)
    assert 0 not in j
    i, j, _ = exact.pairs_above(a[:1], b, np.nextafter(at, -1))
    assert 0 in j and not i.any()


def test_tiles_on_a_device_have_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from pipeline.curate.copies import join

    said: list[str] = []
    inner = join.pairs_above

    def spied(*arguments: Any) -> Any:
        said.append(torch.get_float32_matmul_precision())
        return inner(*arguments)

    x = exact.unit_half(np.random.default_rng(0).standard_normal((40, 16)))
    expected = join.tile(x.astype(np.float32), x.astype(np.float32), 0.3)
    monkeypatch.setattr(join, "pairs_above", spied)
    monkeypatch.setattr(join, "device", lambda: "cpu")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        pairs = join.tile(x.astype(np.float32), x.astype(np.float32), 0.3)
        after = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision(before)
    assert said == ["highest"] and after == "medium"
    assert all(np.array_equal(a, b) for a, b in zip(pairs, expected, strict=True))
