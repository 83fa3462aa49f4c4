"""New images that are like an image that an earlier curation kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.copies.cell_items import ImageSet, StoredItems
from pipeline.curate.copies.join import pairs_between
from pipeline.curate.copies.other_sets import place_others
from pipeline.curate.copies.pairs import Index
from pipeline.curate.look.look_at_pairs import Looking, look_at, pairs_with_others, verdicts_of
from pipeline.curate.rows.exact import Ints
from pipeline.curate.rows.first_of_each import best, in_order
from pipeline.curate.rows.read_rows import file_groups
from pipeline.curate.rows.tables import ID, ROW, InputFile, id_array, ids_of
from pipeline.curate.steps.steps import Account, Output, Resources, Step, Steps, numbered
from pipeline.errors import DataError
from pipeline.uri import public

EARLIER = "earlier"  # name of the earlier images where pairs are looked at
Array = np.ndarray[Any, Any]
# Rows that were not kept, with an image that was and has the same vector.
INSTEAD = pa.schema([("row", ROW), ("image_id", ID)])
# Best match of each new row among the images of an earlier set.
MATCHES = pa.schema([("row", ROW), ("image_id", ID), ("similarity", pa.float64())])


def find_matches(
    steps: Steps,
    earlier: Index,
    images: ImageSet,
    decisions: Step,
    threshold: float,
    looking: Looking | None = None,
    gpus: float = 0.0,
) -> Step:
    """The best match of each new image among the kept images of an earlier curation.

    Args:
        steps: of the new curation.
        earlier: the index of the earlier one.
        images: the new ones; their vectors are made as the earlier ones.
        decisions: of the earlier one: tables with `row` and `kept`.
        threshold: similarity that a match must be above.
        looking: for the second look, with the earlier images as the set `EARLIER`; None: what is
            alike is a match.
        gpus: of the tasks that compare.

    Returns:
        The step with `MATCHES` of each new input file.
    """
    kept = steps.run("matching/kept", mark_kept, {"kept": earlier.rows}, decisions=decisions,
                     equal=earlier.equal)  # fmt: skip
    new = place_others(steps, "matching/shuffle", earlier, images, gpus)
    matched = steps.run("matching/buckets", match_bucket, numbered(earlier.buckets),
                        Resources(1.0, gpus), earlier=earlier, kept=kept, new=new,
                        threshold=threshold)  # fmt: skip
    files = file_groups(images.inputs.files)
    if looking is None:
        return steps.run("matches", best_by_file, files, of=matched)
    nearest = steps.run("matching/best", best_by_file, files, of=matched)
    looked = look_at(steps, "matching/looks", looking, images.inputs.by_name, pairs_of_matches,
                     nearest=nearest)  # fmt: skip
    return steps.run("matches", matches_that_hold, looked.names, looked=looked.step)


def mark_kept(out: Output, rows: int, decisions: Step, equal: Step) -> Account:
    """Task: a bit for each of the `rows` of an earlier curation, whether it, or a row that it
    stands for, was kept; and of rows that were not kept themselves the kept image that they
    stand for.

    Raises:
        DataError: there is not a decision of each row.
    """
    kept, decided = np.zeros(rows, bool), 0
    for name in decisions.tables:
        table = decisions.read(name, ["row", "kept"])
        decided += len(table)
        kept[table["row"].to_numpy()] = table["kept"].to_numpy(zero_copy_only=False)
    if decided != rows:  # images without a decision would count as not kept, and let copies in
        raise DataError(
            f"{public(decisions.folder)} has decisions of {decided:,} images, and its curation "
            f"compared {rows:,}",
            "delete its curate/_done.json and curate it again",
        )
    count = int(kept.sum())
    instead = [INSTEAD.empty_table()]
    for name in equal.tables:
        table = equal.read(name, ["row", "image_id", "stands"])
        row, stands = table["row"].to_numpy(), table["stands"].to_numpy()
        mine = np.flatnonzero(kept[row] & ~kept[stands])
        ids, stands = ids_of(table["image_id"])[mine], stands[mine]
        by_id = in_order(ids, row[mine])
        chosen = by_id[np.unique(stands[by_id], return_index=True)[1]]
        instead.append(pa.table([stands[chosen], id_array(ids[chosen])], schema=INSTEAD))
    others = pa.concat_tables(instead).sort_by("row")
    kept[others["row"].to_numpy()] = True
    out.table(pa.table({"bits": np.packbits(kept)}))
    out.table(others, "instead")
    return {"rows": count}


def match_bucket(
    out: Output, bucket: int, earlier: Index, kept: Step, new: StoredItems, threshold: float
) -> None:
    """Task: the best match of each new row of a bucket among the kept rows of an earlier set."""
    fresh = new.read(bucket)
    if not len(fresh):
        out.table(MATCHES.empty_table())
        return
    bits = kept.read("kept")["bits"].to_numpy()

    def is_kept(row: Ints) -> Array:
        return np.asarray((bits[row >> 3] >> (7 - (row & 7)).astype(np.uint8)) & 1 == 1)

    members, crops = earlier.items.read(bucket, is_kept), np.array(earlier.items.crops)
    pairs = pairs_between(members, fresh, threshold, crops, earlier.penalty)
    instead = kept.read("instead")
    at = pc.index_in(pairs["row"].combine_chunks(), instead["row"].combine_chunks())
    ids = pc.coalesce(instead["image_id"].take(at), pairs["image_id"])
    table = pa.table([pairs["other"], ids, pairs["similarity"]], schema=MATCHES)
    out.table(best(table, "row"))


def best_by_file(out: Output, files: Sequence[InputFile], of: Step) -> None:
    """Task: the best match of each row of each of these input files that has one."""
    out.by_file(best(of.rows(files[0].first, files[-1].end, MATCHES), "row"), files)


def pairs_of_matches(file: InputFile, nearest: Step) -> pa.Table:
    """New rows with earlier images, as pairs to look at."""
    table = nearest.read(file.name)
    sets = pa.array([EARLIER] * len(table), pa.string())
    return pairs_with_others(table["row"], table["similarity"], sets, table["image_id"])


def matches_that_hold(out: Output, names: Sequence[str], looked: Step) -> None:
    """Task: the matches of a file that show the same."""
    table = verdicts_of(looked, names).select(["row", "other_id", "similarity"])
    out.table(table.rename_columns(MATCHES.names).cast(MATCHES).sort_by("row"))
