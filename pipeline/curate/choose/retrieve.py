"""Retrieval: rows of the pool that are like the images of seed sets (DINOv2 paper, section 3).

Large seed sets ask for the neighbours of each image, small ones for rows of the clusters that their
images are in. A row that several seeds ask for belongs to the set whose seed is most similar, of
equals to the set that is first by name; `hits` says how many asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.choose.neighbours import ASKED, ask_neighbours
from pipeline.curate.choose.seed_clusters import CLUSTER, SAMPLE, Retrieval, ask_clusters
from pipeline.curate.rows.first_of_each import id_words
from pipeline.curate.rows.read_rows import RowSet
from pipeline.curate.rows.tables import RETRIEVED, id_array, ids_of, read_table
from pipeline.curate.steps.steps import ONE_CPU, Account, Output, Resources, Step, Steps

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Asked:
    """What one set asked for: tables of `neighbours.ASKED`."""

    set: str
    part: str
    step: Step


@dataclass(frozen=True)
class Retrieved:
    """What was retrieved.

    Attributes:
        result: the step that wrote `NNNNN.parquet` (`tables.RETRIEVED`) for each input file.
        summary: of each set, by name: `mode`, `seeds`, `requested`, `found`, `unique` (different
            rows found), `collisions` (found less unique), `delivered` (rows that belong to the
            set), `quota` (its cap, by clusters) and what the mode adds; and `rows`, in all.
    """

    result: Step
    summary: dict[str, Any]


def retrieve(
    steps: Steps,
    pool: RowSet,
    seeds: dict[str, RowSet],
    settings: Retrieval,
    seed: int,
    resources: Resources = ONE_CPU,
) -> Retrieved:
    """Retrieves rows of the pool for each seed set.

    Args:
        steps: whose folder is the retrieval's own.
        pool: rows to retrieve; seeds that are inputs themselves should not be among them.
        seeds: vectors of each set, by name; of the same model as those of the pool.
        settings: what they ask for.
        seed: of the run.
        resources: of the tasks that cluster.
    """
    modes = {name: settings.mode_of(seeds[name].rows) for name in sorted(seeds)}
    counts: dict[str, dict[str, Any]] = {}
    asked: list[Asked] = []
    by_sample = [name for name in modes if modes[name] == SAMPLE]
    for number, name in enumerate(by_sample):
        own = steps.below("sample", str(number))
        count, least = settings.neighbours, settings.min_similarity
        step, counts[name] = ask_neighbours(own, pool, seeds[name], count, least)
        asked.append(Asked(name, SAMPLE, step))
    by_cluster = {name: seeds[name] for name in modes if modes[name] == CLUSTER}
    if by_cluster:
        own = steps.below("cluster")
        for name, (step, of) in ask_clusters(
            own, pool, by_cluster, settings, seed, resources
        ).items():
            counts[name] = of | {"quota": settings.cap}
            asked.append(Asked(name, CLUSTER, step))
    asked.sort(key=lambda one: one.set)
    files = dict.fromkeys(pool.names)
    result = steps.run("rows", _owner_task, files, pool=pool, asked=tuple(asked))
    for name, mode in modes.items():
        unique, delivered = (
            sum(account[what].get(name, 0) for account in result.accounts)
            for what in ("unique", "delivered")
        )
        counts[name] |= {
            "mode": mode,
            "seeds": seeds[name].rows,
            "unique": unique,
            "collisions": counts[name]["found"] - unique,
            "delivered": delivered,
        }
    summary = {"sets": counts, "rows": int(result.total("rows")), "pool": pool.rows}
    return Retrieved(result, summary)


def _owner_task(out: Output, _: None, pool: RowSet, asked: tuple[Asked, ...]) -> Account:
    """Gives each row of a file that was asked for to the seed that is most similar."""
    here = read_table(pool.source.folder, out.name, ["row"])["row"].to_numpy()
    start, end = (int(here[0]), int(here[-1])) if len(here) else (0, -1)
    within = [("row", ">=", start), ("row", "<=", end)]
    tables = [one.step.every(ASKED, within) for one in asked]
    unique = {
        one.set: len(pc.unique(table["row"])) for one, table in zip(asked, tables, strict=True)
    }
    of = np.repeat(np.arange(len(asked)), [len(table) for table in tables])
    table = pa.concat_tables([ASKED.empty_table(), *tables])
    row = np.asarray(table["row"].to_numpy(), np.int64)
    query = ids_of(table["query_id"])
    high, low = id_words(query)
    # Of each row the most similar seed first; of equals that of the first set, then of all ids.
    order = np.lexsort((low, high, of, -table["similarity"].to_numpy(), row))
    rows, first, hits = np.unique(row[order], return_index=True, return_counts=True)
    best = order[first]
    sets = [asked[i].set for i in of[best]]
    columns = [
        rows,
        pa.array([asked[i].part for i in of[best]], pa.string()),
        pa.array(sets, pa.string()),
        id_array(query[best]),
        table["similarity"].to_numpy()[best],
        table["rank"].to_numpy()[best],
        hits.astype(np.int32),
        table["cluster"].to_numpy()[best],
    ]
    out.table(pa.table(columns, schema=RETRIEVED))
    return {"unique": unique, "delivered": {one.set: sets.count(one.set) for one in asked}}
