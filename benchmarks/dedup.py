"""Copies among vectors: what is left, what it costs, how it grows.

    python benchmarks/dedup.py                       # all parts, 10^6 x 384, about a quarter hour
    python benchmarks/dedup.py residual --residual-rows 100000
    python benchmarks/dedup.py end shuffle growth --rows 200000 --small-rows 50000

Vectors are made: concepts of very different sizes, and 15 % planted copies at a cosine of 0.62 to
0.995, some of them in groups of 120 and 300. Two vectors are copies above 0.6. Parts:

    residual  planted copies that stay: the rule of SemDeDup and NeMo Curator (compare within one
              k-means cell, drop what is like an earlier one; ten lines of our own) against ours
    faiss     CPU time of an exact index (Flat, 64 neighbours) over ours. Its time is that of a
              sample of queries, times the rows over the sample: an extrapolation
    end       parquet to decisions through Ray: wall and CPU time, peak memory of each step
    shuffle   bytes written for the join with cells bucketed by number, over ours
    growth    exponent of our CPU time from --small-rows to --rows

Every ratio is of two things measured in the same run on the same data. Recall is the share of
planted copies that are in the component of what they are copies of.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.cell_items import ImageSet
from pipeline.curate.copies.fit_cells import CellPlan, fit_cells
from pipeline.curate.copies.keepers import CopyRule
from pipeline.curate.copies.pairs import Search, find_pairs, put_in_cells
from pipeline.curate.copies.which_are_copies import group_copies
from pipeline.curate.decide.decide import Mix, decide, starts_of
from pipeline.curate.decide.file_rows import Known
from pipeline.curate.decide.tally import Sources, Tally
from pipeline.curate.rows import tables
from pipeline.curate.rows.exact import nearest_numbers, unit_half
from pipeline.curate.steps.steps import Step, Steps
from pipeline.shards.shards import ShardColumns, ShardFile

PARTS = ("residual", "faiss", "end", "shuffle", "growth")
THRESHOLD = 0.6
FILE_ROWS = 25_000

Array = np.ndarray[Any, Any]


def noise(rng: np.random.Generator, rows: int, dim: int) -> Array:
    """Directions with a spectrum that falls as that of real embeddings."""
    x = rng.standard_normal((rows, dim), dtype=np.float32)
    x *= np.arange(1, dim + 1, dtype=np.float32) ** -0.25
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


def make(rows: int, dim: int, seed: int = 0) -> tuple[Array, Array]:
    """Half precision [rows, dim], and the row that each is a copy of, or -1."""
    rng = np.random.default_rng(seed)
    made = int(0.15 * rows)
    own = rows - made
    concepts = max(50, own // 300)
    size = 1 / np.arange(1, concepts + 1) ** 0.8
    concept = rng.choice(concepts, own, p=size / size.sum())
    coarse, fine = noise(rng, max(10, concepts // 30), dim), noise(rng, concepts, dim)
    above = rng.integers(0, len(coarse), concepts)
    x = np.empty((rows, dim), np.float16)
    for a in range(0, own, 20_000):
        c = concept[a : a + 20_000]
        mixed = 0.1**0.5 * coarse[above[c]] + 0.2**0.5 * fine[c]
        x[a : a + len(c)] = unit_half(mixed + 0.7**0.5 * noise(rng, len(c), dim))
    sizes = np.append([300, 120], rng.geometric(0.35, made // 2))  # more than enough
    of = np.repeat(rng.permutation(own)[: len(sizes)], sizes)[:made]
    cosine = (0.62 + 0.375 * rng.beta(1.6, 1.0, made)).astype(np.float32)
    for a in range(0, made, 20_000):
        x0, s = x[of[a : a + 20_000]].astype(np.float32), cosine[a : a + 20_000, None]
        other = noise(rng, len(x0), dim)
        other -= (other * x0).sum(1, keepdims=True) * x0
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        x[own + a : own + a + len(x0)] = unit_half(s * x0 + np.sqrt(1 - s * s) * other)
    order = rng.permutation(rows)
    place = np.argsort(order)
    return x[order], np.concatenate([np.full(own, -1), place[of]])[order]


class Pool:
    """A pool of vectors on disk, made once, and what came out of it."""

    def __init__(self, folder: Path, rows: int, dim: int, probes: int) -> None:
        self.folder, self.rows, self.probes = folder / str(rows), rows, probes
        self.source = np.empty(0, np.int64)
        self.steps: list[Step] = []
        self.wall_s = 0.0
        begin = time.perf_counter()
        x, self.source = make(rows, dim)
        ids = np.random.default_rng(1).integers(0, 256, (rows, 16), dtype=np.uint8)
        files, columns = [], ShardColumns("", "image", "label")
        for index, first in enumerate(range(0, rows, FILE_ROWS)):
            some = slice(first, min(rows, first + FILE_ROWS))
            row = np.arange(some.start, some.stop)
            file = ShardFile("", len(row), (), 0)
            files.append(tables.InputFile(index, "pool", tables.POOL, first, file, columns))
            own = {"row": row, "image_id": tables.id_array(ids[some])}
            embedded = own | {"vector": tables.list_array(x[some])}
            tables.write_table(pa.table(embedded), str(self.folder / "embedded"), files[-1].name)
            facts = own | dict.fromkeys(("bytes", "width", "height"), np.ones(len(row), np.int64))
            facts |= dict.fromkeys(("error", "source"), pa.array([""] * len(row)))
            tables.write_table(pa.table(facts), str(self.folder / "facts"), files[-1].name)
        self.inputs = tables.Inputs(tuple(files), "benchmark")
        names = tuple(file.name for file in files)
        self.vectors = tables.Vectors(str(self.folder / "embedded"), names, dim, "benchmark")
        np.save(self.folder / "x.npy", x)
        print(f"made {rows:,} x {dim} in {time.perf_counter() - begin:.0f} s", flush=True)

    @property
    def x(self) -> Array:
        """All vectors, on disk."""
        return np.load(self.folder / "x.npy", mmap_mode="r")

    def components(self) -> Array:
        """The component of each row: its keeper's row, or its own. Run once, with the decisions."""
        if not self.steps:
            begin = time.perf_counter()
            images, search = ImageSet(self.inputs, self.vectors), Search(self.probes)
            steps, prints = (
                Steps(self.folder / "run"),
                Step("", "facts", str(self.folder / "facts")),
            )
            index = put_in_cells(steps, images, search)
            pairs = find_pairs(steps, index, search, THRESHOLD)
            rule = CopyRule(THRESHOLD, chains="keep")
            self.groups = group_copies(steps, pairs, images, prints, rule)
            decisions = steps.run(
                "decisions",
                decide,
                self.inputs.by_name,
                starts=starts_of(self.inputs),
                known=Known(prints, groups=self.groups),
                sources={"pool": Sources("pool")},
                mix=Mix(),
            )
            self.wall_s = time.perf_counter() - begin
            self.steps = steps.done
            reasons = Tally.of(self.inputs, decisions.accounts).reasons["pool"]
            counts = " + ".join(f"{count:,} {reason}" for reason, count in reasons.items())
            print(f"decided     {self.rows:,} = {counts}")
        keeper = np.arange(self.rows)
        for name in self.vectors.names:
            table = self.groups.read(name, ["row", "keeper"])
            keeper[table.column("row").to_numpy()] = table.column("keeper").to_numpy()
        return keeper

    @property
    def cpu_s(self) -> float:
        """Of all tasks, from parquet to decisions."""
        return float(sum(step.cpu_s for step in self.steps))

    def recall(self) -> float:
        """Planted copies in the component of what they are copies of."""
        keeper, has = self.components(), np.flatnonzero(self.source >= 0)
        return float((keeper[has] == keeper[self.source[has]]).mean())

    def residual(self, kept: Array) -> float:
        """Share of planted copies that are left: all but one of each group."""
        group = np.where(self.source >= 0, self.source, np.arange(self.rows))
        left = np.bincount(group[kept], minlength=self.rows)
        return float(np.maximum(left - 1, 0).sum() / (self.source >= 0).sum())


