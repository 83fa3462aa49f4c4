"""Open image shards: packed by this project, or parquet files as a hub stores them.

What a shard is stands in `columns`, what a set of them is in `shard_set`. A packed set is opened by
its manifest (`manifest`), any other one by the footers of its files, here. `row_group` reads a row
group of one.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.errors import DataError
from pipeline.shards.classes import label_kind, label_names
from pipeline.shards.columns import (
    MANIFEST,
    check_columns,
    class_names_of,
    is_ours,
    value_range_of,
)
from pipeline.shards.manifest import check_footers, shards_of_manifest
from pipeline.shards.shard_set import (
    ShardColumns,
    ShardFile,
    ShardSet,
    column_chunks,
    open_parquet,
    row_group_rows,
)
from pipeline.storage.places import absolute_uri, list_parquet, public_uri, resolve_uri
from pipeline.storage.transfer import read_json

__all__ = ["ShardColumns", "ShardFile", "ShardSet", "open_parquet", "open_shards"]


def open_shards(
    uri: str,
    image_column: str = "image",
    label_column: str = "label",
    field: str = "data.shards",
    labels: bool = True,
) -> ShardSet:
    """Find the shards at `uri`: a folder (of any depth), one file, or `folder/train-*.parquet`.

    A folder that this project packed is opened by its manifest, which knows the columns and is
    compared with the footers of up to `manifest.CHECKED` files. Of other files all footers are
    read, and a label column that holds names.

    Args:
        uri: a path or URI.
        image_column: of files that are not packed.
        label_column: likewise, of class ids or class names.
        field: of the config that named the place.
        labels: False: the label column of files of others is not looked at.

    Raises:
        DataError: no such path, no parquet file, packing not finished, a shard missing or cut, no
            image column, or columns of a type that cannot be used.
    """
    uri = absolute_uri(str(uri))
    fs, path = resolve_uri(uri)
    infos = list_parquet(fs, path, uri, field)
    if infos[0].path != path and "*" not in path:
        manifest = read_json(fs, f"{path}/{MANIFEST}")
        if manifest is not None:
            shards = shards_of_manifest(uri, path, manifest, infos)
            check_footers(fs, shards, manifest, infos)
            return shards
    return _from_footers(
        uri, fs, path, infos, ShardColumns(uri, image_column, label_column, labels)
    )


def _from_footers(
    uri: str, fs: pafs.FileSystem, path: str, infos: Sequence[pafs.FileInfo], columns: ShardColumns
) -> ShardSet:
    label = columns.label if columns.labels else ""

    def footer(info: pafs.FileInfo) -> tuple[ShardFile, pa.Schema, bool]:
        with open_parquet(fs, info.path) as parquet:
            meta, schema = parquet.metadata, parquet.schema_arrow
            check_columns(schema, info.base_name, columns.image, label)
            groups = row_group_rows(meta)
            labelled = label in schema.names and _any_value(meta, label)
        return ShardFile(info.path, meta.num_rows, groups, info.size), schema, labelled

    with ThreadPoolExecutor(8) as pool:  # footers of remote files are a round trip each
        footers = list(pool.map(footer, infos))
    ours = [is_ours(schema) for _, schema, _ in footers]
    whole = len(infos) > 1 or infos[0].path != path
    if any(ours) and whole and "*" not in path:
        raise DataError(
            f"{public_uri(uri)} holds packed shards but no {MANIFEST}: packing was not finished",
            hint="run the same pack again; it goes on where it stopped.",
        )
    digest = hashlib.blake2b(digest_size=16)
    for file, _, _ in footers:
        digest.update(f"{file.name}\0{file.bytes}\0{file.rows}\n".encode())
    labelled = [(file, schema) for file, schema, has in footers if has]
    kinds = {label_kind(schema.field(label).type) for _, schema in labelled}
    lists = {() if "names" in kinds else class_names_of(schema, label) for _, schema in labelled}
    if len(lists) > 1 or len(kinds) > 1:
        raise DataError(
            f"the files under {public_uri(uri)} have different class names, or some have names "
            "and others only ids",
            hint="pack them into one set first, which brings names together: python jobs/pack.py "
            f"data.source={public_uri(uri)} data.shards=shards/",
        )
    names = next(iter(lists or {class_names_of(schema, label) for _, schema, _ in footers}), ())
    if kinds == {"names"}:
        names = _names_in(uri, label, tuple((file.path, file.bytes) for file, _ in labelled))
    return ShardSet(
        uri=uri,
        files=tuple(file for file, _, _ in footers),
        rows=sum(file.rows for file, _, _ in footers),
        class_names=names,
        packed=all(ours),
        digest=digest.hexdigest(),
        image_column=columns.image,
        label_column=columns.label,
        has_labels=bool(labelled),
        reads_labels=columns.labels,
        labels_are_names=kinds == {"names"},
        value_range=value_range_of(footers[0][1]) if footers else None,
    )


@functools.lru_cache(16)
def _names_in(uri: str, label: str, files: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """The names that a label column of names holds, sorted; only that column is read.

    Args:
        uri: of the set.
        label: the column.
        files: path and bytes of each file.
    """
    fs, _ = resolve_uri(uri)

    def distinct(path: str) -> set[str]:
        with open_parquet(fs, path, piecewise=True) as parquet:
            return {
                str(name)
                for batch in parquet.iter_batches(columns=[label])
                for name in label_names(pa.chunked_array([batch.column(0)])).unique().to_pylist()
                if name is not None
            }

    with ThreadPoolExecutor(8) as pool:
        return tuple(sorted(set().union(*pool.map(distinct, [path for path, _ in files]))))


def _any_value(meta: pq.FileMetaData, column: str) -> bool:
    """Whether a column has a value that is neither null nor below 0, by the footer; True where it
    does not say.
    """
    for chunk in column_chunks(meta, column):
        stats = chunk.statistics
        if stats is None or not stats.has_null_count:
            return True
        below = stats.has_min_max and isinstance(stats.max, int) and stats.max < 0
        if stats.null_count < chunk.num_values and not below:
            return True
    return False
