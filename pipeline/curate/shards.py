"""Curated shards: the images that are kept, as image shards that open like packed ones.

Shard i of n holds the i-th n-th of all ids, as in a pack, so the order is random and does not
depend on the machine. Files of packed sets are ordered by id already and are read where a shard
needs them. Other files are first sorted, each by itself, in row groups that end where a shard ends,
so that each shard reads from each of them what is its own.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.curate.tables import AS_IS, InputFile, Inputs, read_table
from pipeline.curate.work import Account, Result, Task, run_step
from pipeline.data.columns import IMAGE_SHARD_SCHEMA, MANIFEST, is_ours, shard_metadata
from pipeline.data.ledger import write_manifest
from pipeline.data.merge import id_range, row_groups, shard_name
from pipeline.data.npy import MAGIC
from pipeline.data.pictures import FORMATS
from pipeline.data.schema import ShardSet, image_array, open_shards
from pipeline.data.sources import extra_fields
from pipeline.data.storage import exists, file_info, list_files, resolve_uri
from pipeline.data.transfer import (
    open_patiently,
    parquet_writer_atomic,
    read_json,
    write_bytes_atomic,
)
from pipeline.errors import DataError
from pipeline.files import fingerprint
from pipeline.uri import Place, join, parent, public

EARLIER = "earlier"  # the set of images that are there already
MARK = "curated from "  # begins the `source` of a manifest
RUN_BYTES = 256 * 2**20  # of images that are sorted at once

Ids = np.ndarray[Any, np.dtype[np.str_]]


@dataclass(frozen=True)
class Form:
    """What curated shards look like, and what becomes of each set's labels.

    Attributes:
        extras: columns beyond those of every shard.
        class_names: of all sets together.
        labels: by set, the class id of each of its own ids; (): they stay, None: they are left out.
        packed: sets whose files are ordered by id.
    """

    extras: pa.Schema
    class_names: tuple[str, ...]
    labels: dict[str, tuple[int, ...] | None]
    packed: tuple[str, ...]

    @property
    def schema(self) -> pa.Schema:
        """Of a curated shard."""
        joined = pa.schema([*IMAGE_SHARD_SCHEMA, *self.extras])
        return joined.with_metadata(shard_metadata(self.class_names))


@dataclass(frozen=True)
class Piece:
    """What a shard takes from one file: the rows of an input, or row groups that were sorted."""

    file: InputFile
    sorted: str = ""  # name of the sorted file
    groups: tuple[int, ...] = ()


def form_of(sets: Sequence[tuple[str, ShardSet]]) -> Form:
    """The form that all sets fit in.

    One list of class names stays as it is; of several the sorted union is taken. Labels without
    names mean the same in all sets only where no other set has labels; else they are left out.
    """
    labelled = [(name, s) for name, s in sets if s.has_labels]
    lists = {s.class_names for _, s in labelled}
    labels: dict[str, tuple[int, ...] | None] = {name: () for name, _ in sets}
    names = next(iter(lists), ())
    if len(lists) > 1:
        names = tuple(sorted({n for found in lists for n in found}))
        ids = {name: i for i, name in enumerate(names)}
        for name, s in labelled:
            labels[name] = tuple(ids[n] for n in s.class_names) or None
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
    return Form(ordered, names, labels, tuple(name for name, s in sets if s.packed))


def _extras_of(shards: ShardSet) -> list[pa.Schema]:
    """Extra columns of the files of a set; those of a pack are all alike."""

    def schema(index: int) -> pa.Schema:
        with shards.parquet(index) as parquet:
            found = parquet.schema_arrow
        return pa.schema(
            [f for _, f in _kept_columns(found, shards.columns.image, shards.columns.label)]
        )

    with ThreadPoolExecutor(8) as pool:
        return list(
            pool.map(
                schema, range(min(1, len(shards.files)) if shards.packed else len(shards.files))
            )
        )


def _kept_columns(schema: pa.Schema, image: str, label: str) -> list[tuple[str, pa.Field]]:
    own = is_ours(schema)
    return extra_fields(schema, *(("image", "label") if own else (image, label)), own=own)


def write_curated(
    shards: Place,
    work: Place,
    sets: Sequence[tuple[str, ShardSet]],
    inputs: Inputs,
    decisions: Result,
    fingerprints: str,
    *,
    shard_bytes: int,
    row_group_images: int,
    earlier: ShardSet | None = None,
) -> tuple[ShardSet, list[Result], int]:
    """Writes the images that are kept as image shards with a manifest; needs a joined Ray cluster.

    A rerun writes what is missing, and nothing where nothing changed.

    Args:
        shards: folder for them; what an earlier curation wrote there is replaced.
        work: folder of the curation.
        sets: the inputs' sets by name.
        inputs: all files.
        decisions: result of `decide`.
        fingerprints: folder of that step.
        shard_bytes: about the size of a shard.
        row_group_images: rows of a row group, fewer where images are large.
        earlier: curated shards that the images are added to.

    Returns:
        The shards, the results of the steps that ran, and how many of the earlier images came again
        (byte for byte, though nothing took them for copies).

    Raises:
        DataError: nothing is kept and nothing was there, or the folder holds something else.
    """
    kept = int(decisions.total("kept"))
    if not kept and not (earlier and earlier.rows):
        raise DataError(
            f"curation kept none of {inputs.rows:,} images",
            "the decisions say why, image by image; relax the rule that removed most of them",
        )
    form = form_of([*sets, *([(EARLIER, earlier)] if earlier else [])])
    size = decisions.total("kept_bytes")
    size += sum(f.bytes for f in earlier.files) if earlier else 0
    count = max(1, math.ceil(size / shard_bytes))
    about = [decisions.key, count, row_group_images, str(form.schema), form.class_names]
    about += [earlier.digest] if earlier else []
    key = fingerprint([*about, sorted(form.labels.items()), form.packed, str(shards)])
    if (found := _finished(work, shards, key)) is not None:
        return found, [], kept + (earlier.rows if earlier else 0) - found.rows
    _claim(shards)
    results = []
    pieces: list[list[Piece]] = [[] for _ in range(count)]
    runs = _sorted(work, inputs, decisions, fingerprints, form, count, key)
    results += [runs] if runs else []
    for file, account in zip(inputs.files, decisions.accounts, strict=True):
        if file.set in form.packed and account["kept"]:
            for index in range(_place(account["low"], count), _place(account["high"], count) + 1):
                pieces[index].append(Piece(file))
    if earlier:
        for file, low, high in _ranges(earlier):
            for index in range(_place(low, count), _place(high, count) + 1):
                pieces[index].append(Piece(file))
    for account in runs.accounts if runs else ():
        file = inputs.files[account["file"]]
        for run in account["runs"]:
            for index in sorted(set(run["shards"])):
                groups = tuple(g for g, i in enumerate(run["shards"]) if i == index)
                pieces[index].append(Piece(file, run["name"], groups))
    folder, name = parent(shards)
    rest = (decisions.folder, runs.folder if runs else "", form, row_group_images)
    tasks = [
        Task(f"{index:05d}", (index, count, tuple(mine), *rest))
        for index, mine in enumerate(pieces)
    ]
    written = run_step(folder, name, key, tasks, write_shard)
    results.append(written)
    again = int(written.total("again"))
    wanted = kept + (earlier.rows if earlier else 0) - again
    if written.total("rows") != wanted:
        raise RuntimeError(f"{wanted} images are kept, {written.total('rows')} are in the shards")
    every = [*sets, *([(EARLIER, earlier)] if earlier else [])]
    source = MARK + ", ".join(public(s.uri) for _, s in every)
    write_manifest(str(shards), source, form.class_names, written.accounts)
    found = open_shards(str(shards))
    fs, path = resolve_uri(str(work))
    content = json.dumps({"key": key, "digest": found.digest}).encode()
    write_bytes_atomic(content, fs, f"{path}/curated.json")
    if runs:  # as large as the images
        fs, path = resolve_uri(runs.folder)
        fs.delete_dir(path)
    return found, results, again


def _ranges(earlier: ShardSet) -> list[tuple[InputFile, str, str]]:
    """Files of an earlier curation with their first and last id."""

    def one(index: int) -> tuple[InputFile, str, str]:
        with earlier.parquet(index) as parquet:
            meta = parquet.metadata
            place = parquet.schema_arrow.get_field_index("image_id")
            ends = [
                meta.row_group(g).column(place).statistics for g in (0, meta.num_row_groups - 1)
            ]
        file = InputFile(index, EARLIER, AS_IS, 0, earlier.files[index], earlier.columns)
        return file, ends[0].min, ends[1].max

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(len(earlier.files))))


def _finished(work: Place, shards: Place, key: str) -> ShardSet | None:
    """The shards of the same curation, if they are all there."""
    fs, path = resolve_uri(str(work))
    mark = read_json(fs, f"{path}/curated.json")
    if mark is None or mark["key"] != key:
        return None
    try:
        found = open_shards(str(shards))
    except DataError:
        folder_fs, folder = resolve_uri(str(shards))
        if exists(folder_fs, f"{folder}/_key.json"):
            folder_fs.delete_file(
                f"{folder}/_key.json"
            )  # its accounts speak of files that are gone
        return None
    return found if found.digest == mark["digest"] else None


def _claim(shards: Place) -> None:
    """Refuses a folder with files of others; takes the manifest away before anything changes."""
    fs, path = resolve_uri(str(shards))
    if not exists(fs, path):
        return
    manifest = read_json(fs, f"{path}/{MANIFEST}")
    ours = exists(fs, f"{path}/_key.json") and (
        manifest is None or str(manifest.get("source", "")).startswith(MARK)
    )
    ours = ours or (manifest is not None and str(manifest.get("source", "")).startswith(MARK))
    if not ours and list_files(fs, path):
        raise DataError(
            f"{public(shards)} holds something that no curation wrote",
            "choose another curate.shards, or delete that folder first",
        )
    if manifest is not None:
        fs.delete_file(f"{path}/{MANIFEST}")


def _place(name: str, count: int) -> int:
    """The shard that an id belongs to."""
    return int(name, 16) * count >> 128


def _sorted(
    work: Place,
    inputs: Inputs,
    decisions: Result,
    fingerprints: str,
    form: Form,
    count: int,
    key: str,
) -> Result | None:
    loose = [
        file
        for file, account in zip(inputs.files, decisions.accounts, strict=True)
        if file.set not in form.packed and account["kept"]
    ]
    if not loose:
        return None
    tasks = [Task(file.name, (file, count, decisions.folder, fingerprints, form)) for file in loose]
    return run_step(work, "sorted", key, tasks, sort_file)


def sort_file(
    folder: str, file: InputFile, count: int, decisions: str, fingerprints: str, form: Form
) -> Account:
    """Task: the rows of a file that are kept, as one or more files sorted by id."""
    ids, kept = _decided(file, decisions)
    about = read_table(fingerprints, file.name, ["source", "width", "height"])
    runs: list[dict[str, Any]] = []
    held: list[pa.Table] = []
    total = 0

    def flush() -> None:
        if not held:
            return
        table = pa.concat_tables(held)
        table = table.take(pc.sort_indices(table, [("image_id", "ascending")]))
        name = f"{file.name}-{len(runs):03d}"
        places = [_place(x, count) for x in table.column("image_id").to_pylist()]
        fs, path = resolve_uri(str(join(folder, f"{name}.parquet")))
        order, first = [], 0
        with parquet_writer_atomic(form.schema, fs, path) as writer:
            for end in range(1, len(places) + 1):
                if end == len(places) or places[end] != places[first]:
                    writer.write_table(table.slice(first, end - first), row_group_size=end - first)
                    order.append(places[first])
                    first = end
        runs.append({"name": name, "shards": order})
        held.clear()

    with _opened(file) as parquet:
        first = 0
        for group, rows in enumerate(file.file.row_groups):
            wanted = np.flatnonzero(kept[first : first + rows])
            if len(wanted):
                table = parquet.read_row_group(group).take(pa.array(wanted))
                held.append(
                    _formed(table, ids[first + wanted], about.take(first + wanted), file, form)
                )
                total += table.nbytes
                if total >= RUN_BYTES:
                    flush()
                    total = 0
            first += rows
    flush()
    return {"rows": int(kept.sum()), "file": file.index, "runs": runs}


def write_shard(
    folder: str,
    index: int,
    count: int,
    pieces: tuple[Piece, ...],
    decisions: str,
    sorted_folder: str,
    form: Form,
    row_group_images: int,
) -> Account:
    """Task: writes shard `index` of `count`; no rows, no file.

    Raises:
        RuntimeError: two rows have one id.
    """
    low, high = id_range(index, count)
    new, old = (
        [
            table
            for piece in pieces
            if (piece.file.set == EARLIER) is there
            for table in _read(piece, low, high, decisions, sorted_folder, form)
        ]
        for there in (False, True)
    )
    new, again = _without(new, old)
    found = [*new, *old]
    table = _in_order(pa.concat_tables(found) if found else form.schema.empty_table())
    account: Account = {"name": shard_name(index), "rows": table.num_rows, "row_groups": []}
    account["again"] = again
    ids = table.column("image_id").to_pylist()
    labels = table.column("label").to_pylist()
    if len(set(ids)) != len(ids):
        raise RuntimeError(f"shard {index} would hold an image twice")
    account["bytes"] = 0
    if ids:
        fs, path = resolve_uri(str(join(folder, account["name"])))
        sizes = pc.binary_length(table.column("image")).to_numpy()
        with parquet_writer_atomic(form.schema, fs, path) as writer:
            for start, end in row_groups(sizes, row_group_images):
                writer.write_table(table.slice(start, end - start), row_group_size=end - start)
                account["row_groups"].append(end - start)
        account["bytes"] = file_info(fs, path).size
    digest = hashlib.blake2b(digest_size=16)
    for name, label in zip(ids, labels, strict=True):
        digest.update(f"{name} {label}\n".encode())
    account["labelled"] = sum(label is not None for label in labels)
    account["digest"] = digest.hexdigest()
    return account


def _without(new: list[pa.Table], old: list[pa.Table]) -> tuple[list[pa.Table], int]:
    """New rows whose ids are not among the old ones, and how many were."""
    if not new or not old:
        return new, 0
    known = pa.concat_arrays([c for t in old for c in t.column("image_id").chunks])
    fresh = [t.filter(pc.invert(pc.is_in(t.column("image_id"), known))) for t in new]
    return fresh, sum(map(len, new)) - sum(map(len, fresh))


def _in_order(table: pa.Table) -> pa.Table:
    ids = table.column("image_id").to_numpy(zero_copy_only=False).astype(str)
    if (ids[1:] >= ids[:-1]).all():
        return table
    # binary columns above 2 GiB in one chunk cannot be taken from; a shard has a quarter of one
    return table.take(pa.array(np.argsort(ids, kind="stable")))


def _read(
    piece: Piece, low: str, high: str, decisions: str, sorted_folder: str, form: Form
) -> Iterator[pa.Table]:
    """The rows of a piece with low <= id < high that are kept, in the form of a shard."""
    if piece.sorted:
        fs, path = resolve_uri(str(join(sorted_folder, f"{piece.sorted}.parquet")))
        with open_patiently(fs, path) as file, pq.ParquetFile(file) as parquet:
            yield parquet.read_row_groups(list(piece.groups)).cast(form.schema)
        return
    if piece.file.set == EARLIER:
        with _opened(piece.file) as parquet:
            names = parquet.read(columns=["image_id"]).column(0).to_pylist()
        ids, kept = np.array(names, "U32"), np.ones(len(names), bool)
    else:
        ids, kept = _decided(piece.file, decisions)
    kept &= (ids >= low) & (ids < high)
    first = 0
    with _opened(piece.file) as parquet:
        for group, rows in enumerate(piece.file.file.row_groups):
            wanted = np.flatnonzero(kept[first : first + rows])
            if len(wanted):
                table = parquet.read_row_group(group)
                if len(wanted) < rows:
                    table = table.take(pa.array(wanted))
                yield _formed(table, ids[first + wanted], None, piece.file, form)
            first += rows


def _decided(file: InputFile, decisions: str) -> tuple[Ids, np.ndarray[Any, np.dtype[np.bool_]]]:
    table = read_table(decisions, file.name, ["image_id", "kept"])
    ids = np.array(table.column("image_id").to_pylist(), "U32")
    return ids, table.column("kept").to_numpy(zero_copy_only=False).copy()


def _opened(file: InputFile) -> pq.ParquetFile:
    fs, _ = resolve_uri(file.columns.uri)
    return pq.ParquetFile(open_patiently(fs, file.file.path))


def _formed(
    table: pa.Table, ids: Ids, about: pa.Table | None, file: InputFile, form: Form
) -> pa.Table:
    """Rows of an input file with the columns of a curated shard."""
    own = is_ours(table.schema)
    image, label = ("image", "label") if own else (file.columns.image, file.columns.label)
    origin = {field.name: name for name, field in _kept_columns(table.schema, image, label)}
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
        columns["format"] = pa.array([_format(x.as_py()) for x in columns["image"]], pa.string())
    columns["label"] = _labels(table, label, form.labels[file.set])
    for extra in form.extras:
        name = origin.get(extra.name)
        columns[extra.name] = (
            table.column(name).cast(extra.type) if name else pa.nulls(len(ids), extra.type)
        )
    return pa.table([columns[name] for name in form.schema.names], schema=form.schema)


def _labels(table: pa.Table, label: str, ids: tuple[int, ...] | None) -> Any:
    if label not in table.schema.names or ids is None:
        return pa.nulls(len(table), pa.int64())
    found = table.column(label).cast(pa.int64())
    if not ids:
        return found
    return pa.array([None if x is None else ids[x] for x in found.to_pylist()], pa.int64())


def _format(encoded: bytes) -> str:
    """As `decode.decode` names it, from the header alone."""
    from PIL import Image

    if encoded.startswith(MAGIC):
        return "NPY"
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        return str(image.format)