def one_cell_rule(x: Array, count: int) -> Array:
    """Rows that SemDeDup's rule keeps: no earlier row of the same cell is like it."""
    share = np.random.default_rng(0).permutation(len(x))[: 40 * count]
    fitted = fit_cells(np.asarray(x[np.sort(share)]), CellPlan(count, 1), 0)
    cell = nearest_numbers(np.asarray(x), fitted.centres, 1)[:, 0]
    kept = np.ones(len(x), bool)
    for number, centre in enumerate(fitted.centres.astype(np.float32)):
        rows = np.flatnonzero(cell == number)
        y = np.asarray(x[rows], np.float32)
        order = np.argsort(y @ centre, kind="stable")  # the farthest from the centre stays
        y = y[order]
        kept[rows[order]] = ~np.tril(y @ y.T > THRESHOLD, -1).any(1)
    return kept


def residual(pool: Pool) -> None:
    keeper = pool.components()
    ours = pool.residual(keeper == np.arange(pool.rows))
    theirs = pool.residual(one_cell_rule(pool.x, int(2 * pool.rows**0.5)))
    print(
        f"residual    {pool.rows:,} rows: one-cell rule {theirs:.4f}, ours {ours:.4f}: "
        f"ratio {theirs / max(ours, 1e-9):.1f} (20 wanted); recall {pool.recall():.4f}"
    )


