"""Rows of input files as rows of a curated shard: which are kept, and in its columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.curate.shard_form import Form, kept_columns
from pipeline.curate.tables import InputFile, read_table
from pipeline.data.columns import is_ours
from pipeline.data.decode import BadImage, image_format
from pipeline.data.label_column import label_ids
from pipeline.data.row_group import image_array
from pipeline.data.storage import resolve_uri
from pipeline.data.transfer import open_patiently
from pipeline.errors import DataError

Ids = np.ndarray[Any, np.dtype[np.str_]]


def decided(file: InputFile, decisions: str) -> tuple[Ids, np.ndarray[Any, np.dtype[np.bool_]]]:
    """Ids of the rows of a file, and which of them are kept."""
    table = read_table(decisions, file.name, ["image_id", "kept"])
    ids = np.array(table.column("image_id").to_pylist(), "U32")
    return ids, table.column("kept").to_numpy(zero_copy_only=False).copy()


def opened(file: InputFile) -> pq.ParquetFile:
    """An input file, to be closed by the caller."""
    fs, _ = resolve_uri(file.columns.uri)
    return pq.ParquetFile(open_patiently(fs, file.file.path))


def formed(
    table: pa.Table, ids: Ids, about: pa.Table | None, file: InputFile, form: Form
) -> pa.Table:
    """Rows of an input file with the columns of a curated shard."""
    own = is_ours(table.schema)
    image, label = ("image", "label") if own else (file.columns.image, file.columns.label)
    origin = {field.name: name for name, field in kept_columns(table.schema, image, label)}
    encoded = image_array(table.column(image))
    columns: dict[str, Any] = {
        "image_id": pa.array(ids.tolist(), pa.string()),
        "image": encoded if pa.types.is_binary(encoded.type) else encoded.cast(pa.binary()),
    }
    if own:
        columns |= {name: table.column(name) for name in ("width", "height", "format", "source")}
        if table.column("image_id").to_pylist() != ids.tolist():
            raise RuntimeError(f"the decisions on {file.name} are not about the rows of its file")
    else:
        assert about is not None
        columns |= {name: about.column(name) for name in ("width", "height", "source")}
        columns["format"] = pa.array(
            [_format(encoded.as_py(), file) for encoded in columns["image"]], pa.string()
        )
    columns["label"] = _labels(table, label, file, form)
    for extra in form.extras:
        name = origin.get(extra.name)
        columns[extra.name] = (
            table.column(name).cast(extra.type) if name else pa.nulls(len(ids), extra.type)
        )
    return pa.table([columns[name] for name in form.schema.names], schema=form.schema)


def _labels(table: pa.Table, label: str, file: InputFile, form: Form) -> Any:
    if label not in table.schema.names or not file.columns.labels:
        return pa.nulls(len(table), pa.int64())
    own, here = label_ids(table.column(label), file.columns.names), form.labels[file.set]
    if not here:
        return own
    if (largest := pc.max(own).as_py() or 0) >= len(here):
        raise DataError(
            f"a label of {file.file.name} is {largest}, but only {len(here)} classes have names",
            "correct the file, or pack it without labels: data.labels=none",
        )
    return pc.take(pa.array(here, pa.int64()), own)


def _format(encoded: bytes, file: InputFile) -> str:
    try:
        return image_format(encoded)
    except BadImage as bad:
        raise DataError(
            f"an image of {file.file.name} could be read when the curation began, and now it "
            f"cannot: {bad.detail}",
            "install on all machines what the curation began with, or give the run another name",
        ) from bad
