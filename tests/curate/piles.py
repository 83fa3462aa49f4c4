"""Piles of images as curation gets them, and its steps without Ray."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.curate.rows.tables import FINGERPRINT, Inputs, write_table
from pipeline.curate.steps import tasks as running
from pipeline.curate.steps.steps import Step
from pipeline.shards.columns import image_id
from pipeline.shards.shards import ShardSet, open_shards
from tests.data import encoded, hub_table, noise, written


def dies_once(folder: str, task: running.Task, function: Any) -> Any:
    """Instead of `_task`: kills its worker before the first task of each step, then works."""
    marks = Path(os.environ["CURATE_MARKS"])
    try:
        (marks / folder.replace("/", "_")[-150:]).touch(exist_ok=False)
    except FileExistsError:
        return running._task(folder, task, function)
    return os.kill(os.getpid(), signal.SIGKILL)


def picture(seed: int, quality: int = 0) -> bytes:
    """A PNG of noise, or a JPEG."""
    return encoded(noise(seed), "JPEG" if quality else "PNG")


def hub(folder: Path, files: Sequence[Sequence[bytes]], **columns: Sequence[Any]) -> ShardSet:
    """Parquet as a hub stores images: a struct of bytes and path, a label, further columns."""
    folder.mkdir(parents=True)
    first = 0
    for number, images in enumerate(files):
        rows = slice(first, first + len(images))
        table = hub_table(images, **{name: values[rows] for name, values in columns.items()})
        written(table, folder / f"train-{number}.parquet", 4)
        first += len(images)
    return open_shards(str(folder))


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
