"""Other sets against the stored buckets of a curation.

find_leaks        evaluation sets against the images
look_up           one image against them, without Ray
shuffle_others    what each of these starts with; `matches.find_matches` does too
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.curate.copies import items, leaks
from pipeline.curate.copies.cells import Cells
from pipeline.curate.copies.items import ImageSet, Shuffled, Visiting
from pipeline.curate.copies.join import relative_pairs
from pipeline.curate.copies.stored_copies import Copies
from pipeline.curate.look.looks import Looking, look_at
from pipeline.curate.rows.bucketed import written
from pipeline.curate.rows.by_file import end_of, file_groups
from pipeline.curate.rows.exact import Halves
from pipeline.curate.rows.read_rows import Rows
from pipeline.curate.rows.tables import Inputs
from pipeline.curate.steps.steps import Result, Task, run_step
from pipeline.errors import DataError
from pipeline.uri import Place

HOLDING = 2  # version of what is held for leaks, in the key: another one holds anew
QUERY_ROWS = 1_000_000  # images of evaluation sets in a task that counts those with a match


def find_leaks(
    copies: Copies,
    inputs: Inputs,
    sets: Mapping[str, ImageSet],
    *,
    threshold: float,
    looking: Looking | None = None,
    gpus: float = 0.0,
) -> tuple[Result, tuple[Result, ...]]:
    """The best match of each image among the images of evaluation sets.

    A second look decides whether it is one: it looks at the best match of each image, and of each
    image of the sets.

    Args:
        copies: of the images.
        inputs: the images.
        sets: the images of each evaluation set, by name.
        threshold: similarity that a match must be above.
        looking: for the second look; None: what is alike leaks.
        gpus: of the tasks that compare.

    Returns:
        The step whose folder has `tables.LEAKS` of each input file, and all steps. The accounts of
        `copies/leaks/queries` count the images of each set that have a match (`leaked`), with a
        second look those of `looks/leaks/counted`.
    """
    steps: list[Result] = []
    placed: list[tuple[str, Shuffled]] = []
    for name, images in sorted(sets.items()):
        result, shuffled = shuffle_others(
            copies, copies.root, f"copies/leaks/sets/{name}", images, gpus
        )
        steps.append(result)
        placed.append((name, shuffled))
    names = tuple(f"{b:05d}" for b in range(copies.buckets))
    every = sum(images.inputs.rows for images in sets.values())
    shards = max(1, -(-every // QUERY_ROWS))
    hits = run_step(
        copies.root,
        "copies/leaks/hits",
        [
            copies.keys["copies/shuffle"],
            [r.key for r in steps],
            sorted(sets),
            threshold,
            copies.penalty,
            shards,
        ],
        [
            Task(name, (copies.shuffled, placed, bucket, threshold, copies.penalty, shards))
            for bucket, name in enumerate(names)
        ],
        leaks.leak_task,
        gpus=gpus,
    )
    of_queries = tuple(
        (name, tuple(account["shelves"]))
        for name, account in zip(names, hits.accounts, strict=True)
    )
    queries = run_step(
        copies.root,
        "copies/leaks/queries",
        [hits.key],
        [Task(f"{shard:05d}", (hits.folder, of_queries, shard)) for shard in range(shards)],
        leaks.queries_task,
    )
    groups = file_groups(inputs.files)
    whole = run_step(
        copies.root,
        "copies/leaks/whole",
        [hits.key, copies.keys["copies/collapse"]],
        [
            Task(name, (hits.folder, names, copies.copies, files[0].first, end_of(files), name))
            for name, files in groups
        ],
        leaks.copies_task,
    )
    last, names = whole, tuple(name for name, _ in groups)
    more: tuple[Result, ...] = ()
    if looking is not None:
        sources = [(f"rows-{name}", (whole.folder, name)) for name in names]
        sources += [
            (f"sets-{n:05d}", (queries.folder, f"{n:05d}")) for n in range(len(queries.accounts))
        ]
        looked = look_at(
            copies.root,
            "looks/leaks",
            looking,
            [whole.key, queries.key],
            sources,
            leaks.pairs_of_leaks,
        )
        by_set = tuple(t for name, _ in sources[len(names) :] for t in looked.names[name])
        last = run_step(
            copies.root,
            "looks/leaks/hold",
            [HOLDING, looked.key],
            [
                Task(
                    name,
                    (
                        name,
                        looked.folder,
                        (*looked.names[f"rows-{name}"], *by_set),
                        files[0].first,
                        end_of(files),
                    ),
                )
                for name, files in groups
            ],
            leaks.hold_task,
        )
        tables = tuple(t for name, _ in sources for t in looked.names[name])
        counted = run_step(
            copies.root,
            "looks/leaks/counted",
            [looked.key, shards],
            [
                Task(f"{shard:05d}", (looked.folder, tables, shards, shard))
                for shard in range(shards)
            ],
            leaks.count_task,
        )
        more = (*looked.steps, last, counted)
    by_file = run_step(
        copies.root,
        "leaks",
        [last.key, inputs.digest],
        [Task(name, (last.folder, names, files)) for name, files in groups],
        leaks.leaks_by_file_task,
    )
    return by_file, (*steps, hits, queries, whole, *more, by_file)


@dataclass(frozen=True)
class Match:
    """A stored image that is like the one that was looked up."""

    row: int
    image_id: str
    similarity: float


def look_up(
    copies: Copies,
    vector: Halves,
    crops: Halves | None = None,
    visiting: Visiting | None = None,
    *,
    threshold: float,
    most: int = 10,
) -> list[Match]:
    """Stored images that one image is like, the most similar first; opens the buckets of its cells.

    Rows with equal vectors are found by the one that stands for them (the smallest image id).

    Args:
        copies: of the stored images.
        vector: [d] of unit length.
        crops: [9, d] where the stored images have views.
        visiting: as of the stored images.
        threshold: similarity that a match must be above.
        most: matches returned.
    """
    stored = copies.shuffled
    _check_dim(stored, len(vector), "the image")
    rows = Rows(
        np.zeros(1, np.int64),
        np.zeros((1, 16), np.uint8),
        vector[None],
        None if crops is None else crops[None],
    )
    fitted = Cells.load(copies.cells, stored.dim)
    table, bucket, _ = items.place(rows, fitted, stored.probes, visiting)
    matches: dict[int, Match] = {}
    for number, tables in items.by_bucket(table, bucket):
        here = items.items_of(tables, stored.dim, stored.probes)
        pool = stored.read(number)
        a, _, similarity = relative_pairs(
            pool, here, threshold, np.array(stored.crops), copies.penalty
        )
        for place, value in zip(a, similarity, strict=True):
            row = int(pool.row[place])
            if row not in matches or matches[row].similarity < value:
                matches[row] = Match(row, bytes(pool.ids[place]).hex(), min(1.0, float(value)))
    return sorted(matches.values(), key=lambda match: (-match.similarity, match.image_id))[:most]


def shuffle_others(
    copies: Copies, root: Place, step: str, images: ImageSet, gpus: float
) -> tuple[Result, Shuffled]:
    """Writes the items of another set to the buckets of the cells that are there.

    Args:
        copies: whose cells.
        root: folder of the curation that the step belongs to.
        step: its name.
        images: the other set.
        gpus: of a task.
    """
    stored = copies.shuffled
    _check_dim(stored, images.vectors.dim, step)
    of, distinct = images.portions(copies.portion_rows), images.distinct()
    cells = copies.keys["copies/cells"]
    result = run_step(
        root,
        step,
        [cells, images.vectors.key, images.exact[1], stored.probes, stored.crops],
        [Task(p.name, (distinct, p, copies.cells, stored.probes, images.visiting)) for p in of],
        items.shuffle_task,
        gpus=gpus,
    )
    shuffled = Shuffled(
        result.folder, written(of, result), images.vectors.dim, stored.probes, stored.crops
    )
    return result, shuffled


def _check_dim(stored: Shuffled, dim: int, who: str) -> None:
    if dim != stored.dim:
        raise DataError(
            f"vectors of {who} have {dim} numbers, those of the curated set {stored.dim}",
            "embed both with the same curate.copy_embedder",
        )
