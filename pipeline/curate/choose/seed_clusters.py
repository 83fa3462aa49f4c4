"""Cluster-based retrieval: rows of the pool's clusters that hold seed images (DINOv2, section 3).

The pool is clustered by k-means and the seeds are assigned to its clusters. A cluster with more
than `cluster_seeds` seeds of a set gives the set up to `cluster_images` of its rows, drawn by hash:
the nearest would be the seeds' near copies and would narrow what a cluster shows. A cap for the set
is shared out among its clusters by water-filling. Each row names the nearest seed of its cluster.

How right this is, is bounded by how pure the clusters are. `purity` says it without labels: the
share of the retrieved rows that are as similar to their seed as nine tenths of the seeds are to
another seed of their cluster. More clusters make it higher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.choose import first_few, lloyd
from pipeline.curate.choose.assign import assign
from pipeline.curate.choose.balance import waterfill
from pipeline.curate.choose.first_few import Entries, Limits
from pipeline.curate.choose.kmeans import Centroids
from pipeline.curate.choose.lloyd import Cost, Fitted, Resources
from pipeline.curate.choose.neighbours import ASKED, IdSet
from pipeline.curate.rows.draws_by_id import RETRIEVE, draw, firsts, id_words, numbers_as_ids
from pipeline.curate.rows.read_rows import Points, RowSet, Source
from pipeline.curate.rows.tables import id_array, ids_of, read_table, write_table
from pipeline.curate.steps.steps import Account, Task, run_step
from pipeline.storage.run_folder import fingerprint
from pipeline.uri import Place

Array = np.ndarray[Any, Any]

CLUSTER_ROWS = 1000  # of the pool, in the mean; the paper's 100,000 clusters had 7,440
LIKE_SEEDS = 0.1  # share of seeds that are less like another seed than a pure row may be
COMPARED = 1024  # seeds of a cluster that are compared with each other
COMPARED_SEEDS = 2**16  # in all
SEED_ROWS = 2**16  # that a task holds at once


SAMPLE, CLUSTER = "sample", "cluster"  # modes of retrieval


@dataclass(frozen=True)
class Retrieval:
    """What seeds ask for; the fields of `retrieve` in the config.

    Attributes:
        mode: sample, cluster, or auto: sample above `sample_above` seeds.
        sample_above: seed images of a set.
        neighbours: of each seed.
        min_similarity: of a neighbour, at least.
        clusters: of the pool; none: a thousandth of its rows.
        cluster_seeds: a cluster with more seeds than this is taken from.
        cluster_images: rows of such a cluster, at most.
        cap: rows of a set by clusters, at most.
        iterations: of k-means.
    """

    mode: str = "auto"
    sample_above: int = 1_000_000
    neighbours: int = 4
    min_similarity: float = 0.0
    clusters: int | None = None
    cluster_seeds: int = 3
    cluster_images: int = 10_000
    cap: int = 1_000_000
    iterations: int = 10

    def mode_of(self, seeds: int) -> str:
        """The mode of a set with so many seed images."""
        if self.mode != "auto":
            return self.mode
        return SAMPLE if seeds > self.sample_above else CLUSTER


@dataclass(frozen=True)
class SeedSet:
    """Seeds of a set as tasks read them."""

    source: Source
    names: tuple[str, ...]
    assigned: str  # folder of their clusters
    blocks: tuple[tuple[str, ...], ...]  # of the names, that a task reads at once

    def clusters(self, block: tuple[str, ...]) -> Array:
        """Of each seed, in the order of `read`."""
        leaves = [read_table(self.assigned, n, ["leaf"])["leaf"].to_numpy() for n in block]
        return np.asarray(np.concatenate(leaves), np.int64)

    def read(self, block: tuple[str, ...]) -> Points:
        """The seeds of a block."""
        return self.source.read_all(block)


@dataclass(frozen=True)
class Drawing:
    """Rows that are drawn for each set from its clusters; what tasks read, small.

    Attributes:
        assigned: folder of the clusters of the pool's rows.
        sets: the seeds of each set.
        names: of the sets.
        clusters: how many there are.
        seed: of the run.
    """

    assigned: str
    sets: tuple[SeedSet, ...]
    names: list[str]
    clusters: int
    seed: int

    def entries(self, name: str, only: int | None = None) -> Entries:
        """Rows of a file once for each set, or for one set; groups are set times clusters plus
        cluster.

        A set's own images are left out. Each set draws by its name, so that sets draw different
        rows.
        """
        table = read_table(self.assigned, name, ["row", "image_id", "leaf"])
        rows, ids = np.asarray(table["row"].to_numpy(), np.int64), ids_of(table["image_id"])
        leaves = np.asarray(table["leaf"].to_numpy(), np.int64)
        parts = []
        for number, one in enumerate(self.sets):
            if (only is not None and number != only) or not len(rows):
                continue
            other = ~IdSet.read(one.assigned, one.names).contain(ids)
            what = int(fingerprint(self.names[number])[:8], 16)
            keys = draw(self.seed, what, ids[other], RETRIEVE)
            groups = number * self.clusters + leaves[other]
            parts.append(Entries(groups, keys, ids[other], rows[other]))
        return Entries.joined(parts)


def ask_clusters(
    root: Place,
    name: str,
    pool: RowSet,
    seeds: dict[str, RowSet],
    settings: Retrieval,
    seed: int,
    resources: Resources,
    cost: Cost,
) -> tuple[dict[str, tuple[str, list[str]]], str, dict[str, dict[str, Any]]]:
    """What the clusters with seeds of each set give.

    Args:
        root: folder of the curation.
        name: of the step.
        pool: rows to retrieve.
        seeds: of each set, by name.
        settings: what they ask for.
        seed: of the run.
        resources: of the tasks that cluster.
        cost: is added to.

    Returns:
        Of each set: folder and names of files (`neighbours.ASKED`, by row); a key; and of each set:
        `requested` (rows to give after cap and water-filling), `clusters`, `clusters_of`,
        `seeds_covered` (share of the seeds that are in clusters taken from), `rows_in_clusters`.
    """
    count = settings.clusters or max(1, pool.rows // CLUSTER_ROWS)
    fitted = lloyd.fit(root, f"{name}/clusters", pool, count, seed, settings.iterations, resources)
    cost.add(fitted.cost)
    result, sizes = assign(root, f"{name}/assigned", pool, fitted, resources)
    cost.add(result)
    names = sorted(seeds)
    quota = np.zeros((len(names), fitted.clusters), np.int64)
    sets, told, usual = [], {}, {}
    for number, one in enumerate(names):
        mine = seeds[one]
        leaves, counts = _assign_seeds(root, f"{name}/seeds/{number}", mine, fitted, cost)
        taken = counts > settings.cluster_seeds
        most = np.where(taken, np.minimum(sizes, settings.cluster_images), 0)
        quota[number] = waterfill(most, settings.cap)
        sets.append(SeedSet(mine.source, mine.names, leaves, tuple(mine.groups(SEED_ROWS))))
        compared = _compared(counts, seed)
        if len(compared):
            task = Task("usual", (sets[-1], compared))
            key = [result.key, mine.key, seed]
            step = run_step(root, f"{name}/usual/{number}", key, [task], _usual_task)
            cost.add(step)
            usual[one] = step.accounts[0]["usual"]
        told[one] = {
            "requested": int(quota[number].sum()),
            "clusters": int(taken.sum()),
            "clusters_of": fitted.clusters,
            "seeds_covered": float(counts[taken].sum() / max(1, counts.sum())),
            "rows_in_clusters": int(sizes[taken].sum()),
        }
    key = [result.key, [seeds[one].key for one in names], names, seed, fingerprint(quota.tolist())]
    drawing = Drawing(result.folder, tuple(sets), names, fitted.clusters, seed)
    limits = first_few.limits(
        root, f"{name}/chosen", pool, quota.ravel(), drawing.entries, key, cost
    )
    groups = pool.groups(first_few.GROUP_ROWS)
    asked = {}
    for number, one in enumerate(names):
        like = usual.get(one, 1.0)
        tasks = [
            Task(f"{g:05d}", (f"{g:05d}", pool.source, group, drawing, number, limits, like))
            for g, group in enumerate(groups)
        ]
        step = run_step(root, f"{name}/asked/{number}", [limits.key, one], tasks, _evidence_task)
        cost.add(step)
        asked[one] = (step.folder, [task.name for task in tasks])
        delivered = step.total("rows")
        told[one] |= {"found": int(delivered), "purity": step.total("pure") / max(1.0, delivered)}
    return asked, fingerprint(key), told


def _assign_seeds(
    root: Place, name: str, seeds: RowSet, fitted: Fitted, cost: Cost
) -> tuple[str, Array]:
    if not fitted.clusters:
        return "", np.zeros(0, np.int64)
    result, counts = assign(root, name, seeds, fitted)
    cost.add(result)
    return result.folder, counts


def _evidence_task(
    folder: str,
    name: str,
    source: Source,
    files: tuple[str, ...],
    drawing: Drawing,
    number: int,
    limits: Limits,
    usual: float,
) -> Account:
    """The rows chosen for a set, with the nearest seed of their cluster."""
    upto = limits.load()
    chosen: list[tuple[Array, Array, Array]] = []
    for file in files:
        entries = drawing.entries(file, number)
        entries = entries.take(upto.chosen(entries))
        if not len(entries.rows):
            continue
        points = source.read(file)
        at = np.searchsorted(points.rows, entries.rows)
        chosen.append(
            (entries.rows, entries.groups - number * drawing.clusters, points.vectors[at])
        )
    if not chosen:
        table = ASKED.empty_table()
        return {"rows": 0, "bytes": write_table(table, folder, name), "pure": 0}
    rows, leaves, vectors = (np.concatenate(parts) for parts in zip(*chosen, strict=True))
    query, similarity = _nearest_seeds(drawing.sets[number], leaves, vectors)
    order = np.argsort(rows, kind="stable")
    columns = [
        rows[order],
        id_array(query[order]),
        similarity[order],
        np.full(len(rows), -1, np.int32),
        leaves[order],
    ]
    written = write_table(pa.table(columns, schema=ASKED), folder, name)
    return {"rows": len(rows), "bytes": written, "pure": int((similarity >= usual).sum())}


def _nearest_seeds(one: SeedSet, leaves: Array, vectors: Array) -> tuple[Array, Array]:
    """Id of the nearest seed of the same cluster, of equals the smaller, and the similarity."""
    query, similarity = np.zeros((len(leaves), 16), np.uint8), np.full(len(leaves), -np.inf)
    here_of = _by_leaf(leaves)
    for block in one.blocks:
        seeds, of = one.read(block), one.clusters(block)
        for leaf, mine in _by_leaf(of).items():
            here = here_of.get(leaf)
            if here is None:
                continue
            high, low = id_words(seeds.ids[mine])
            mine = mine[np.lexsort((low, high))]  # equals go to the smaller id
            nearest, products = Centroids(seeds.vectors[mine]).nearest(vectors[here])
            ids = seeds.ids[mine[nearest]]
            (high, low), (first, second) = id_words(ids), id_words(query[here])
            smaller = (high < first) | ((high == first) & (low < second))
            equal = products == similarity[here]
            better = (products > similarity[here]) | (equal & smaller)
            query[here[better]], similarity[here[better]] = ids[better], products[better]
    return query, similarity


def _by_leaf(leaves: Array) -> dict[int, Array]:
    """The places of each leaf."""
    order = np.argsort(leaves, kind="stable")
    numbers, starts = np.unique(leaves[order], return_index=True)
    return dict(zip(numbers.tolist(), np.split(order, starts[1:]), strict=True))


def _compared(counts: Array, seed: int) -> Array:
    """Clusters whose seeds are compared with each other: some by hash, where all are too many."""
    able = np.flatnonzero(counts > 1)
    if not len(able):
        return able
    drawn = draw(seed, 0, numbers_as_ids(len(counts))[able], RETRIEVE)
    able = able[np.argsort(drawn, kind="stable")]
    upto = np.cumsum(np.minimum(counts[able], COMPARED))
    chosen: Array = np.sort(able[upto <= max(COMPARED_SEEDS, upto[0])])
    return chosen


def _usual_task(folder: str, one: SeedSet, clusters: Array) -> Account:
    """How similar seeds are to another seed of their cluster; the account has `usual`, which all
    but a tenth are. Nothing is written.
    """
    sample = one.read(())
    of = np.zeros(0, np.int64)
    for block in one.blocks:
        seeds, leaves = one.read(block), one.clusters(block)
        mine = np.isin(leaves, clusters)
        both = (Points(*(part[mine] for part in seeds)), sample)
        sample = Points(*(np.concatenate(parts) for parts in zip(*both, strict=True)))
        of = np.concatenate([np.searchsorted(clusters, leaves[mine]), of])
        quota = np.full(len(clusters), COMPARED)
        kept = firsts(of, np.zeros(len(of)), sample.ids, sample.rows, quota)
        sample, of = Points(*(part[kept] for part in sample)), of[kept]
    between: list[Array] = []
    for mine in _by_leaf(of).values():
        wide = sample.vectors[mine].astype(np.float64)
        products = wide @ wide.T
        np.fill_diagonal(products, -np.inf)
        between.append(products.max(1))
    usual = float(np.quantile(np.concatenate(between), LIKE_SEEDS)) if between else 1.0
    return {"rows": len(of), "usual": usual}
