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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.choose import first_few, lloyd
from pipeline.curate.choose.balance import waterfill
from pipeline.curate.choose.first_few import Entries, Limits
from pipeline.curate.choose.kmeans import KMeans
from pipeline.curate.choose.lloyd import assign
from pipeline.curate.choose.neighbours import ASKED, all_ids, are_in
from pipeline.curate.rows.draws_by_id import RETRIEVE, draw, numbers_as_ids
from pipeline.curate.rows.exact import Centres
from pipeline.curate.rows.first_of_each import firsts, id_words
from pipeline.curate.rows.read_rows import Points, RowSet
from pipeline.curate.rows.tables import id_array
from pipeline.curate.steps.steps import Account, Output, Resources, Step, Steps, by_number
from pipeline.storage.run_folder import fingerprint

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
    """Seeds of a set as tasks read them.

    Attributes:
        name: of the set.
        rows: its images.
        assigned: step that wrote their clusters; None where there are no clusters.
        blocks: files that a task reads at once.
    """

    name: str
    rows: RowSet
    assigned: Step | None
    blocks: tuple[tuple[str, ...], ...]

    def read(self, block: Sequence[str]) -> tuple[Points, Array]:
        """The seeds of a block, and the cluster of each."""
        points = self.rows.source.read_all(block)
        if self.assigned is None:
            return points, np.zeros(len(points.rows), np.int64)
        leaves = [self.assigned.read(name, ["leaf"])["leaf"].to_numpy() for name in block]
        return points, np.concatenate([np.zeros(0, np.int64), *leaves])


@dataclass(frozen=True)
class Drawing:
    """Rows that are drawn for each set from its clusters; what tasks read, small.

    Attributes:
        assigned: step that wrote the clusters of the pool's rows.
        sets: the seeds of each set, by name.
        clusters: how many there are.
        seed: of the run.
    """

    assigned: Step
    sets: tuple[SeedSet, ...]
    clusters: int
    seed: int


def drawn_rows(name: str, drawing: Drawing, only: int | None = None) -> Entries:
    """Rows of a file once for each set, or for one set; groups are set times clusters plus cluster.

    A set's own images are left out. Each set draws by its name, so that sets draw different rows.
    """
    table = drawing.assigned.read(name, ["row", "image_id", "leaf"])
    entries = Entries.of(table, np.zeros(len(table)))
    parts = []
    for number, one in enumerate(drawing.sets):
        if one.assigned is None or only not in (None, number) or not len(table):
            continue
        own = all_ids(one.assigned.folder, one.rows.names)
        mine = entries.take(~are_in(entries.ids, own))
        mine.keys = draw(drawing.seed, int(fingerprint(one.name)[:8], 16), mine.ids, RETRIEVE)
        mine.groups = number * drawing.clusters + mine.groups
        parts.append(mine)
    return Entries.joined(parts)


