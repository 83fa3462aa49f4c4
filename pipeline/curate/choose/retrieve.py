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

from pipeline.curate.choose.lloyd import ONE_CPU, Cost, Resources
from pipeline.curate.choose.neighbours import ASKED, ask_neighbours
from pipeline.curate.choose.seed_clusters import CLUSTER, SAMPLE, Retrieval, ask_clusters
from pipeline.curate.rows.draws_by_id import id_words
from pipeline.curate.rows.read_rows import RowSet, Source
from pipeline.curate.rows.tables import RETRIEVED, id_array, ids_of, read_table, write_table
from pipeline.curate.steps.steps import Account, Result, Task, run_step
from pipeline.uri import Place

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Asked:
    """What one set asked for: files of `neighbours.ASKED`."""

    set: str
    part: str
    folder: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Retrieved:
    """What was retrieved.

    Attributes:
        result: the step that wrote `NNNNN.parquet` (`tables.RETRIEVED`) for each input file.
        summary: of each set, by name: `mode`, `seeds`, `requested`, `found`, `unique` (different
            rows found), `collisions` (found less unique), `delivered` (rows that belong to the
            set), `quota` (its cap, by clusters) and what the mode adds; and `rows`, in all.
        cost: of all that it took.
    """

    result: Result
    summary: dict[str, Any]
    cost: Cost


def retrieve(
    root: Place,
    name: str,
    pool: RowSet,
    seeds: dict[str, RowSet],
    settings: Retrieval,
    seed: int,
    resources: Resources = ONE_CPU,
) -> Retrieved:
    """Retrieves rows of the pool for each seed set.

    Args:
        root: folder of the curation.
        name: of the step.
        pool: rows to retrieve; seeds that are inputs themselves should not be among them.
        seeds: vectors of each set, by name; of the same model as those of the pool.
        settings: what they ask for.
        seed: of the run.
        resources: of the tasks that cluster.
    """
    cost = Cost()
    told: dict[str, dict[str, Any]] = {}
    asked: list[Asked] = []
    keys: list[Any] = [pool.key]
    modes = {one: settings.mode_of(seeds[one].rows) for one in sorted(seeds)}
    for number, one in enumerate(one for one in modes if modes[one] == SAMPLE):
        least = settings.min_similarity
        folder, files, key, counts = ask_neighbours(
            root, f"{name}/sample/{number}", pool, seeds[one], settings.neighbours, least, cost
        )
        asked.append(Asked(one, SAMPLE, folder, tuple(files)))
        keys.append([one, key])
        told[one] = dict(counts)
    by_cluster = {one: seeds[one] for one in modes if modes[one] == CLUSTER}
    if by_cluster:
        places, key, counts_of = ask_clusters(
            root, f"{name}/cluster", pool, by_cluster, settings, seed, resources, cost
        )
        keys.append(key)
        for one, (folder, files) in places.items():
            asked.append(Asked(one, CLUSTER, folder, tuple(files)))
            told[one] = counts_of[one] | {"quota": settings.cap}
    asked.sort(key=lambda a: a.set)
    tasks = [Task(file, (file, pool.source, tuple(asked))) for file in pool.names]
    result = run_step(root, f"{name}/rows", keys, tasks, _owner_task)
    cost.add(result)
    for one, mode in modes.items():
        counts = told[one]
        unique = sum(account["unique"].get(one, 0) for account in result.accounts)
        told[one] = counts | {
            "mode": mode,
            "seeds": seeds[one].rows,
            "unique": unique,
            "collisions": counts["found"] - unique,
            "delivered": sum(a["delivered"].get(one, 0) for a in result.accounts),
        }
    summary = {"sets": told, "rows": int(result.total("rows")), "pool": pool.rows}
    return Retrieved(result, summary, cost)


def _owner_task(folder: str, name: str, source: Source, asked: tuple[Asked, ...]) -> Account:
    """Gives each row of a file that was asked for to the seed that is most similar."""
    rows = np.asarray(read_table(source.folder, name, ["row"])["row"].to_numpy(), np.int64)
    start, end = (int(rows[0]), int(rows[-1])) if len(rows) else (0, -1)
    within = [("row", ">=", start), ("row", "<=", end)]
    tables: list[pa.Table] = []
    number: list[Array] = []
    unique: dict[str, int] = {}
    for at, one in enumerate(asked):
        parts = [read_table(one.folder, file, filters=within) for file in one.names]
        table = pa.concat_tables(parts) if parts else ASKED.empty_table()
        tables.append(table)
        number.append(np.full(len(table), at))
        unique[one.set] = len(np.unique(table["row"].to_numpy()))
    table = pa.concat_tables(tables) if tables else ASKED.empty_table()
    of = np.concatenate(number) if number else np.zeros(0, np.int64)
    row = np.asarray(table["row"].to_numpy(), np.int64)
    query = ids_of(table["query_id"])
    high, low = id_words(query)
    order = np.lexsort((low, high, of, -table["similarity"].to_numpy(), row))
    kept, first, hits = np.unique(row[order], return_index=True, return_counts=True)
    best = order[first]
    sets = [asked[i].set for i in of[best]]
    columns = [
        kept,
        pa.array([asked[i].part for i in of[best]], pa.string()),
        pa.array(sets, pa.string()),
        id_array(query[best]),
        table["similarity"].to_numpy()[best],
        table["rank"].to_numpy()[best],
        hits.astype(np.int32),
        table["cluster"].to_numpy()[best],
    ]
    written = write_table(pa.table(columns, schema=RETRIEVED), folder, name)
    delivered = {one.set: sets.count(one.set) for one in asked}
    return {"rows": len(kept), "bytes": written, "unique": unique, "delivered": delivered}
