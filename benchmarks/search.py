"""Exact and indexed search among a million vectors: build, memory, recall, milliseconds a query.

    python benchmarks/search.py make    # the vectors, half a minute
    python benchmarks/search.py build   # the index, minutes
    python benchmarks/search.py ask     # both searches in turn in one process

The vectors are made: 100 topics, 50 clusters in each, of sizes that fall like 1 / rank, and noise
within a cluster. x = topic + 0.8 cluster + 0.8 noise, each of them Gaussian, 384 wide. So an image
has its cluster around it (cosine 0.72), its topic further away (0.44), and the rest at 0. Queries
are drawn from the same law and are not in the set. One thread of numpy and of faiss.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import faiss
import numpy as np

from pipeline import log
from pipeline.search import open_search

DIM, TOPICS, CLUSTERS = 384, 100, 50
CHUNK = 50_000
ROUNDS = 5


class Stored:
    """Vectors in a numpy file, as search asks for them."""

    def __init__(self, folder: Path) -> None:
        self._vectors = np.load(folder / "vectors.npy", mmap_mode="r")
        self.rows, self.dim = self._vectors.shape
        self.uri, self.key = str(folder), f"made-{self.rows}"

    def blocks(self, rows: int = 65_536, output: str = "cls") -> Iterator[tuple[Any, Any]]:
        del output
        for begin in range(0, self.rows, rows):
            yield np.asarray(self._vectors[begin : begin + rows]), None

    def read(self, output: str = "cls", rows: slice | None = None) -> Any:
        del output
        return np.asarray(self._vectors[rows or slice(None)])


def drawn(rows: int, seed: int) -> Iterator[np.ndarray]:
    """Chunks of vectors; the clusters are the same for every seed."""
    centres = np.random.default_rng(0)
    topics = centres.normal(size=(TOPICS, 1, DIM))
    clusters = (topics + 0.8 * centres.normal(size=(TOPICS, CLUSTERS, DIM))).reshape(-1, DIM)
    share = 1 / (1 + centres.permutation(len(clusters)))
    draw = np.random.default_rng(seed)
    for begin in range(0, rows, CHUNK):
        count = min(CHUNK, rows - begin)
        which = draw.choice(len(clusters), count, p=share / share.sum())
        noise = draw.standard_normal((count, DIM), dtype=np.float32)
        yield (clusters[which] + 0.8 * noise).astype(np.float32)


def make(folder: Path, rows: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "begun.npy"
    vectors = np.lib.format.open_memmap(begun, "w+", np.float32, (rows, DIM))
    begin = 0
    for chunk in drawn(rows, 1):
        vectors[begin : begin + len(chunk)] = chunk
        begin += len(chunk)
    vectors.flush()
    begun.rename(folder / "vectors.npy")


def build(folder: Path, rows: int) -> None:
    for old in folder.glob("_index*"):
        old.unlink()
    before = peak_gib()
    start = time.perf_counter()
    index = open_search(Stored(folder), index="ivf").index
    assert index is not None
    told = json.loads((folder / "_index.json").read_text())
    said(
        machine=machine(),
        rows=rows,
        build_s=round(time.perf_counter() - start, 1),
        **{name: told[name] for name in ("train_s", "add_s", "measure_s")},
        **{name: told[name] for name in ("lists", "probes", "recall", "queries", "trained_on")},
        file_gib=round(told["file_bytes"] / 2**30, 2),
        peak_gib=round(peak_gib(), 2),
        peak_before_gib=round(before, 2),
    )


def ask(folder: Path, count: int) -> None:
    stored = Stored(folder)
    start = time.perf_counter()
    fast = open_search(stored, index="ivf")
    opened_index_s = time.perf_counter() - start
    memory_index = peak_gib()
    start = time.perf_counter()
    exact = open_search(stored, index="exact", memory_gib=64)
    opened_exact_s = time.perf_counter() - start
    queries = next(drawn(count, 2))
    start = time.perf_counter()
    truth = exact.find(queries, 10)
    batch_exact_ms = 1000 * (time.perf_counter() - start) / count
    fast.find(queries, 10)  # the lists come into memory
    start = time.perf_counter()
    nearest = fast.find(queries, 10)
    batch_fast_ms = 1000 * (time.perf_counter() - start) / count
    hits = [
        len(set(a) & set(b)) for a, b in zip(nearest[1].tolist(), truth[1].tolist(), strict=True)
    ]
    times: dict[str, list[float]] = {"exact": [], "index": []}
    ratios = []
    for number in range(ROUNDS):  # in turn, so that what else runs here hits both
        rounds = {}
        for name, search, asked in (("exact", exact, 20), ("index", fast, 200)):
            each = []
            for query in range(number * asked, (number + 1) * asked):
                start = time.perf_counter()
                search.find(queries[query % count][None], 10)
                each.append(1000 * (time.perf_counter() - start))
            times[name] += each
            rounds[name] = float(np.median(each))
        ratios.append(rounds["exact"] / rounds["index"])
    said(
        machine=machine(),
        rows=stored.rows,
        queries=count,
        recall_at_10=round(sum(hits) / (10 * count), 4),
        one_query_ms={name: spread(values) for name, values in times.items()},
        exact_over_index=[round(r, 1) for r in sorted(ratios)],
        batch_ms_a_query={"exact": round(batch_exact_ms, 2), "index": round(batch_fast_ms, 2)},
        open_s={"exact": round(opened_exact_s, 1), "index": round(opened_index_s, 2)},
        peak_gib={"index alone": round(memory_index, 2), "both": round(peak_gib(), 2)},
    )


def spread(values: list[float]) -> dict[str, float]:
    percents = np.percentile(values, [0, 50, 95, 100])
    return dict(
        zip(("least", "median", "p95", "most"), (round(float(p), 2) for p in percents), strict=True)
    )


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def machine() -> str:
    return f"{os.cpu_count()} cores, numpy {np.__version__}, faiss {faiss.__version__}, python " + (
        platform.python_version()
    )


def said(**figures: Any) -> None:
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("make", "build", "ask"))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/search_benchmark"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    log.configure()
    place = options.folder / str(options.rows)
    if options.what == "make":
        make(place, options.rows)
    elif options.what == "build":
        build(place, options.rows)
    else:
        ask(place, options.queries)
