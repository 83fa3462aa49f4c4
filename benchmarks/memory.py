"""Memory of a training worker on a CPU: what the plan says, and what steps take.

    python benchmarks/memory.py [--steps N]

Each recipe runs in a process of its own: one worker's network and micro batch, with other masks in
each step. Measured is the peak of the process's own memory above that of the process before it had
a network; a thread looks 200 times a second. No Ray, and images of noise: they cost nothing here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import torch

from pipeline import api
from pipeline.config.load import load
from pipeline.plan.layout import Machine
from pipeline.plan.plan import SetFacts, resolve
from pipeline.train import build, estimate

ROOT = Path(__file__).parents[1]
MIB = 2**20
CASES = [
    (recipe, batch, precision)
    for recipe, batches in (("demo", (16, 64, 128)), ("cifar10", (16, 64)), ("vits14", (8,)))
    for batch in batches
    for precision in ("float32", "bfloat16")
]


def used() -> float:
    """MiB of this process that are its own."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return next(int(x.split()[1]) for x in text.splitlines() if x.startswith("Anonymous")) / 1024


def measure(recipe: str, batch: int, precision: str, steps: int) -> None:
    """Prints a row of the table."""
    torch.set_num_threads(1)
    workers = 1 if recipe == "vits14" else 2
    config = load([
        str(ROOT / "configs" / f"{recipe}.yaml"), "train.device=cpu", "model.init=",
        f"train.workers={workers}", "train.accumulation=1",
        f"optim.global_batch_size={batch}", f"train.precision={precision}",
    ])  # fmt: skip
    machine = Machine(cpus=2, gpus=0, bfloat16=True)
    plan = resolve(config, SetFacts(10000, "d"), machine=machine)
    before, peaks, ended = used(), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            peaks.append(max(peaks[-1], used()))

    threading.Thread(target=watch, daemon=True).start()
    pair = build.pair(config)
    objective = build.objective(config, pair)
    optimizer = torch.optim.AdamW(api.parameter_groups(pair.student))
    images, crops, augment = plan.micro_batch, config.augment.local_crops, config.augment
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    for step in range(steps):
        masks = api.masks_for(0, step, np.arange(images), 2 * images, api.MaskSpec(plan.grid))
        masks = np.ascontiguousarray(np.swapaxes(masks, 0, 1).reshape(2 * images, -1))
        views = api.Views(
            torch.randn(2 * images, 3, *[augment.global_size] * 2),
            torch.randn(crops * images, 3, *[augment.local_size] * 2),
            torch.from_numpy(masks),
            images=images,
        )
        api.train_step(
            pair.student, pair, [views], optimizer, plan.at(step), objective, autocast_dtype=dtype
        )
    ended.set()
    peak, said = peaks[-1] - before, estimate.estimated_cost(plan, pair).memory_bytes / MIB
    print(f"| {recipe} | {images} | {precision} | {said:.0f} | {peak:.0f} | {said / peak:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    if options.case is not None:
        measure(*CASES[options.case], options.steps)
        return
    print("| recipe | images | precision | the plan, MiB | measured, MiB | ratio |")
    print("|---" * 6 + "|", flush=True)
    for number in range(len(CASES)):
        command = [sys.executable, __file__, f"--case={number}", f"--steps={options.steps}"]
        subprocess.run(command, check=True, cwd=ROOT, timeout=600)


if __name__ == "__main__":
    main()
