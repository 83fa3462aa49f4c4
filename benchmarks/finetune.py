"""Fine-tuning with few labels, from a trained backbone and from random weights, over seeds.

    python benchmarks/finetune.py --model runs/cifar10 --shards runs/cifar10/shards \\
        --queries runs/cifar10/pack/queries

One process without Ray, by the loop that `jobs/finetune.py` runs. Prints a line for each run and a
table of means with the standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config.load import load
from pipeline.embed.embedders import embedder_of
from pipeline.evaluate.score import Score
from pipeline.finetune.classifier import classifier_of
from pipeline.finetune.images import LabelledImages, Worker
from pipeline.finetune.loop import Trainee, answers, fit
from pipeline.finetune.rows import Split, split_of
from pipeline.finetune.settings import Settings
from pipeline.shards.shards import ShardSet, open_shards
from pipeline.stages.finetune import settings_of


class Silent:
    """Nothing beside the steps (`loop.Watch`)."""

    def stop(self) -> bool:
        """Nobody asks for the end."""
        return False

    def step(self, done: int, scalars: dict[str, float]) -> None:
        """Keeps the newest numbers."""
        self.scalars = scalars

    def save(self, done: int) -> None:
        """Saves nothing."""


def scored(settings: Settings, load_backbone, split: Split, images: ShardSet, threads: int):
    """Accuracy on the queries with its 95 % interval, and that on the last step's images."""
    torch.manual_seed(settings.seed)
    trainee = Trainee(classifier_of(load_backbone(), len(split.class_names), settings), settings)
    worker, watch = Worker(threads=threads), Silent()
    fit(trainee, LabelledImages(images, split.training, settings, worker, 0), 0, watch)
    asked = LabelledImages(split.queries_of, split.queries, settings, worker, 0)
    rows, classes = answers(trainee.classifier, asked.centre_crops(500), settings)
    hits = classes == asked.rows.labels[rows]
    return Score.of_hits("finetune_top1", hits, asked.rows.ids[rows]).interval(), watch.scalars


def main() -> None:
    """Runs all combinations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--queries", required=True)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.01, 0.1])
    parser.add_argument("--epochs", type=float, nargs="+", default=[30, 6], help="a fraction each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune", nargs="+", default=["all"])
    parser.add_argument("--scored", type=int, default=0, help="queries; 0: all of them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--only-trained", action="store_true", help="not from random weights")
    parser.add_argument("--fields", nargs="*", default=[], help="finetune.lr=… and such")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    spec = embedder_of(given.model)
    images = open_shards(given.shards)
    queries = open_shards(given.queries, field="evaluate.queries")
    table = defaultdict(list)
    for fraction, epochs in zip(given.fractions, given.epochs, strict=True):
        for seed in range(given.seeds):
            sets = (("data.shards", images), ("evaluate.queries", queries))
            split = split_of(*sets, fraction, seed)
            if given.scored:  # rows of packed and of hub sets may lie in order: spread over them
                chosen = np.linspace(0, len(split.queries) - 1, given.scored).astype(np.int64)
                split = replace(split, queries=split.queries.where(chosen))
            for tune in given.tune:
                for scratch in (False,) if given.only_trained else (False, True):
                    fields = [f"finetune.epochs={epochs}", f"finetune.seed={seed}"]
                    fields += [f"finetune.tune={tune}", f"finetune.from_scratch={scratch}"]
                    config = load([*fields, *given.fields])
                    precision = given.precision
                    settings = settings_of(config, spec, len(split.training), precision)
                    begun = time.perf_counter()
                    result, scalars = scored(settings, spec.load, split, images, given.threads)
                    seconds = time.perf_counter() - begun
                    start = "random" if scratch else "trained"
                    table[fraction, tune, start].append(result.value)
                    print(
                        f"{fraction:g} of the labels ({len(split.training):,}), {tune}, {start}, "
                        f"seed {seed}: {result.value:.4f} [{result.low:.4f}, {result.high:.4f}], "
                        f"training {scalars['finetune/train_top1']:.2f}, {settings.steps} steps, "
                        f"{seconds:.0f} s",
                        flush=True,
                    )
    for (fraction, tune, start), values in table.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        mean = statistics.mean(values)
        print(f"| {fraction:g} | {tune} | {start} | {mean:.3f} ± {spread:.3f} | {len(values)} |")


if __name__ == "__main__":
    main()
