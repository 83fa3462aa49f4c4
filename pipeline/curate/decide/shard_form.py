"""The form of curated shards: their columns, and what becomes of each set's labels."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.rows.tables import InputFile, read_table
from pipeline.errors import DataError
from pipeline.images.decode import BadImage, image_format
from pipeline.images.value_range import FULL, ValueRange
from pipeline.pack.sources import extra_fields
from pipeline.shards.classes import label_ids
from pipeline.shards.columns import IMAGE_SHARD_SCHEMA, check_fit, is_ours, shard_metadata
from pipeline.shards.overlap import shared_classes
from pipeline.shards.row_group import image_array
from pipeline.shards.shards import ShardSet


@dataclass(frozen=True)
class Form:
    """What curated shards look like, and what becomes of each set's labels.

    Attributes:
        extras: columns beyond those of every shard.
        class_names: of all sets together.
        labels: by set, the class id of each of its own ids; (): they stay.
        packed: sets whose files are ordered by id.
    """

    extras: pa.Schema
    class_names: tuple[str, ...]
    labels: dict[str, tuple[int, ...]]
    packed: tuple[str, ...]
    value_range: ValueRange = FULL

    @property
    def schema(self) -> pa.Schema:
        """Of a curated shard."""
        joined = pa.schema([*IMAGE_SHARD_SCHEMA, *self.extras])
        return joined.with_metadata(shard_metadata(self.class_names, self.value_range))


def form_of(sets: Sequence[tuple[str, ShardSet]]) -> Form:
    """The form that all sets fit in.

    One list of class names stays as it is; of several the sorted union is taken.

    Raises:
        DataError: labels or further columns of the sets cannot be brought together.
    """
    classes = shared_classes(sets)
    labels = {
        name: tuple(classes.ids(s.class_names).tolist()) if s.has_labels else () for name, s in sets
    }
    schemas = [schema for _, s in sets for schema in _extras_of(s)]
    try:
        extras = pa.unify_schemas([pa.schema([]), *schemas], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"the sets {', '.join(name for name, _ in sets)} disagree about a column: "
            f"{str(error).splitlines()[0]}",
            "pack them again with one type for that column, or without it",
        ) from error
    ordered = pa.schema(sorted(extras, key=lambda f: str(f.name)))
    packed = tuple(name for name, s in sets if s.packed)
    return Form(ordered, classes.names, labels, packed, sets[0][1].columns.value_range)


def check_values(sets: Sequence[tuple[str, ShardSet]], form: Form) -> None:
    """Whether the types of further columns hold all values of all files; reads those that differ.

    Raises:
        DataError: names the column and a value.
    """
    for _, one in sets:
        for index in _different(one):
            kept = _kept_in(one, index)
            for file in range(len(one.files)) if one.packed else [index]:
                check_fit(one.files[file].name, partial(one.parquet, file), kept, form.extras)


def _extras_of(shards: ShardSet) -> list[pa.Schema]:
    """Extra columns of the files of a set."""

    def extras(index: int) -> pa.Schema:
        return pa.schema([field for _, field in _kept_in(shards, index)])

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(extras, _different(shards)))


def _different(shards: ShardSet) -> range:
    """Files whose columns may differ: of a pack all are like the first."""
    return range(min(1, len(shards.files)) if shards.packed else len(shards.files))


def _kept_in(shards: ShardSet, index: int) -> list[tuple[str, pa.Field]]:
    with shards.parquet(index) as parquet:
        return kept_columns(parquet.schema_arrow, shards.columns.image, shards.columns.label)


def kept_columns(schema: pa.Schema, image: str, label: str) -> list[tuple[str, pa.Field]]:
    """Columns of a file beyond those of every shard: (name there, field in the shards)."""
    own = is_ours(schema)
    return extra_fields(schema, *(("image", "label") if own else (image, label)), own=own)


# ---- Rows of input files as rows of a curated shard: which are kept, and in its columns.


Ids = np.ndarray[Any, np.dtype[np.str_]]


def decided(file: InputFile, decisions: str) -> tuple[Ids, np.ndarray[Any, np.dtype[np.bool_]]]:
    """Ids of the rows of a file, and which of them are kept."""
    table = read_table(decisions, file.name, ["image_id", "kept"])
    ids = np.array(table.column("image_id").to_pylist(), "U32")
    return ids, table.column("kept").to_numpy(zero_copy_only=False).copy()


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
