"""What a job asks a source, and how often."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import job
from pipeline.pack import listing, sources
from pipeline.shards.shards import open_shards
from tests.data import encoded, noise


def test_a_source_is_looked_up_once_for_a_job(tmp_path, monkeypatch, tasks_here):
    """And a finished pack's columns are not read again; the next job sees what is there then."""
    calls = Counter()

    def counted(module, name):
        function = getattr(module, name)

        def call(*arguments):
            calls[name] += 1
            return function(*arguments)

        monkeypatch.setattr(module, name, call)

    counted(listing, "_listed")
    counted(sources, "_footer")
    counted(sources, "check_fit")
    for number, kind in enumerate((pa.int32(), pa.int64())):
        table = pa.table({"image": [encoded(noise(number))], "n": pa.array([number], kind)})
        (tmp_path / "hub").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "hub" / f"{number}.parquet")
    given = [f"run.folder={tmp_path}/runs", "run.name=r", "track.enabled=false"]
    given += [f"data.source={tmp_path}/hub", "data.max_bad_fraction=0.5"]
    (tmp_path / "hub" / "bad.parquet").write_bytes(b"broken")  # so it cannot be read as shards
    for expected, images in (
        ({"_listed": 1, "_footer": 3, "check_fit": 2}, 2),
        ({"_listed": 1, "_footer": 3}, 2),  # finished
    ):
        calls.clear()
        job.main(["pack"], "doc", given)
        assert calls == expected
        assert open_shards(str(tmp_path / "runs" / "r" / "shards")).rows == images
    pq.write_table(pa.table({"image": [encoded(noise(9))]}), tmp_path / "hub" / "9.parquet")
    job.main(["pack"], "doc", given)
    assert open_shards(str(tmp_path / "runs" / "r" / "shards")).rows == 3
