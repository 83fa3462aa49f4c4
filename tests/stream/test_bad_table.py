"""The bad images that training met: each id once, kept over a restart, counted in a line."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from pipeline.shards.columns import BAD_IMAGE_SCHEMA
from pipeline.stream.bad_table import BadTable, reasons


def test_each_id_is_once_in_the_table_and_stays_over_a_restart(tmp_path: Path) -> None:
    place = tmp_path / "bad.parquet"
    BadTable(place).add([])
    assert not place.exists()
    BadTable(place).add([("0" * 32, "truncated", "at byte 7"), ("1" * 32, "empty", "")])
    BadTable(place).add([("1" * 32, "empty", ""), ("2" * 32, "truncated", "")])
    table = pq.read_table(place)
    assert table.schema.names == BAD_IMAGE_SCHEMA.names
    rows = [(row["image_id"][0], row["reason"], row["detail"]) for row in table.to_pylist()]
    assert rows == [("0", "truncated", "at byte 7"), ("1", "empty", ""), ("2", "truncated", "")]
    assert set(table.column("stage").to_pylist()) == {"pretrain"}


def test_reasons() -> None:
    assert reasons({}) == ""
    assert reasons({"empty": 1, "truncated": 1200}) == "1201 (1200 truncated, 1 empty)"
