"""k-NN, retrieval and few-shot accuracy of 200,000 x 384 vectors: seconds, memory, growth.

    python benchmarks/evaluate.py        # five minutes on two quiet cores

The vectors are made: 1,000 classes, each a Gaussian around a Gaussian centre, 384 wide, in float32.
10,000 queries of the same law; 2,000 for ratios and growth. Each measurement is a process of its
own, so that its peak memory is its own; those that are compared run in turn. The contestants of
k-NN (k = 200 neighbours, votes of 10, 20, 100 and 200):

* ours: `evaluate.neighbours.nearest.nearest` and `knn_scores`, exact sums
* plain: unit vectors in float32, a matrix product of 512 queries at a time, topk, dense votes
* sklearn: `NearestNeighbors(algorithm="brute")` on the unit vectors, whose Euclidean distance
  orders as the cosine does; no votes
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

DIM, CLASSES, ROWS, QUERIES, FEW_QUERIES = 384, 1000, 200_000, 10_000, 2000
KS = (10, 20, 100, 200)
PART = 512  # queries of the plain loop


def drawn(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Vectors, labels and ids; a class is a fifth of the spread, so that votes are often wrong."""
    centres = np.random.default_rng(0).standard_normal((CLASSES, DIM), dtype=np.float32)
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, CLASSES, rows)
    vectors = draw.standard_normal((rows, DIM), dtype=np.float32)
    vectors *= 3
    vectors += centres[labels]
    ids = draw.integers(0, 256, (rows, 16)).astype(np.uint8)
    return torch.from_numpy(vectors), torch.from_numpy(labels), ids


def ours(reference: Any, queries: Any) -> float:
    from pipeline.evaluate.features import LabelledFeatures
    from pipeline.evaluate.neighbours.knn import knn_scores
    from pipeline.evaluate.neighbours.nearest import Neighbours, SameImages, nearest

    (known, labels, ids), (asked, truth, asked_ids) = reference, queries
    similarities, rows = nearest(known, asked, max(KS), same=SameImages.of(ids, asked_ids))
    voted = Neighbours(similarities, rows)
    scores = knn_scores(voted, labels, LabelledFeatures(asked, truth, asked_ids), KS)
    return scores[1].value


def plain(reference: Any, queries: Any) -> float:
    (known, labels, _), (asked, truth, _) = reference, queries
    transposed = torch.nn.functional.normalize(known).T
    right = dict.fromkeys(KS, 0)
    for start in range(0, len(asked), PART):
        part = torch.nn.functional.normalize(asked[start : start + PART])
        top = (part @ transposed).topk(max(KS))
        weights, of = (top.values / 0.07).softmax(1), labels[top.indices]
        for k in KS:
            votes = torch.zeros(len(part), CLASSES).scatter_add(1, of[:, :k], weights[:, :k])
            right[k] += int((votes.argmax(1) == truth[start : start + PART]).sum())
    return right[20] / len(asked)


def sklearn(reference: Any, queries: Any) -> float:
    from sklearn.neighbors import NearestNeighbors

    known, asked = (torch.nn.functional.normalize(x[0]).numpy() for x in (reference, queries))
    model = NearestNeighbors(n_neighbors=max(KS), algorithm="brute").fit(known)
    model.kneighbors(asked)
    return math.nan


def retrieval(reference: Any, queries: Any) -> float:
    from pipeline.evaluate.features import LabelledFeatures
    from pipeline.evaluate.neighbours.retrieval import retrieval_scores

    return retrieval_scores(LabelledFeatures(*reference), LabelledFeatures(*queries))[0][0].value


def few_shot(reference: Any, queries: Any) -> float:
    from pipeline.evaluate.classifiers.few_shot import few_shot_scores
    from pipeline.evaluate.features import LabelledFeatures

    return few_shot_scores(LabelledFeatures(*reference), LabelledFeatures(*queries))[1][0].value


MEASURED: dict[str, Callable[[Any, Any], float]] = {
    each.__name__: each for each in (ours, plain, sklearn, retrieval, few_shot)
}


def measure(name: str, rows: int, count: int) -> dict[str, float]:
    """In a process of its own: seconds on the clock and of CPUs, the score, and the peak memory
    beyond that of the vectors in GiB.
    """
    torch.set_num_threads(2)
    reference, queries = drawn(rows, 1), drawn(count, 2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: drawing has one
    before = in_gib("VmRSS")
    begun, cpu = time.perf_counter(), time.process_time()
    score = MEASURED[name](reference, queries)
    seconds, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
    more = in_gib("VmHWM") - before
    return {"s": seconds, "cpu_s": cpu_s, "gib": more, "score": score}


def in_gib(field: str) -> float:
    """Of this process: memory now (VmRSS) or its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) / 2**20


def asked(name: str, rows: int, count: int) -> dict[str, float]:
    """`measure` in another process."""
    call = [sys.executable, __file__, "--measure", name, "--rows", str(rows), "--queries"]
    answer = json.loads(subprocess.run([*call, str(count)], check=True, capture_output=True).stdout)
    say(
        f"{name:9} {rows:7,} rows, {count:6,} queries: {answer['s']:6.1f} s, "
        f"{answer['cpu_s']:6.1f} s of CPUs, {answer['gib']:.2f} GiB more than the vectors, "
        f"score {answer['score']:.4f}"
    )
    return dict(answer)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def ratios(rounds: list[dict[str, dict[str, float]]], other: str) -> None:
    for clock, what in (("s", "seconds"), ("cpu_s", "seconds of CPUs")):
        each = sorted(times["ours"][clock] / times[other][clock] for times in rounds)
        middle = each[len(each) // 2]
        say(f"ours / {other}, {what}: {middle:.2f} ({each[0]:.2f} to {each[-1]:.2f})")


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", choices=MEASURED)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.measure:
        sys.stdout.write(json.dumps(measure(given.measure, given.rows, given.queries)))
        return
    few = min(FEW_QUERIES, given.queries)
    compared = ("ours", "plain", "sklearn")
    rounds = [
        {name: asked(name, given.rows, few) for name in compared} for _ in range(given.rounds)
    ]
    for other in compared[1:]:
        ratios(rounds, other)
    sizes = [given.rows // 8, given.rows // 4, given.rows // 2, given.rows]
    seconds = [asked("ours", rows, few)["cpu_s"] for rows in sizes]
    slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
    say(f"seconds of CPUs grow with rows to the power of {slope:.2f}")
    for name in ("retrieval", "few_shot", "ours", "plain"):
        asked(name, given.rows, given.queries)


if __name__ == "__main__":
    main()
