"""What is known of the rows of a set, against the same columns read by pyarrow alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.embed.embedders import EmbedderSpec
from pipeline.embed.ids import id_bytes
from pipeline.embed.vectors import VectorSet
from pipeline.search.rows import Rows
from tests.curate.images import scene
from tests.data import encoded
from tests.search.tables import write_shard, write_table, write_vectors


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> VectorSet:
    """Twelve scenes in three files, not in the order of their ids; the last four rows are twins."""
    run = tmp_path_factory.mktemp("run")
    write_shard(run / "shards.parquet", [encoded(scene(seed)) for seed in range(12)])
    shard = pq.read_table(run / "shards.parquet")
    rows = [7, 3, 11, 0, 9, 5, 1, 10, *[4] * 4]
    model = write_vectors(run / "first", run / "shards.parquet", EmbedderSpec())
    return write_table(run / "vectors", model.facts, shard.take(rows), model.read()[rows], 3)


def test_rows_say_what_the_files_say(vectors: VectorSet) -> None:
    files = sorted(Path(vectors.uri).glob("*.parquet"))
    table = pa.concat_tables([pq.read_table(file) for file in files])
    ids, sources = table["image_id"].to_pylist(), table["source"].to_pylist()
    rows = Rows(vectors)
    assert len(files) == 3 and len(rows) == 12 and rows.ids.dtype == np.dtype("S32")
    assert [rows.id_of(row) for row in range(12)] == ids == vectors.ids().tolist()
    assert [rows.source_of(row) for row in range(12)] == sources
    assert rows.labels.tolist() == table["label"].to_pylist()
    assert rows.places.tolist() == table["row"].to_pylist()
    some = np.array([11, 0, 5, 5])
    assert rows.ids_of(some).to_pylist() == [ids[row] for row in some]
    assert rows.sources_of(some).to_pylist() == [sources[row] for row in some]
    assert rows.order.tolist() == sorted(range(12), key=lambda row: (ids[row], row))


def test_rows_by_an_id_and_by_its_beginning(vectors: VectorSet) -> None:
    rows, ids = Rows(vectors), vectors.ids().tolist()
    for row, name in enumerate(ids):
        assert rows.row_of(name) == ids.index(name)
        for letters in (1, 4, 32):
            begins = [n for n in range(12) if ids[n].startswith(name[:letters])]
            assert sorted(rows.with_beginning(name[:letters])) == begins and row in begins
    for other in ("zz", "\u00e9", ids[0] + "0", ids[0][:31] + "\0", "g" * 32):
        assert not len(rows.with_beginning(other)) and rows.row_of(other) == -1
    assert rows.row_of(ids[0][:31]) == -1


def test_no_ids_are_no_bytes() -> None:
    assert id_bytes(pa.chunked_array([], pa.string())).shape == (0,)
