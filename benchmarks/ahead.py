"""What is prepared for a step while the one before it runs: does a thread pay on a CPU, and what do
fixed numbers of masked patches cost.

    python benchmarks/ahead.py cpu [--steps N] [--threads N]
    python benchmarks/ahead.py lengths

`cpu` trains the networks of a recipe on images of noise, with views made between the steps and with
views made on a thread, in turns. `lengths` counts the masked patches of real masks: how many places
a micro batch is filled up to, how often it has more, and what the padding adds to the rows of the
student's heads. No Ray, no files.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipeline.config.load import load
from pipeline.model.groups import parameter_groups
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan, SetFacts, resolve
from pipeline.train import build
from pipeline.train.ahead import Ahead, Between
from pipeline.train.step import train_step
from pipeline.views.batch import Batch
from pipeline.views.masked import usual_length
from pipeline.views.masks import MaskSpec, masks_for
from pipeline.views.photometric import PHOTOMETRIC_DRAWS, draw_photometric

ROOT = Path(__file__).parents[1]
ROUNDS = 5
CPU = torch.device("cpu")
# name, patches a side, images of a micro batch, of the step, local crops
LAYOUTS = [
    ("cifar10, 1 worker", 4, 64, 64, 6),
    ("S/16, 1 GPU, 128 of 128", 14, 128, 128, 8),
    ("S/16, 1 GPU, 128 of 1,024", 14, 128, 1024, 8),
    ("B/14, 8 GPUs, 64 of 2,048", 16, 64, 2048, 8),
    ("L/16, 32 GPUs, 64 of 2,048", 14, 64, 2048, 8),
    ("g/14, 256 GPUs, 12 of 3,072", 16, 12, 3072, 8),
]


def noise(plan: Plan, steps: int) -> Iterator[Batch]:
    """Micro batches that cost nothing to come by, but to be joined of four chunks."""
    rng, augment = np.random.default_rng(0), plan.config.augment
    spec, quarter = build.photometric_spec(plan.config), plan.micro_batch // 4
    for step in range(steps):
        parts = []
        for part in range(4):
            places = np.arange(part * quarter, (part + 1) * quarter)
            colour = rng.random((quarter, 2 + augment.local_crops, PHOTOMETRIC_DRAWS))
            sides = augment.global_size, augment.local_size
            counts = 2, augment.local_crops
            crops = [
                rng.integers(0, 256, (quarter, count, side, side, 3), np.uint8)
                for count, side in zip(counts, sides, strict=True)
            ]
            chunk = {
                "image_ids": np.zeros((quarter, 16), np.uint8),
                "global_crops": crops[0],
                "local_crops": crops[1],
                "photometric": draw_photometric(colour, spec),
                "masks": masks_for(0, step, places, plan.micro_batch, build.mask_spec(plan)),
                "labels": np.zeros(quarter, np.int64),
                "valid": np.ones(quarter, bool),
            }
            parts.append(Batch.from_chunk(chunk))
        yield Batch.concat(parts)


def seconds_a_step(plan: Plan, kind: type[Between] | type[Ahead], batches: list[Batch]) -> float:
    """Mean of the steps after the first two."""
    pair = build.pair(plan.config)
    objective = build.objective(plan.config, pair)
    optimizer = torch.optim.AdamW(parameter_groups(pair.student))
    dtype = torch.bfloat16 if plan.precision == "bfloat16" else None
    images = kind(iter(batches), 1, build.view_maker(plan, pair, CPU))
    begin = 0.0
    for step in range(len(batches)):
        if step == 2:
            begin = time.perf_counter()
        train_step(
            pair.student,
            pair,
            images.next().views(),
            optimizer,
            plan.at(step),
            objective,
            autocast_dtype=dtype,
            generator=torch.Generator().manual_seed(step),
        )
    images.close()
    return (time.perf_counter() - begin) / (len(batches) - 2)


def compare(steps: int, threads: int) -> None:
    """Prints both ways, in turns."""
    torch.set_num_threads(threads)
    config = load([str(ROOT / "configs" / "cifar10.yaml"), "train.workers=1"])
    plan = resolve(config, SetFacts(10_000, "d"), Machine(cpus=2, gpus=0, bfloat16=True))
    batches = list(noise(plan, steps))
    ways: dict[str, type[Between] | type[Ahead]] = {"between": Between, "ahead": Ahead}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, kind in ways.items():
            taken[name].append(seconds_a_step(plan, kind, batches))
    for name, each in taken.items():
        print(
            f"{name:8} {1000 * np.median(each):6.1f} ms a step, "
            f"{1000 * min(each):.1f} to {1000 * max(each):.1f} ({ROUNDS} rounds of {steps} steps)"
        )


def lengths(steps: int = 200) -> None:
    """Prints a line for each layout."""
    print(f"{'':30}  masked     sd  places  more  places  rows of the student's head")
    for name, side, micro, total, local in LAYOUTS:
        spec = MaskSpec((side, side))
        usual = usual_length(micro, total, spec)
        masked = np.array(
            [masks_for(0, step, np.arange(micro), total, spec).sum() for step in range(steps)]
        )
        rows = micro * (2 + local)
        more = 100 * (masked > usual).mean()
        added = 100 * (usual / masked.mean() - 1)
        head = 100 * ((rows + usual) / (rows + masked.mean()) - 1)
        print(
            f"{name:30} {masked.mean():7.0f} {masked.std():6.1f} {usual:7} {more:4.1f}% "
            f"{added:+5.0f}% {head:+5.0f}%"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["cpu", "lengths"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if asked.what == "lengths":
        lengths()
    else:
        compare(asked.steps, asked.threads)
