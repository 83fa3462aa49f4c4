"""The form of curated shards: their columns, and what becomes of each set's labels."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from pipeline.data.columns import IMAGE_SHARD_SCHEMA, is_ours, shard_metadata
from pipeline.data.extras import check_fit
from pipeline.data.overlap import shared_classes
from pipeline.data.schema import ShardSet
from pipeline.data.sources import extra_fields
from pipeline.data.value_range import FULL, ValueRange
from pipeline.errors import DataError


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
        for index in range(1 if one.packed else len(one.files)):
            with one.parquet(index) as parquet:
                kept = kept_columns(parquet.schema_arrow, one.columns.image, one.columns.label)
            if one.packed:  # all its files have the types of the first
                files: range = range(len(one.files))
            else:
                files = range(index, index + 1)
            for file in files:
                check_fit(one.files[file].name, partial(one.parquet, file), kept, form.extras)


def _extras_of(shards: ShardSet) -> list[pa.Schema]:
    """Extra columns of the files of a set; those of a pack are all alike."""

    def schema(index: int) -> pa.Schema:
        with shards.parquet(index) as parquet:
            found = parquet.schema_arrow
        return pa.schema(
            [f for _, f in kept_columns(found, shards.columns.image, shards.columns.label)]
        )

    with ThreadPoolExecutor(8) as pool:
        return list(
            pool.map(
                schema, range(min(1, len(shards.files)) if shards.packed else len(shards.files))
            )
        )


def kept_columns(schema: pa.Schema, image: str, label: str) -> list[tuple[str, pa.Field]]:
    """Columns of a file beyond those of every shard: (name there, field in the shards)."""
    own = is_ours(schema)
    return extra_fields(schema, *(("image", "label") if own else (image, label)), own=own)
