"""Portions hold each row once, and shuffled tables come back by bucket."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.curate.rows import bucketed, read_rows, tables
from pipeline.curate.rows.exact import unit_half
from pipeline.curate.rows.first_of_each import best, first_of_each, in_order
from pipeline.errors import DataError
from pipeline.shards.shards import ShardColumns, ShardFile
from tests.curate.planted import ids_for, write_pool


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 30), max_size=12), most=st.integers(1, 40))
def test_portions_hold_each_row_once(sizes: list[int], most: int) -> None:
    files, first = [], 0
    for index, rows in enumerate(sizes):
        shard = ShardFile("", rows, (), 0)
        columns = ShardColumns("", "", "")
        files.append(tables.InputFile(index, "s", tables.POOL, first, shard, columns))
        first += rows
    vectors = tables.Vectors("", tuple(file.name for file in files), 8, "k")
    named = read_rows.portions(files, vectors, most)
    portions = list(named.values())
    parts = [part for portion in portions for part in portion.slices]
    rows = [row for part in parts for row in range(part.first, part.end)]
    assert rows == list(range(first))
    assert all(sum(p.end - p.first for p in portion.slices) <= most for portion in portions)
    for part in parts:
        file = files[int(part.name)]
        assert file.first <= part.first and part.end <= file.first + file.rows
        assert part.whole == ((part.first, part.end) == (file.first, file.first + file.rows))
    assert [portion.name for portion in portions] == list(named)


def test_rows_of_portions_are_read_whole(tmp_path: Path) -> None:
    x = unit_half(np.random.default_rng(0).standard_normal((50, 8)))
    pool = write_pool(tmp_path, x, ids_for(50), [20, 0, 5, 25])
    for most in (3, 7, 50):
        read = [
            read_rows.read_rows(pool.vectors, portion)
            for portion in read_rows.portions(pool.inputs.files, pool.vectors, most).values()
        ]
        assert np.array_equal(np.concatenate([rows.row for rows in read]), np.arange(50))
        assert np.array_equal(np.concatenate([rows.vectors for rows in read]), x)
        assert np.array_equal(np.concatenate([rows.ids for rows in read]), pool.ids)


def test_ids_are_ordered_as_bytes() -> None:
    ids = ids_for(500)
    ids[::7] = ids[0]
    row = np.random.default_rng(0).permutation(500)
    order = in_order(ids, row)
    expected = sorted(range(500), key=lambda place: (bytes(ids[place]), row[place]))
    assert order.tolist() == expected


@pytest.mark.parametrize("n", [0, 1, 2, 300])
def test_the_first_of_each_group_is_that_of_a_loop(n: int) -> None:
    rng = np.random.default_rng(n)
    group, ids = (rng.integers(0, 3, (n, 16)).astype(np.uint8) for _ in range(2))
    group[:, 2:] = 0
    size, row = rng.integers(0, 3, n), rng.permutation(n)
    gone, kept = first_of_each(group, -size, ids, row)
    by_group: dict[bytes, list[int]] = {}
    for place in sorted(range(n), key=lambda i: (-size[i], bytes(ids[i]), row[i])):
        by_group.setdefault(bytes(group[place]), []).append(place)
    expected = {(i, places[0]) for places in by_group.values() for i in places[1:]}
    assert set(zip(gone.tolist(), kept.tolist(), strict=True)) == expected


@pytest.mark.parametrize("n", [0, 1, 2, 300])
@pytest.mark.parametrize("by", [("row",), ("set", "query_id")])
def test_the_best_of_each_is_that_of_a_loop(n: int, by: tuple[str, ...]) -> None:
    rng = np.random.default_rng(n)
    columns = [
        rng.integers(0, 20, n),
        pa.array([f"s{k}" for k in rng.integers(0, 3, n)], pa.string()),
        tables.id_array(np.repeat(rng.integers(0, 200, (n, 1)), 16, 1).astype(np.uint8)),
        rng.integers(0, 4, n) / 4,
    ]
    table = pa.table(columns, schema=tables.LEAKS)
    expected: dict[tuple, tuple] = {}
    for one in table.to_pylist():
        key = tuple(one[name] for name in by)
        order = (-one["similarity"], *(one[c] for c in ("row", "set", "query_id")))
        expected[key] = min(expected.get(key, order), order)
    rows = best(table, *by).to_pylist()
    mine = {
        tuple(one[name] for name in by): (
            -one["similarity"],
            one["row"],
            one["set"],
            one["query_id"],
        )
        for one in rows
    }
    assert mine == expected and list(mine) == sorted(expected) and len(rows) == len(mine)


def test_buckets_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    written: dict[int, list[int]] = {}
    names = []
    for name in ("a", "b"):
        bucket = np.sort(rng.choice([0, 3, 127, 128, 300], 40))
        value = rng.integers(0, 1000, 40)
        wide = np.stack([value, value + 1], 1).astype(np.float16)
        table = pa.table({"value": value, "wide": bucketed.raw(wide)})
        size = bucketed.write_buckets(str(tmp_path), name, table, bucket)
        assert size == sum(file.stat().st_size for file in tmp_path.rglob(f"{name}.parquet"))
        names.append((name, bucketed.shelves_of(bucket)))
        for b, v in zip(bucket.tolist(), value.tolist(), strict=True):
            written.setdefault(b, []).append(v)
    for bucket in (0, 1, 3, 127, 128, 299, 300, 5000):
        pieces = list(bucketed.read_bucket(str(tmp_path), names, bucket))
        values = [v for table in pieces for v in table.column("value").to_pylist()]
        assert values == written.get(bucket, [])
        for table in pieces:
            wide = bucketed.unraw(table.column("wide"), np.float16, 2)
            assert wide[:, 0].tolist() == table.column("value").to_pylist()
    file = tmp_path / "b0000" / "a.parquet"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"b0000/a\.parquet cannot be read"):
        list(bucketed.read_bucket(str(tmp_path), names, 0))
