"""Curated shards: the images that are kept, as image shards that open like packed ones.

Shard i of n holds the i-th n-th of all ids, as in a pack, so the order is random and does not
depend on the machine. Files of packed sets are ordered by id already and are read where a shard
needs them. Other files are first sorted (`sort_files`), so that each shard reads from each of them
what is its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from pipeline.curate.decide.shard_form import check_values, form_of
from pipeline.curate.decide.shard_write import (
    EARLIER,
    Layout,
    Piece,
    Selection,
    sort_files,
    write_shard,
)
from pipeline.curate.rows.tables import AS_IS, InputFile
from pipeline.curate.steps.steps import Step, Steps, by_number
from pipeline.curate.steps.tasks import empty_step, step_files
from pipeline.errors import DataError, StorageError
from pipeline.pack.ledger import check_replaceable, replaceable, unfinished, write_manifest
from pipeline.pack.merge import shard_of
from pipeline.shards.columns import MANIFEST
from pipeline.shards.shards import ShardSet, open_shards
from pipeline.storage.claim import ClaimedFolder, Owner, check_unclaimed, claimed
from pipeline.storage.places import exists, list_files, resolve_uri
from pipeline.storage.run_folder import fingerprint
from pipeline.storage.transfer import read_mark, write_bytes_atomic
from pipeline.uri import Place, join, parent, public

MARK = "curated from "  # begins the `source` of a manifest
MADE = "curated.json"  # in the folder of the curation: which shards it has made last


def write_curated(
    shards: Place,
    root: Place,
    selection: Selection,
    *,
    shard_bytes: int,
    row_group_images: int,
) -> tuple[ShardSet, int]:
    """Writes the images that are kept as image shards with a manifest; needs a joined Ray cluster.

    A rerun writes what is missing, and nothing where nothing changed.

    Args:
        shards: folder for them; what an earlier curation wrote there is replaced.
        root: folder of the curation.
        selection: the images.
        shard_bytes: about the size of a shard.
        row_group_images: rows of a row group, fewer where images are large.

    Returns:
        The shards, and how many of the earlier images came again (byte for byte, though nothing
        took them for copies).

    Raises:
        DataError: nothing is kept and nothing was there, or the folder holds something else.
    """
    decisions, earlier, every = selection.decisions, selection.earlier, selection.all_sets
    if not selection.images:
        raise DataError(
            f"curation kept none of {selection.inputs.rows:,} images",
            "the decisions say why, image by image; relax the rule that removed most of them",
        )
    form = form_of(every)
    count = max(1, math.ceil(selection.bytes / shard_bytes))
    about = [decisions.key, count, row_group_images, str(form.schema), form.class_names]
    about += [earlier.digest] if earlier else []
    key = fingerprint([*about, sorted(form.labels.items()), form.packed, str(shards)])
    if (curated := _finished(root, shards, key)) is not None:
        return curated, selection.images - curated.rows

    # The types are checked before anything is sorted or written, for that reads all values.
    check_values(every, form)
    source = source_of([one.uri for _, one in every])
    layout = Layout(key, form, count, row_group_images, decisions.folder, selection.fingerprints)
    runs = sort_files(root, selection, layout)
    layout = replace(layout, sorted=runs.folder if runs else "")
    pieces = _pieces(selection, layout, runs)
    folder, name = parent(shards)
    steps = Steps(folder)
    owner = Owner(source, public(root))
    with claimed(str(shards), owner, lambda: unfinished(str(shards))) as claim:
        step = steps.key(name, pieces, function=write_shard, layout=layout)
        _make_ready(claim, root, source, key, step)
        written = steps.run(name, write_shard, pieces, layout=layout)
        again = int(written.total("again"))
        if (rows := int(written.total("rows"))) != selection.images - again:
            raise RuntimeError(
                f"{selection.images - again} images are kept, {rows} are in the shards"
            )
        claim.check()
        write_manifest(
            str(shards), source, form.class_names, written.accounts, form.value_range, None
        )
        curated = open_shards(str(shards))
    fs, path = resolve_uri(str(root))
    mark = {"key": key, "digest": curated.digest, "shards": public(shards)}
    write_bytes_atomic(json.dumps(mark).encode(), fs, f"{path}/{MADE}")
    if runs:  # as large as the images
        empty_step(runs.folder, step_files(runs.folder))
    return curated, again


def _pieces(selection: Selection, layout: Layout, runs: Step | None) -> dict[str, list[Piece]]:
    """What each shard is made of: shards hold ranges of ids, and files say which ids they hold."""
    pieces: list[list[Piece]] = [[] for _ in range(layout.shards)]
    ranges = [  # packed files are sorted by id, so a shard reads its range of each
        (file, account["low"], account["high"])
        for file, account in selection.kept_files()
        if file.set in layout.form.packed
    ]
    ranges += _ranges(selection.earlier) if selection.earlier else []
    for file, low, high in ranges:
        for index in range(shard_of(low, layout.shards), shard_of(high, layout.shards) + 1):
            pieces[index].append(Piece(file))
    for account in runs.accounts if runs else ():  # others were sorted into runs before
        file = selection.inputs.files[account["file"]]
        for run in account["runs"]:
            for group, index in enumerate(run["shards"]):
                pieces[index].append(Piece(file, run["name"], group))
    return by_number(pieces)


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


def _finished(root: Place, shards: Place, key: str) -> ShardSet | None:
    """The shards of the same curation, if they are all there."""
    mark = read_mark(*resolve_uri(str(join(root, MADE))))
    if mark.get("key") != key:
        return None
    try:
        curated = open_shards(str(shards))
    except StorageError:
        raise
    except DataError:
        return None
    return curated if curated.digest == mark.get("digest") else None


def check_shards(shards: str, root: Place, sets: Sequence[str]) -> None:
    """Looks whether a curation may write its shards there, and changes nothing.

    Args:
        shards: folder for them.
        root: folder of the curation.
        sets: addresses of the sets that are kept of, as `write_curated` opens them.

    Raises:
        DataError: as `write_curated` would, after all that comes before it.
    """
    source = source_of(sets)
    inherited = check_unclaimed(shards, Owner(source, public(root)))
    named, own = _owned(shards, root, source)
    check_replaceable(shards, named, own=own or inherited)


def source_of(sets: Sequence[str]) -> str:
    """What stands in the manifest of shards that are curated from sets at these addresses."""
    return MARK + ", ".join(map(public, sets))


def _owned(shards: str, root: Place, source: str) -> tuple[str, bool]:
    """The source that the old shards may be of, and whether this curation was writing them.

    Raises:
        DataError: no curation wrote what is there.
    """
    fs, folder = resolve_uri(shards)
    about = read_mark(fs, f"{folder}/{MANIFEST}")
    mark = read_mark(*resolve_uri(str(join(root, MADE))))
    made_here = mark.get("shards") == public(shards)
    if about:
        made_here = made_here and mark.get("digest") == about.get("digest")
    there = [
        i.base_name for i in list_files(fs, folder, recursive=False) if i.base_name[0] not in "._"
    ]
    theirs = str(about.get("source", MARK))
    if not theirs.startswith(MARK) or (
        there and not about and not unfinished(shards) and not exists(fs, f"{folder}/_key.json")
    ):
        raise DataError(
            f"{public(shards)} holds something that no curation wrote",
            "choose another curate.shards, or delete that folder first",
        )
    return theirs if made_here and about else source, made_here


def _make_ready(claim: ClaimedFolder, root: Place, source: str, key: str, step: str) -> None:
    """Takes away older shards that may be replaced; what was begun under the same key stays.

    Args:
        claim: the folder of the shards.
        root: folder of the curation.
        source: for the manifest.
        key: of the curation.
        step: key of the step that writes the shards.

    Raises:
        DataError: the folder holds files of others, or what another curation made of other sets.
    """
    mark = read_mark(*resolve_uri(str(join(root, MADE))))
    named, own = _owned(claim.uri, root, source)
    old = replaceable(claim, named, own=own)
    claim.begun = True
    begun = read_mark(claim.fs, f"{claim.folder}/_key.json").get("key") == step
    if begun and (claim.inherited or mark.get("key") != key):
        return
    empty_step(str(claim.uri), old)
