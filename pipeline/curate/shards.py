"""Curated shards: the images that are kept, as image shards that open like packed ones.

Shard i of n holds the i-th n-th of all ids, as in a pack, so the order is random and does not
depend on the machine. Files of packed sets are ordered by id already and are read where a shard
needs them. Other files are first sorted (`shard_runs`), so that each shard reads from each of them
what is its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.curate.shard_form import form_of
from pipeline.curate.shard_runs import sort_files
from pipeline.curate.shard_write import EARLIER, Piece, write_shard
from pipeline.curate.tables import AS_IS, InputFile, Inputs
from pipeline.curate.work import Result, Task, run_step
from pipeline.data.columns import MANIFEST
from pipeline.data.ledger import write_manifest
from pipeline.data.merge import shard_of
from pipeline.data.schema import ShardSet, open_shards
from pipeline.data.storage import exists, list_files, resolve_uri
from pipeline.data.transfer import read_json, write_bytes_atomic
from pipeline.errors import DataError
from pipeline.files import fingerprint
from pipeline.uri import Place, parent, public

MARK = "curated from "  # begins the `source` of a manifest


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
    runs = sort_files(work, inputs, decisions, fingerprints, form, count, key)
    results += [runs] if runs else []
    for file, account in zip(inputs.files, decisions.accounts, strict=True):
        if file.set in form.packed and account["kept"]:
            for index in range(
                shard_of(account["low"], count), shard_of(account["high"], count) + 1
            ):
                pieces[index].append(Piece(file))
    if earlier:
        for file, low, high in _ranges(earlier):
            for index in range(shard_of(low, count), shard_of(high, count) + 1):
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
