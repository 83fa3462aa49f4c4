"""One curated shard: what is kept of its range of ids, read from all files that have some of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.curate.decide.shard_form import Form, decided, formed
from pipeline.curate.rows.tables import InputFile, Inputs, read_table
from pipeline.curate.steps.steps import Account, Output, Step, Steps
from pipeline.pack.merge import id_range, row_groups, shard_name, shard_of, write_ordered
from pipeline.shards.shard_set import open_parquet
from pipeline.shards.shards import ShardSet
from pipeline.storage.places import resolve_uri
from pipeline.storage.transfer import parquet_writer_atomic
from pipeline.uri import Place, join

EARLIER = "earlier"  # the set of images that are there already


@dataclass(frozen=True)
class Selection:
    """What goes into curated shards.

    Attributes:
        sets: the inputs' sets by name.
        inputs: all files.
        decisions: result of `decide`.
        fingerprints: folder of that step.
        earlier: curated shards that the images are added to.
    """

    sets: Sequence[tuple[str, ShardSet]]
    inputs: Inputs
    decisions: Step
    fingerprints: str
    earlier: ShardSet | None = None

    @property
    def all_sets(self) -> list[tuple[str, ShardSet]]:
        """With the earlier shards."""
        return [*self.sets, *([(EARLIER, self.earlier)] if self.earlier else [])]

    @property
    def images(self) -> int:
        """That are kept, and that were there before."""
        earlier = self.earlier.rows if self.earlier else 0
        return int(self.decisions.total("kept")) + earlier

    @property
    def bytes(self) -> int:
        """Of these images."""
        earlier = sum(file.bytes for file in self.earlier.files) if self.earlier else 0
        return int(self.decisions.total("kept_bytes")) + earlier

    def kept_files(self) -> list[tuple[InputFile, Account]]:
        """The input files of which anything is kept, with what was decided on them."""
        both = zip(self.inputs.files, self.decisions.accounts, strict=True)
        return [(file, account) for file, account in both if account["kept"]]


@dataclass(frozen=True)
class Layout:
    """How curated shards are cut, and where their rows are read from.

    Attributes:
        key: of all that the shards depend on.
        form: of a shard.
        shards: how many.
        row_group_images: rows of a row group, fewer where images are large.
        decisions: folder of the decisions.
        fingerprints: folder of that step.
        sorted: folder of files that were sorted first; "" where none had to be.
    """

    key: str
    form: Form
    shards: int
    row_group_images: int
    decisions: str
    fingerprints: str
    sorted: str = ""


@dataclass(frozen=True)
class Piece:
    """What a shard takes from one file: its range of an input, or a row group that was sorted."""

    file: InputFile
    sorted: str = ""  # name of the sorted file
    group: int = 0

    @property
    def key(self) -> str:
        """The layout's key says the rest."""
        return f"{self.file.set} {self.file.name} {self.sorted} {self.group}"


def write_shard(out: Output, pieces: Sequence[Piece], layout: Layout) -> Account:
    """Task: writes the shard that the task is called after; no rows, no file.

    Raises:
        RuntimeError: two rows have one id.
    """
    index, schema = int(out.name), layout.form.schema
    new, old = (
        [
            table
            for piece in pieces
            if (piece.file.set == EARLIER) is earlier
            for table in _read(piece, index, layout)
        ]
        for earlier in (False, True)
    )
    new, again = _without(new, old)
    tables = [*new, *old]
    table = _in_order(pa.concat_tables(tables) if tables else schema.empty_table())
    if pc.count_distinct(table["image_id"]).as_py() != len(table):
        raise RuntimeError(f"shard {index} would hold an image twice")
    sizes = pc.binary_length(table["image"]).to_numpy()
    groups = (
        table.slice(start, end - start)
        for start, end in row_groups(sizes, layout.row_group_images)
        if end > start
    )
    name = shard_name(index)
    fs, path = resolve_uri(str(join(out.folder, name)))
    account = {"name": name, "rows": len(table), "again": again}
    return account | write_ordered(schema, fs, path, groups)


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


