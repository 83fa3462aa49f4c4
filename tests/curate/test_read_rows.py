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
    portions = read_rows.portions(files, vectors, most)
    parts = [part for portion in portions for part in portion.parts]
    rows = [row for part in parts for row in range(part.first, part.end)]
    assert rows == list(range(first))
    assert all(sum(p.end - p.first for p in portion.parts) <= most for portion in portions)
    for part in parts:
        file = files[int(part.name)]
        assert file.first <= part.first and part.end <= file.first + file.rows
        assert part.whole == ((part.first, part.end) == (file.first, file.first + file.rows))
    assert len({portion.name for portion in portions}) == len(portions)


def test_rows_of_portions_are_read_whole(tmp_path: Path) -> None:
    x = unit_half(np.random.default_rng(0).standard_normal((50, 8)))
    pool = write_pool(tmp_path, x, ids_for(50), [20, 0, 5, 25])
    for most in (3, 7, 50):
        read = [
            read_rows.read_rows(pool.vectors, portion)
            for portion in read_rows.portions(pool.inputs.files, pool.vectors, most)
        ]
        assert np.array_equal(np.concatenate([rows.row for rows in read]), np.arange(50))
        assert np.array_equal(np.concatenate([rows.vectors for rows in read]), x)
        assert np.array_equal(np.concatenate([rows.ids for rows in read]), pool.ids)


def test_ids_are_ordered_as_bytes() -> None:
    ids = ids_for(500)
    ids[::7] = ids[0]
    row = np.random.default_rng(0).permutation(500)
    order = read_rows.order_by_id(ids, row)
    expected = sorted(range(500), key=lambda place: (bytes(ids[place]), row[place]))
    assert order.tolist() == expected


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
