"""Images that are like an image of an evaluation set, which must not be trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.cell_items import ImageSet, StoredItems
from pipeline.curate.copies.equal_vectors import EQUAL
from pipeline.curate.copies.join import PAIRS_BETWEEN, pairs_between
from pipeline.curate.copies.other_sets import place_others
from pipeline.curate.copies.pairs import Index
from pipeline.curate.look.look_at_pairs import VERDICTS, Looking, look_at, pairs_with_others
from pipeline.curate.rows.first_of_each import best, id_words
from pipeline.curate.rows.read_rows import file_groups
from pipeline.curate.rows.tables import ID, LEAKS, ROW, InputFile, Inputs, ids_of
from pipeline.curate.steps.steps import Account, Output, Resources, Step, Steps, by_file, numbered

QUERY_ROWS = 1_000_000  # images of evaluation sets in a task that counts those with a match
# Best match of each image of a set in the pool.
QUERIES = pa.schema(
    [
        ("set", pa.string()),
        ("query_id", ID),
        ("row", ROW),
        ("image_id", ID),
        ("similarity", pa.float64()),
    ]
)


def find_leaks(
    steps: Steps,
    index: Index,
    inputs: Inputs,
    sets: Mapping[str, ImageSet],
    threshold: float,
    looking: Looking | None = None,
    gpus: float = 0.0,
) -> tuple[Step, dict[str, int]]:
    """The best match of each image among the images of evaluation sets.

    A second look decides whether it is one: it looks at the best match of each image, and of each
    image of the sets.

    Args:
        steps: of the curation.
        index: of the images.
        inputs: the images.
        sets: the images of each evaluation set, by name.
        threshold: similarity that a match must be above.
        looking: for the second look; None: what is alike leaks.
        gpus: of the tasks that compare.

    Returns:
        The step with `tables.LEAKS` of each input file; and how many images of each set have a
        match, where any has.
    """
    others = {
        name: place_others(steps, f"copies/leaks/sets/{name}", index, images, gpus)
        for name, images in sorted(sets.items())
    }
    # A row leaks by one image only, though several may be like it. So the images of the sets are
    # counted by themselves, each in the shard of its id.
    shards = max(1, -(-sum(images.inputs.rows for images in sets.values()) // QUERY_ROWS))
    hits = steps.run("copies/leaks/hits", match_bucket, numbered(index.buckets),
                     Resources(1.0, gpus), index=index, others=others, threshold=threshold,
                     shards=shards)  # fmt: skip
    counted = queries = steps.run(
        "copies/leaks/queries", merge_queries, numbered(shards), hits=hits
    )
    files = file_groups(inputs.files)
    matches = steps.run("copies/leaks/whole", with_equals, files, hits=hits, equal=index.equal)
    if looking:
        sources = {f"rows-{name}": (matches, name) for name in matches.tables}
        sources |= {f"sets-{name}": (queries, name) for name in queries.tables}
        looked = look_at(steps, "looks/leaks", looking, sources, pairs_of_leaks)
        of_sets = [t for name in queries.tables for t in looked.names[f"sets-{name}"]]
        # A pair of a row may have been looked at for an image of a set: rows need those too.
        items = {
            name: (group, (*looked.names[f"rows-{name}"], *of_sets))
            for name, group in files.items()
        }
        matches = steps.run("looks/leaks/hold", leaks_that_hold, items, looked=looked.step)
        counted = steps.run("looks/leaks/counted", count_leaked, numbered(shards),
                            looked=looked.step, shards=shards)  # fmt: skip
    leaked: dict[str, int] = {}
    for account in counted.accounts:
        for name, count in account["leaked"].items():
            leaked[name] = leaked.get(name, 0) + count
    return steps.run("leaks", by_file, files, of=matches, schema=LEAKS), leaked


def match_bucket(
    out: Output,
    bucket: int,
    index: Index,
    others: Mapping[str, StoredItems],
    threshold: float,
    shards: int,
) -> None:
    """Task: the best match of each pool row of a bucket (`rows`), and of each image of the sets, in
    shards by their ids (`queries`).
    """
    here = {name: items for name, one in others.items() if len(items := one.read(bucket))}
    pool, crops = index.items.read(bucket) if here else None, np.array(index.items.crops)
    tables = [PAIRS_BETWEEN.append(pa.field("set", pa.string())).empty_table()]
    for name, items in here.items():
        assert pool is not None
        pairs = pairs_between(pool, items, threshold, crops, index.penalty)
        tables.append(pairs.append_column("set", pa.array([name] * len(pairs), pa.string())))
    every = pa.concat_tables(tables)
    hits = every.select(["row", "set", "other_id", "similarity"]).rename_columns(LEAKS.names)
    out.table(best(hits, "row").cast(LEAKS), sub="rows")
    queries = every.select(["set", "other_id", "row", "image_id", "similarity"])
    queries = best_of_queries(queries.rename_columns(QUERIES.names))
    out.buckets(queries, query_shard(ids_of(queries["query_id"]), shards), sub="queries")


def best_of_queries(table: pa.Table) -> pa.Table:
    """The best pool image of each image of a set, as `QUERIES`; of equals the smaller image id."""
    columns = ["set", "query_id", "image_id", "row", "similarity"]
    return best(table.select(columns), "set", "query_id").select(QUERIES.names).cast(QUERIES)


def query_shard(ids: Any, shards: int) -> Any:
    """The shard of each image of an evaluation set."""
    return (id_words(ids)[1] % np.uint64(shards)).astype(np.int64)


def merge_queries(out: Output, shard: int, hits: Step) -> Account:
    """Task: the images of a shard of all sets that have a match; counts them by set."""
    queries = best_of_queries(hits.bucket(shard, QUERIES, sub="queries"))
    out.table(queries)
    counts = queries.group_by("set").aggregate([("row", "count")]).sort_by("set")
    return {"leaked": dict(zip(*(c.to_pylist() for c in counts.columns), strict=True))}


def with_equals(out: Output, files: Sequence[InputFile], hits: Step, equal: Step) -> None:
    """Task: hits of the rows of some files, the best one of each, and of all rows that they stand
    for.
    """
    first, end = files[0].first, files[-1].end
    own = best(hits.rows(first, end, LEAKS, sub="rows"), "row")
    stood_for = equal.every(EQUAL, [("stands", ">=", first), ("stands", "<", end)])
    pairs = stood_for.select(["row", "stands"]).rename_columns(["copy", "row"])
    more = pairs.join(own, "row", join_type="inner").drop_columns(["row"])
    more = more.rename_columns(["row" if n == "copy" else n for n in more.column_names])
    out.table(pa.concat_tables([own, more.select(LEAKS.names).cast(LEAKS)]).sort_by("row"))


def pairs_of_leaks(source: tuple[Step, str]) -> pa.Table:
    """Rows with images of evaluation sets, as pairs to look at."""
    step, name = source
    table = step.read(name, LEAKS.names)
    return pairs_with_others(table["row"], table["similarity"], table["set"], table["query_id"])


def leaks_that_hold(
    out: Output, item: tuple[Sequence[InputFile], Sequence[str]], looked: Step
) -> None:
    """Task: the best match of each row of some files that shows the same, as `tables.LEAKS`.

    The item has the files, and names of the tables of verdicts that may be about their rows.
    """
    files, names = item
    rows = [("row", ">=", files[0].first), ("row", "<", files[-1].end)]
    same = looked.every(VERDICTS, [("same", "=", True), *rows], only=names)
    table = same.select(["row", "set", "other_id", "similarity"]).rename_columns(LEAKS.names)
    out.table(best(table.cast(LEAKS), "row"))


def count_leaked(out: Output, shard: int, looked: Step, shards: int) -> Account:
    """Task: counts the images of each set, of those of a shard, that some row shows the same as."""
    leaked: dict[str, set[bytes]] = {}
    for name in looked.tables:
        table = looked.read(name, ["set", "other_id"], [("same", "=", True)])
        ids = ids_of(table["other_id"])
        mine = query_shard(ids, shards) == shard
        sets = table["set"].filter(pa.array(mine)).to_pylist()
        for one, image in zip(sets, ids[mine], strict=True):
            leaked.setdefault(one, set()).add(image.tobytes())
    counts = {one: len(images) for one, images in sorted(leaked.items())}
    return {"rows": sum(counts.values()), "leaked": counts}


# ---- Groups of copies with an image that leaks, where leaks take their groups with them.


# of each group with a row that leaks: its best match
LEAKING = pa.schema(
    [
        ("component", ID),
        ("set", pa.string()),
        ("query_id", ID),
        ("similarity", pa.float64()),
        ("row_id", ID),  # image of the group that matches
    ]
)


def leaking_groups(steps: Steps, inputs: Inputs, prints: Step, leaks: Step, groups: Step) -> Step:
    """The best match of each group of copies of which a row leaks: one table, `leaking`."""
    of_files = steps.run("leaking/files", groups_that_leak, inputs.by_name, prints=prints,
                         leaks=leaks, groups=groups)  # fmt: skip
    return steps.run("leaking/best", best_of_groups, {"leaking": None}, of_files=of_files)


def groups_that_leak(out: Output, file: InputFile, prints: Step, leaks: Step, groups: Step) -> None:
    """Task: the best match of each group that has rows of this file that leak."""
    table = leaks.read(file.name)
    members = groups.read(file.name, ["row", "component"])
    if not len(members):
        out.table(LEAKING.empty_table())
        return
    ids = prints.read(file.name, ["row", "image_id"])["image_id"]
    places = table["row"].to_numpy() - file.first
    table = table.append_column("row_id", ids.take(pa.array(places)))
    joined = table.join(members, "row", join_type="inner")
    out.table(best(joined.select(LEAKING.names).cast(LEAKING), "component"))


def best_of_groups(out: Output, item: None, of_files: Step) -> None:
    """Task: one row for each group."""
    out.table(best(of_files.every(LEAKING), "component"))
