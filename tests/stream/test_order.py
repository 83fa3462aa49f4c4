"""The reading order against a plain reading of its contract."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.stream.order import ReadingOrder, layout_of, slice_rows

GROUPS = np.asarray([7, 3, 11, 1, 20, 5, 9, 8])  # 64 rows


def flat(order: ReadingOrder, first: int, last: int) -> list[tuple[int, int, int]]:
    """(pass, group, row) of every position in order."""
    rows_read = []
    for part in order.slices(first, last):
        which, rows = slice_rows(part, order.seed)
        groups = part.groups[which]
        rows_read += [(part.pass_index, int(g), int(r)) for g, r in zip(groups, rows, strict=True)]
    return rows_read


@pytest.mark.parametrize(("batch", "window"), [(6, 12), (6, 3), (5, 20), (64, 64)])
def test_a_pass_uses_each_row_at_most_once_and_all_but_the_remainder(
    batch: int, window: int
) -> None:
    order = ReadingOrder(GROUPS, seed=3, global_batch=batch, window=window)
    seen = flat(order, 0, order.steps_per_pass)
    everything = {(0, g, r) for g, n in enumerate(GROUPS) for r in range(n)}
    assert len(seen) == len(set(seen)) == 64 // batch * batch
    assert set(seen) <= everything


def test_any_stretch_of_steps_is_the_same_stretch_of_the_whole() -> None:
    order = ReadingOrder(GROUPS, seed=3, global_batch=6, window=12)
    whole = flat(order, 0, 25)
    for first, last in [(0, 25), (1, 2), (7, 19), (9, 11), (24, 25)]:
        assert flat(order, first, last) == whole[first * 6 : last * 6]


def test_passes_and_seeds_differ() -> None:
    order = ReadingOrder(GROUPS, seed=3, global_batch=8, window=16)
    one, two = flat(order, 0, 8), flat(order, 8, 16)
    assert [r[1:] for r in one] != [r[1:] for r in two]
    assert {r[1:] for r in one} == {r[1:] for r in two}
    other = ReadingOrder(GROUPS, seed=4, global_batch=8, window=16)
    assert flat(other, 0, 8) != one


def test_a_piece_has_its_groups_and_no_others() -> None:
    order = ReadingOrder(GROUPS, seed=3, global_batch=6, window=12)
    for part in order.slices(2, 17):
        which, rows = slice_rows(part, order.seed)
        assert len(rows) == part.stop - part.start
        assert set(which) <= set(range(len(part.groups)))
        assert (rows < GROUPS[part.groups[which]]).all()
        assert part.groups.base is None  # no view that would keep a whole pass in memory


def test_another_layout_is_another_order() -> None:
    assert layout_of(GROUPS) == layout_of(GROUPS.astype(np.int32))
    assert layout_of(GROUPS) != layout_of(GROUPS[::-1])
    assert layout_of(GROUPS) != layout_of(np.append(GROUPS, 1))


def test_sorted_classes_are_mixed_within_a_window_over_all_rows() -> None:
    rows = np.full(20, 50)  # 20 groups of 50 rows; class = group // 2, as a sorted hub set has it
    order = ReadingOrder(rows, seed=0, global_batch=100, window=1000)
    classes = np.asarray([g // 2 for _, g, _ in flat(order, 0, 1)])
    counts = np.bincount(classes, minlength=10)
    assert counts.min() >= 3  # P(any class < 3 of 100) is below 2 %, and the seed is fixed
