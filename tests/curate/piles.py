"""Piles of images as curation gets them, and its steps without Ray."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.curate.rows.tables import FINGERPRINT, Inputs, write_table
from pipeline.curate.steps import tasks as running
from pipeline.curate.steps.steps import Step
from pipeline.shards.columns import image_id
from pipeline.shards.shards import ShardSet, open_shards
from tests.curate.here import run_here


def without_ray(monkeypatch: Any) -> None:
    """Steps run in this process, one task after the other."""
    from pipeline.driver import cluster

    run_here(monkeypatch, sent=False)
    monkeypatch.setattr(cluster, "joined", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(cluster, "nodes", lambda: 1)


def dies_once(folder: str, task: running.Task, function: Any) -> Any:
    """Instead of `_task`: kills its worker before the first task of each step, then works."""
    marks = Path(os.environ["CURATE_MARKS"])
    try:
        (marks / folder.replace("/", "_")[-150:]).touch(exist_ok=False)
    except FileExistsError:
        return running._task(folder, task, function)
    return os.kill(os.getpid(), signal.SIGKILL)


def picture(seed: int, size: int = 24, quality: int = 0) -> bytes:
    """A PNG of noise, or a JPEG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG" if quality else "PNG")
    return stream.getvalue()


def hub(folder: Path, files: Sequence[Sequence[bytes]], **columns: Sequence[Any]) -> ShardSet:
    """Parquet as a hub stores images: a struct of bytes and path, a label, further columns."""
    folder.mkdir(parents=True)
    first = 0
    for number, images in enumerate(files):
        rows = [{"bytes": x, "path": f"{number}.jpg"} for x in images]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(rows, kind)})
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values[first : first + len(images)]))
        pq.write_table(table, folder / f"train-{number}.parquet", row_group_size=4)
        first += len(images)
    return open_shards(str(folder))


def packed(source: Path, shards: Path, monkeypatch: Any, **options: Any) -> ShardSet:
    """A pack of a folder, without Ray."""
    from pipeline.pack import pack as packing

    monkeypatch.setattr(packing, "_each", lambda function, items: map(function, items))
    packing.pack(
        str(source),
        str(shards),
        packing.PackPlaces(
            bad_images=str(shards.with_name(f"{shards.name}.bad.parquet")),
            scratch=str(shards.with_name(f"{shards.name}.work")),
        ),
        packing.PackOptions(**options),
    )
    return open_shards(str(shards))


def fingerprints(folder: Path, inputs: Inputs, **changes: Mapping[int, Any]) -> Step:
    """A fingerprint table of inputs as far as decisions read it; `changes[column][row] = value`."""
    from pipeline.curate.rows.tables import id_array
    from pipeline.shards.columns import is_ours
    from pipeline.shards.row_group import image_array

    for file in inputs.files:
        with pq.ParquetFile(file.file.path) as parquet:
            table, own = parquet.read(), is_ours(parquet.schema_arrow)
        encoded = [x.as_py() or b"" for x in image_array(table.column(file.columns.image))]
        rows = list(range(file.first, file.first + file.rows))
        ids = np.array([list(bytes.fromhex(image_id(x))) for x in encoded], np.uint8)
        columns: dict[str, Any] = {name: pa.nulls(file.rows, FINGERPRINT.field(name).type)
                                   for name in FINGERPRINT.names}  # fmt: skip
        columns |= {
            "row": pa.array(rows, pa.int64()),
            "image_id": id_array(ids.reshape(-1, 16)),
            "bytes": pa.array([len(x) for x in encoded], pa.int64()),
            "error": [changes.get("error", {}).get(row, "") for row in rows],
            "source": [
                changes.get("source", {}).get(row, "" if not own else table["source"][k].as_py())
                for k, row in enumerate(rows)
            ],
            "width": pa.array([24] * file.rows, pa.int32()),
            "height": pa.array([24] * file.rows, pa.int32()),
        }
        write_table(pa.table(columns, schema=FINGERPRINT), str(folder), file.name)
    return Step(folder.name, "key", str(folder), tables=tuple(inputs.by_name))


def step_table(folder: Path, inputs: Inputs, schema: pa.Schema, rows: Sequence[tuple]) -> Step:
    """A step's table of given rows, one file for each input file; ids as bytes of 16."""
    for file in inputs.files:
        mine = sorted(r for r in rows if file.first <= r[0] < file.first + file.rows)
        columns = list(zip(*mine, strict=True)) or [()] * len(schema)
        arrays = [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
        write_table(pa.table(arrays, schema=schema), str(folder), file.name)
    return Step(folder.name, "key", str(folder), tables=tuple(inputs.by_name))
