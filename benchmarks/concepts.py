"""Balanced samples and retrieval on planted concepts: how many concepts, how right, how many twice.

    python benchmarks/concepts.py

60,000 vectors of 500 concepts whose sizes follow Zipf's law (exponent 1.2), each with 8 kinds. A
tenth is sampled: at random; from 1,000 clusters of flat k-means with D² seeding; and from the
levels of `hierarchy.default_levels`, without resampling, and with it without and with the floor.
`concepts` is the effective number (exponential of the entropy), `top 10` the share of the ten most
frequent, `missing` concepts of the pool with no row, `leaves` clusters with no row. CPU seconds are
those of the tasks.

Retrieval: 4 seeds of each of 20 rare concepts; the seeds are not in the pool. Precision and recall
are of different rows. Last, the boundary of "more than 3 seeds", and a cap.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa

from pipeline.curate.choose import balance, hierarchy, retrieve, seed_clusters
from pipeline.curate.choose.balance import effective
from pipeline.curate.rows.exact import unit_half
from pipeline.curate.rows.read_rows import RowSet
from pipeline.curate.rows.tables import (
    Vectors,
    id_array,
    list_array,
    read_table,
    vector_schema,
    write_table,
)
from pipeline.curate.steps.steps import Steps
from pipeline.driver.cluster import quiet_environment

DIM, KINDS, FILES = 128, 8, 4
ITERATIONS, RESAMPLING = 10, 3
Array = np.ndarray[Any, Any]


def plant(rows: int, concepts: int, seed: int) -> tuple[Array, Array]:
    """Vectors [rows, 128] in half precision and the concept of each, int64 [rows]."""
    rng = np.random.default_rng(seed)

    def directions(count: int) -> Array:
        found = rng.standard_normal((count, DIM))
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    chance = np.arange(1, concepts + 1) ** -1.2
    concept = rng.choice(concepts, rows, p=chance / chance.sum())
    centre, kind = directions(concepts), directions(concepts * KINDS)
    which = concept * KINDS + rng.integers(0, KINDS, rows)
    made = 0.75 * centre[concept] + 0.35 * kind[which] + 0.55 * directions(rows)
    return unit_half(made), concept


def write(folder: Path, name: str, vectors: Array, places: Array) -> RowSet:
    """Some of the rows as an embedding step writes them; the row number is the place."""
    parts, names = np.array_split(np.sort(places), FILES), [f"{i:05d}" for i in range(FILES)]
    for file, part in zip(names, parts, strict=True):
        digests = [blake2b(int(i).to_bytes(8, "big"), digest_size=16).digest() for i in part]
        ids = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
        columns = [part, id_array(ids), list_array(vectors[part])]
        write_table(pa.table(columns, schema=vector_schema(DIM)), str(folder / name), file)
    known = Vectors(str(folder / name), tuple(names), DIM, key=name)
    return RowSet.of(known, [len(part) for part in parts])


def chosen(place: str, names: Sequence[str], column: str | None) -> Array:
    """Rows in the files of a step; with a column, those where it is true."""
    found = []
    for name in names:
        table = read_table(place, name)
        rows = table["row"].to_numpy()
        found.append(rows[table[column].to_numpy()] if column else rows)
    return np.concatenate(found)


def balance_table(folder: Path, vectors: Array, concept: Array, seed: int) -> None:
    rows, total = len(concept), int(concept.max()) + 1
    pool = np.bincount(concept, minlength=total)
    target = rows // 10
    print(
        f"\n{'':44}{'rows':>7}{'concepts':>10}{'top 10':>8}{'missing':>9}{'leaves':>8}{'CPU s':>8}"
    )
    reached: dict[str, float] = {}

    def line(name: str, which: Array, leaves: str = "", cpu_s: float | None = None) -> None:
        counts = np.bincount(concept[which], minlength=total)
        reached[name] = effective(counts)
        top = np.sort(counts)[::-1][:10].sum() / max(1, counts.sum())
        missing = int(((pool > 0) & (counts == 0)).sum())
        cpu = "" if cpu_s is None else f"{cpu_s:8.1f}"
        print(
            f"{name:44}{len(which):7,}{reached[name]:10.1f}{top:8.3f}{missing:9}{leaves:>8}{cpu}",
            flush=True,
        )

    line("pool", np.arange(rows))
    line("random", np.random.default_rng(seed).permutation(rows)[:target])
    considered = write(folder, "pool", vectors, np.arange(rows))
    usual = hierarchy.default_levels(rows, DIM)
    flat, named = (max(1, rows // 60),), "-".join(str(n) for n in usual)
    for name, levels, resampling, floors in (
        (f"flat {flat[0]}", flat, 0, (0,)),
        (f"flat {usual[0]}", usual[:1], 0, (0,)),
        (f"{named}, no resampling", usual, 0, (0,)),
        (f"{named}, resampled", usual, RESAMPLING, (0, 1)),
    ):
        steps = Steps(folder / f"balance-{levels[-1]}-{resampling}")
        asked = hierarchy.Levels(levels, seed, ITERATIONS, resampling)
        built = hierarchy.build(steps, considered, asked)
        for floor in floors:
            own = Steps(folder / f"balance-{levels[-1]}-{resampling}" / f"floor-{floor}")
            size = balance.Sample(target, seed, floor, 2)
            got = balance.balanced_sample(own, considered, built, size)
            which = chosen(got.result.folder, considered.names, "chosen")
            assert len(which) == len(set(which.tolist())) == target
            assert floor == 0 or got.summary["floor_honoured"]
            full = f"{name}, floor {floor}" if len(floors) > 1 else name
            unsampled = str(got.summary["levels"][0]["unsampled"])
            cpu_s = sum(step.cpu_s for step in [*steps.done, *own.done])
            line(full, which, unsampled, cpu_s)
    best = reached[f"{named}, resampled, floor 1"]
    print(
        f"\nbalanced over random {best / reached['random']:.2f} (wanted: 3), "
        f"over flat k-means of {flat[0]} {best / reached[f'flat {flat[0]}']:.2f} (wanted: 1.5), "
        f"of {usual[0]} {best / reached[f'flat {usual[0]}']:.2f}"
    )


def retrieval_table(folder: Path, vectors: Array, concept: Array, seed: int) -> None:
    sizes = np.bincount(concept)
    able = np.flatnonzero(sizes >= 8)
    rare = able[np.argsort(sizes[able], kind="stable")][30:50]
    first = [np.flatnonzero(concept == one)[:4] for one in rare]
    seeds = np.concatenate(first)
    pool = np.setdiff1d(np.arange(len(concept)), seeds)
    considered = write(folder, "retrieval-pool", vectors, pool)
    seed_rows = write(folder, "seeds", vectors, seeds)
    right = int(np.isin(concept[pool], rare).sum())
    print(f"\n{len(seeds)} seeds of {len(rare)} concepts with {right} rows in the pool")
    print(
        f"{'':44}{'asked':>7}{'unique':>8}{'twice':>7}{'precision':>11}{'recall':>8}{'purity':>8}"
    )
    for name, wanted in (
        ("4 neighbours", seed_clusters.Retrieval("sample", neighbours=4)),
        ("4 neighbours, similarity at least .5", _near(4)),
        ("32 neighbours", seed_clusters.Retrieval("sample", neighbours=32)),
        ("32 neighbours, similarity at least .5", _near(32)),
        *(
            (f"{k:,} clusters, more than 3 seeds", seed_clusters.Retrieval("cluster", clusters=k))
            for k in (500, 2000, 4000)
        ),
    ):
        step = "retrieve-" + "".join(c for c in name if c.isalnum())
        own = Steps(folder / step)
        got = retrieve.retrieve(own, considered, {"rare": seed_rows}, wanted, seed)
        told = got.summary["sets"]["rare"]
        which = chosen(got.result.folder, considered.names, None)
        hit = int(np.isin(concept[which], rare).sum())
        purity = f"{told['purity']:8.3f}" if "purity" in told else ""
        twice = told["collisions"] / max(1, told["found"])
        print(
            f"{name:44}{told['found']:7,}{len(which):8,}{twice:7.2f}"
            f"{hit / max(1, len(which)):11.3f}{hit / right:8.3f}{purity}",
            flush=True,
        )


def _near(neighbours: int) -> seed_clusters.Retrieval:
    return seed_clusters.Retrieval("sample", neighbours=neighbours, min_similarity=0.5)


def boundary(folder: Path, seed: int) -> None:
    """Twelve concepts far apart, a cluster each; sets with 3 and 4 seeds of one of them."""
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0][:12]
    concept = np.arange(2400) % 12
    vectors = unit_half(centres[concept] + 0.01 * rng.standard_normal((2400, DIM)))
    rows = write(folder, "apart", vectors, np.arange(1200))
    sets = {
        f"{n} seeds": write(folder, f"apart-{n}", vectors, 1200 + one + 12 * np.arange(n))
        for one, n in ((1, 3), (2, 4))
    }
    print()
    for cap in (1_000_000, 30):
        # More clusters than concepts would share the seeds out; fewer would mix concepts.
        wanted = seed_clusters.Retrieval("cluster", clusters=12, cap=cap)
        own = Steps(folder / f"apart-cap-{cap}")
        told = retrieve.retrieve(own, rows, sets, wanted, seed).summary
        for name, one in told["sets"].items():
            print(
                f"a cluster with {name}, cap {cap:,}: {one['clusters']} clusters taken from, "
                f"{one['delivered']} rows"
            )


def measure(rows: int, concepts: int, seed: int) -> None:
    with tempfile.TemporaryDirectory(prefix="concepts-") as temporary:
        folder = Path(temporary)
        vectors, concept = plant(rows, concepts, seed)
        balance_table(folder, vectors, concept, seed)
        retrieval_table(folder, vectors, concept, seed)
        boundary(folder, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--concepts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpus", type=int, default=2)
    options = parser.parse_args()
    quiet_environment()
    import ray

    with tempfile.TemporaryDirectory(prefix="rd") as place:
        ray.init(
            num_cpus=options.cpus,
            object_store_memory=2**28,
            include_dashboard=False,
            logging_level="error",
            log_to_driver=False,
            _temp_dir=place,
        )
        try:
            measure(options.rows, options.concepts, options.seed)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