def _read(piece: Piece, index: int, layout: Layout) -> Iterator[pa.Table]:
    """The rows of a piece that are kept and have ids of this shard, in the form of a shard."""
    form, (low, high) = layout.form, id_range(index, layout.shards)
    if piece.sorted:
        fs, path = resolve_uri(str(join(layout.sorted, f"{piece.sorted}.parquet")))
        with open_parquet(fs, path, piecewise=True) as parquet:
            yield parquet.read_row_group(piece.group).cast(form.schema)
        return
    if piece.file.set == EARLIER:
        with _parquet(piece.file) as parquet:
            names = parquet.read(columns=["image_id"]).column(0).to_pylist()
        ids, kept = np.array(names, "U32"), np.ones(len(names), bool)
    else:
        ids, kept = decided(piece.file, layout.decisions)
    kept &= (ids >= low) & (ids < high)
    for table, rows in _kept_groups(piece.file, kept):
        yield formed(table, ids[rows], None, piece.file, form)


def _parquet(file: InputFile) -> pq.ParquetFile:
    fs, _ = resolve_uri(file.columns.uri)
    return open_parquet(fs, file.file.path, piecewise=True)


def _kept_groups(
    file: InputFile, kept: np.ndarray[Any, np.dtype[np.bool_]]
) -> Iterator[tuple[pa.Table, np.ndarray[Any, np.dtype[np.int64]]]]:
    """What is kept of each row group, and the places of these rows in the file."""
    first = 0
    with _parquet(file) as parquet:
        for group, count in enumerate(file.file.row_groups):
            chosen = np.flatnonzero(kept[first : first + count])
            if len(chosen):
                table = parquet.read_row_group(group)
                yield table if len(chosen) == count else table.take(chosen), first + chosen
            first += count


# ---- Input files that are not ordered by id, each sorted by itself, for the shards to read from.
#
# Row groups of a sorted file end where a shard ends, so a shard reads what is its own.


RUN_BYTES = 256 * 2**20  # of images that are sorted at once


def sort_files(root: Place, selection: Selection, layout: Layout) -> Step | None:
    """The step that sorts the files that are not packed; None where nothing of them is kept."""
    packed = layout.form.packed
    loose = {f.name: f for f, _ in selection.kept_files() if f.set not in packed}
    return Steps(root).run("sorted", sort_file, loose, layout=layout) if loose else None


def sort_file(out: Output, file: InputFile, layout: Layout) -> Account:
    """Task: the rows of a file that are kept, as one or more files sorted by id."""
    ids, kept = decided(file, layout.decisions)
    about = read_table(layout.fingerprints, file.name, ["source", "width", "height"])
    runs: list[dict[str, Any]] = []
    buffered: list[pa.Table] = []
    size = 0
    for table, rows in _kept_groups(file, kept):
        buffered.append(formed(table, ids[rows], about.take(rows), file, layout.form))
        size += table.nbytes
        if size >= RUN_BYTES:
            runs.append(_write_run(out.folder, f"{file.name}-{len(runs):03d}", buffered, layout))
            buffered, size = [], 0
    if buffered:
        runs.append(_write_run(out.folder, f"{file.name}-{len(runs):03d}", buffered, layout))
    return {"rows": int(kept.sum()), "file": file.index, "runs": runs}


def _write_run(folder: str, name: str, tables: list[pa.Table], layout: Layout) -> dict[str, Any]:
    """One file sorted by id, with a row group for each shard that it has rows of."""
    table = pa.concat_tables(tables)
    table = table.take(pc.sort_indices(table, [("image_id", "ascending")]))
    places = np.array([shard_of(x, layout.shards) for x in table["image_id"].to_pylist()])
    starts = np.flatnonzero(np.r_[True, places[1:] != places[:-1]])
    fs, path = resolve_uri(str(join(folder, f"{name}.parquet")))
    with parquet_writer_atomic(layout.form.schema, fs, path) as writer:
        for first, end in pairwise([*starts.tolist(), len(places)]):
            writer.write_table(table.slice(first, end - first), row_group_size=end - first)
    return {"name": name, "shards": places[starts].tolist()}