def faiss_flat(pool: Pool, queries: int) -> None:
    import faiss

    has = np.flatnonzero(pool.source >= 0)
    some = np.random.default_rng(2).choice(has, min(queries, len(has)), replace=False)
    index = faiss.IndexFlatIP(pool.vectors.dim)
    begin = time.process_time()
    for a in range(0, pool.rows, 100_000):
        index.add(np.asarray(pool.x[a : a + 100_000], np.float32))
    built = time.process_time() - begin
    begin = time.process_time()
    _, found = index.search(np.asarray(pool.x[some], np.float32), 64)
    each = (time.process_time() - begin) / len(some)
    theirs = float((found == pool.source[some][:, None]).any(1).mean())
    recall, cpu = pool.recall(), built + each * pool.rows
    print(
        f"faiss Flat  {pool.rows:,} rows: {cpu / 60:.1f} CPU-min (extrapolated from {len(some):,} "
        f"queries; source among 64: {theirs:.4f}), ours {pool.cpu_s / 60:.2f} CPU-min at recall "
        f"{recall:.4f} (0.98 wanted): ratio {cpu / pool.cpu_s:.1f} (50 wanted)"
    )


def end(pool: Pool) -> None:
    recall = pool.recall()
    print(
        f"end to end  {pool.rows:,} x {pool.vectors.dim}, {pool.probes} probes, parquet to "
        f"decisions through Ray: {pool.wall_s:.0f} s wall (180 wanted on two idle cores), "
        f"{pool.cpu_s:.0f} CPU-s, recall {recall:.4f}, load {os.getloadavg()[0]:.1f}"
    )
    for step in pool.steps:
        print(
            f"    {step.name:<18} {step.seconds:6.1f} s wall {step.cpu_s:7.1f} CPU-s "
            f"{step.total('bytes') / 2**20:8.1f} MiB written, {len(step.accounts):3d} tasks, "
            f"peak {step.peak_bytes / 2**30:.2f} GiB"
        )


def shuffle(pool: Pool) -> None:
    sizes = {}
    for bucketing in ("near", "modulo"):
        root = pool.folder / f"shuffle-{bucketing}"
        images = ImageSet(pool.inputs, pool.vectors)
        search = Search(pool.probes, bucketing=bucketing, buckets=16)
        index = put_in_cells(Steps(root), images, search)
        sizes[bucketing] = index.items.step.total("bytes")
        shutil.rmtree(root)
    data = pool.rows * pool.vectors.dim * 2
    print(
        f"shuffle     {pool.rows:,} rows, 16 buckets: by number {sizes['modulo'] / data:.2f} times "
        f"the vectors, clustered {sizes['near'] / data:.2f}: "
        f"ratio {sizes['modulo'] / sizes['near']:.2f} (2 wanted)"
    )


def growth(small: Pool, large: Pool) -> None:
    small.components()
    large.components()
    exponent = math.log(large.cpu_s / small.cpu_s) / math.log(large.rows / small.rows)
    print(
        f"growth      {small.rows:,} rows {small.cpu_s:.0f} CPU-s, {large.rows:,} rows "
        f"{large.cpu_s:.0f} CPU-s: exponent {exponent:.2f} (1.6 wanted)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--small-rows", type=int, default=250_000)
    parser.add_argument("--residual-rows", type=int, default=500_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--queries", type=int, default=1000, help="of the faiss sample")
    parser.add_argument("--cpus", type=int, default=os.cpu_count())
    options = parser.parse_args()
    parts = options.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")

    import ray

    folder = Path(tempfile.mkdtemp(prefix="dedup-"))
    temporary = tempfile.mkdtemp(prefix="rd", dir="/tmp")
    pools: dict[int, Pool] = {}

    def pool(rows: int) -> Pool:
        if rows not in pools:
            pools[rows] = Pool(folder, rows, options.dim, options.probes)
        return pools[rows]

    runs: dict[str, Callable[[], None]] = {
        "residual": lambda: residual(pool(options.residual_rows)),
        "end": lambda: end(pool(options.rows)),
        "faiss": lambda: faiss_flat(pool(options.rows), options.queries),
        "growth": lambda: growth(pool(options.small_rows), pool(options.rows)),
        "shuffle": lambda: shuffle(pool(options.small_rows)),
    }
    try:
        ray.init(
            num_cpus=options.cpus,
            include_dashboard=False,
            logging_level="error",
            object_store_memory=256 * 2**20,
            _temp_dir=temporary,
        )
        for name in runs:
            if name in parts:
                runs[name]()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main()