def ask_clusters(
    steps: Steps,
    pool: RowSet,
    seeds: dict[str, RowSet],
    settings: Retrieval,
    seed: int,
    resources: Resources,
) -> dict[str, tuple[Step, dict[str, Any]]]:
    """What the clusters with seeds of each set give.

    Args:
        steps: whose folder is their own.
        pool: rows to retrieve.
        seeds: of each set, by name.
        settings: what they ask for.
        seed: of the run.
        resources: of the tasks that cluster.

    Returns:
        Of each set: the step that wrote its rows (`neighbours.ASKED`, by row), and `requested`
        (rows to give after cap and water-filling), `found`, `clusters`, `clusters_of`,
        `seeds_covered` (share of the seeds that are in clusters taken from), `rows_in_clusters`
        and `purity`.
    """
    count = settings.clusters or max(1, pool.rows // CLUSTER_ROWS)
    kmeans = KMeans(count, seed, settings.iterations)
    fitted = lloyd.fit(steps.below("clusters"), pool, kmeans, resources)
    assigned, sizes = assign(steps, "assigned", pool, fitted, resources)

    # How many rows each cluster gives to each set.
    names = sorted(seeds)
    quota = np.zeros((len(names), fitted.clusters), np.int64)
    sets: list[SeedSet] = []
    facts: dict[str, dict[str, Any]] = {}
    usual: dict[str, float] = {}
    for number, name in enumerate(names):
        rows, own, members = seeds[name], None, np.zeros(0, np.int64)
        if fitted.clusters:
            own, members = assign(steps, f"seeds/{number}", rows, fitted)
        sets.append(SeedSet(name, rows, own, tuple(rows.groups(SEED_ROWS))))
        taken = members > settings.cluster_seeds
        most = np.where(taken, np.minimum(sizes, settings.cluster_images), 0)
        quota[number] = waterfill(most, settings.cap)
        usual[name] = _usual(steps, f"usual/{number}", sets[-1], members, seed)
        facts[name] = {
            "requested": int(quota[number].sum()),
            "clusters": int(taken.sum()),
            "clusters_of": fitted.clusters,
            "seeds_covered": float(members[taken].sum() / max(1, members.sum())),
            "rows_in_clusters": int(sizes[taken].sum()),
        }

    # Which rows these are, and the nearest seed of each.
    drawing = Drawing(assigned, tuple(sets), fitted.clusters, seed)
    reader = partial(drawn_rows, drawing=drawing)
    limits = first_few.limits(steps.below("chosen"), pool, quota.ravel(), reader)
    parts = by_number(pool.groups(first_few.GROUP_ROWS))
    asked = {}
    for number, name in enumerate(names):
        step = steps.run(
            f"asked/{number}",
            _evidence_task,
            parts,
            pool=pool,
            drawing=drawing,
            number=number,
            limits=limits,
            usual=usual[name],
        )
        delivered = step.total("rows")
        purity = step.total("pure") / max(1.0, delivered)
        asked[name] = step, facts[name] | {"found": int(delivered), "purity": purity}
    return asked


def _evidence_task(
    out: Output,
    files: Sequence[str],
    pool: RowSet,
    drawing: Drawing,
    number: int,
    limits: Limits,
    usual: float,
) -> Account:
    """The rows chosen for a set, with the nearest seed of their cluster."""
    upto = limits.load()
    chosen: list[tuple[Array, Array, Array]] = []
    for file in files:
        entries = drawn_rows(file, drawing, number)
        entries = entries.take(upto.chosen(entries))
        if len(entries.rows):
            points = pool.source.read(file)
            leaves = entries.groups - number * drawing.clusters
            vectors = points.vectors[np.searchsorted(points.rows, entries.rows)]
            chosen.append((entries.rows, leaves, vectors))
    if not chosen:
        out.table(ASKED.empty_table())
        return {"pure": 0}
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
    out.table(pa.table(columns, schema=ASKED))
    return {"pure": int((similarity >= usual).sum())}


def _nearest_seeds(one: SeedSet, leaves: Array, vectors: Array) -> tuple[Array, Array]:
    """Id of the nearest seed of the same cluster, of equals the smaller, and the similarity."""
    query, similarity = np.zeros((len(leaves), 16), np.uint8), np.full(len(leaves), -np.inf)
    here_of = _by_leaf(leaves)
    for block in one.blocks:
        seeds, of = one.read(block)
        for leaf, mine in _by_leaf(of).items():
            here = here_of.get(leaf)
            if here is None:
                continue
            high, low = id_words(seeds.ids[mine])
            mine = mine[np.lexsort((low, high))]  # equals go to the smaller id
            nearest, products = Centres(seeds.vectors[mine], "").nearest_one(vectors[here])
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


def _usual(steps: Steps, name: str, one: SeedSet, members: Array, seed: int) -> float:
    """The similarity that nine tenths of the seeds have to another one of their cluster."""
    compared = _compared(members, seed)
    if not len(compared):
        return 1.0
    step = steps.run(name, _usual_task, {"usual": None}, one=one, clusters=compared)
    return float(step.accounts[0]["usual"])


def _usual_task(out: Output, _: None, one: SeedSet, clusters: Array) -> Account:
    """How similar seeds are to another seed of their cluster; the account has `usual`, which all
    but a tenth are. Nothing is written.
    """
    del out
    sample, of = one.read(())
    for block in one.blocks:
        seeds, leaves = one.read(block)
        mine = np.isin(leaves, clusters)
        both = (Points(*(part[mine] for part in seeds)), sample)
        sample = Points(*(np.concatenate(parts) for parts in zip(*both, strict=True)))
        of = np.concatenate([np.searchsorted(clusters, leaves[mine]), of])
        quota = np.full(len(clusters), COMPARED)
        # With equal keys the ids decide, so the sample is the same for any blocks.
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
