"""What the linear grid and logistic regression cost on stored vectors.

    python benchmarks/linear.py [--images 50000] [--queries 10000] [--width 192] [--classes 10]

Makes tables of vectors (CLS of four blocks and the mean of the patches; a class is a direction in
them, beneath noise) in a temporary folder and scores them in this process, without Ray, so that its
peak memory is theirs. With `--only linear` or `--only logistic` the peak is of one of them.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.card.linear import scores
from pipeline.card.linear.scores import LabelledTable, linear_scores
from pipeline.embed.vectors import VectorSet, list_column, part_name, schema_of
from pipeline.evaluate.classifiers.linear import Schedule
from pipeline.evaluate.classifiers.logistic import logistic_scores
from pipeline.evaluate.features import LabelledFeatures

BLOCKS, PART = 4, 1024
NOISE = 4.0  # of a number, beside a class direction of deviation 1


def table(folder: Path, count: int, args: argparse.Namespace, seed: int) -> LabelledTable:
    """A table as `jobs/embed.py` writes it."""
    random = np.random.default_rng(seed)
    width, outputs = args.width, ["cls", "mean", "blocks"]
    facts: dict[str, Any] = {
        "key": "k", "model": "made", "digest": "d", "dim": width, "blocks": BLOCKS, "channels": 3,
        "grid": [4, 4], "outputs": outputs, "dtype": "float32",
    }  # fmt: skip
    schema = schema_of(facts)
    shape = (args.classes, BLOCKS + 1, width)
    means = np.random.default_rng(99).normal(size=shape).astype(np.float32)
    labels = random.integers(0, args.classes, count)
    ids = random.integers(0, 256, (count, 16), np.uint8)
    parts = []
    folder.mkdir()
    for number, at in enumerate(range(0, count, PART)):
        of_part = slice(at, min(at + PART, count))
        rows = of_part.stop - at
        x = means[labels[of_part]]
        x = x + NOISE * random.standard_normal((rows, BLOCKS + 1, width), np.float32)
        vectors = {"cls": x[:, -2], "mean": x[:, -1], "blocks": x[:, :BLOCKS]}
        columns = {n: list_column(vectors[n], schema.field(n).type) for n in outputs}
        about = {
            "image_id": [bytes(one).hex() for one in ids[of_part]],
            "source": [""] * rows,
            "label": labels[of_part],
            "row": range(at, of_part.stop),
        }
        pq.write_table(pa.table(about | columns, schema), folder / part_name(number))
        parts.append((part_name(number), rows))
    return LabelledTable(VectorSet(str(folder), tuple(parts), facts), labels, ids)


def in_memory(one: LabelledTable) -> LabelledFeatures:
    """Its CLS vectors."""
    return LabelledFeatures(
        torch.from_numpy(one.vectors.read()), torch.from_numpy(one.labels), one.ids
    )


def said(name: str, value: float, begin: tuple[float, float], more: str) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    print(f"{name}: {value:.4f}, {wall:.1f} s, {cpu:.1f} s of CPU, peak {peak:.2f} GiB; {more}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--only", choices=["linear", "logistic"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of the grid; else as a score takes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scores.ranks_of = lambda gpu, workers: 1
    scores.on_ranks = lambda function, given, ranks, gpu: [function(given, 0, 1, "cpu")]
    if args.steps:
        scores.schedule_of = lambda given, ranks: Schedule(1024, args.steps)
    with tempfile.TemporaryDirectory() as folder:
        reference = table(Path(folder, "reference"), args.images, args, 1)
        queries = table(Path(folder, "queries"), args.queries, args, 2)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"made; peak {peak:.2f} GiB, torch {torch.__version__}")
        if args.only != "linear":
            begin = time.perf_counter(), time.process_time()
            score, details = logistic_scores(in_memory(reference), in_memory(queries), args.classes)
            said("logistic", score.value, begin, f"C {details['c']:.3g}")
        if args.only != "logistic":
            begin = time.perf_counter(), time.process_time()
            score, details = linear_scores(reference, queries)
            more = f"{details['head']}, rate {details['rate']:g}, {details['steps']} steps"
            said("linear", score.value, begin, more)


if __name__ == "__main__":
    main()
