"""What adapting a part of the weights is worth: k-NN on other images, and what it takes.

    python benchmarks/tune.py --cifar cifar10/ [--seeds 0 1 2] [--steps 300] [--first 600]

A ViT of 128 x 6 with patches of 8 learns from six classes of CIFAR-10 (A). Its exported backbone,
without heads, is `model.init` of runs on the other four classes with other colours (B): channels in
another order, and negative. The networks, rates and steps are those of a run; only the crops are
made here. Each run of a seed sees the same crops in the same order. k-NN-20 of 4,000 test images of
B by 8,000 others, and of 3,000 of A by 6,000 for what is forgotten.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.load import load
from pipeline.model.low_rank import merge_low_rank
from pipeline.model.weights import save_backbone
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan, SetFacts, resolve
from pipeline.train import build, start
from pipeline.train.step import train_step
from pipeline.train.tune.share import share
from pipeline.views.batch import Views
from pipeline.views.masks import MaskSpec, masks_for

BATCH = 64
A, B = (0, 1, 2, 3, 4, 5), (6, 7, 8, 9)
RECIPE = [
    "augment.global_size=32", "augment.local_size=16", "augment.local_crops=2",
    "model.width=128", "model.depth=6", "model.heads=4", "model.patch_size=8",
    "model.registers=1", "model.layer_scale=0.1", "model.drop_path=0",
    "head.prototypes=256", "head.bottleneck=32", "head.hidden=128",
    "loss.centring=sinkhorn", "teacher.momentum=0.98", "teacher.temperature_end=0.04",
    f"optim.global_batch_size={BATCH}", "optim.lr_scaling=none", "optim.weight_decay_end=0.1",
    "train.workers=1", "train.precision=bfloat16", "train.compile=false",
]  # fmt: skip
# rate of each way of tuning, and its layerwise decay; not searched
WAYS = {
    "all": (5e-4, 0.9),
    "lora(rank=4)": (2e-3, 1.0),
    "lora(rank=8)": (2e-3, 1.0),
    "lora(rank=16)": (2e-3, 1.0),
    "last_blocks=2": (5e-4, 0.9),
    "heads": (5e-4, 0.9),
}


@dataclass(frozen=True)
class Set:
    """Images in 0 to 1, `[N, 3, 32, 32]`, and their classes."""

    x: Tensor
    labels: Tensor

    def first(self, count: int) -> Set:
        return Set(self.x[:count], self.labels[:count])


def read(folder: Path, split: str, classes: tuple[int, ...], other_colours: bool) -> Set:
    """All images of some classes, in an order that is always the same."""
    tables = [pq.read_table(path) for path in sorted(folder.glob(f"{split}*.parquet"))]
    every = [row for table in tables for row in table.to_pylist() if row["label"] in classes]
    order = np.random.default_rng(0).permutation(len(every))
    rows = [every[i] for i in order]
    pixels = [np.asarray(Image.open(io.BytesIO(r["image"]["bytes"])).convert("RGB")) for r in rows]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    if other_colours:
        x = 1 - x[:, [1, 2, 0]]
    return Set(x, torch.tensor([row["label"] for row in rows]))


def normalised(x: Tensor) -> Tensor:
    return (x - 0.45) / 0.25


def crops(x: Tensor, side: int, scale: tuple[float, float], g: torch.Generator) -> Tensor:
    """A crop of each image, mirrored in half of the cases, with another brightness and contrast,
    and grey in a fifth.
    """
    n = len(x)
    half = torch.empty(n).uniform_(*scale, generator=g).sqrt()
    centre = (torch.rand(n, 2, generator=g) * 2 - 1) * (1 - half)[:, None]
    flip = half * (1 - 2 * (torch.rand(n, generator=g) < 0.5).float())
    zero = torch.zeros(n)
    theta = torch.stack([flip, zero, centre[:, 0], zero, half, centre[:, 1]], dim=1)
    grid = F.affine_grid(theta.view(n, 2, 3), [n, 3, side, side], align_corners=False)
    view = F.grid_sample(x, grid, align_corners=False, padding_mode="reflection")
    mean = view.mean((1, 2, 3), keepdim=True)
    view = mean + (view - mean) * torch.empty(n, 1, 1, 1).uniform_(0.6, 1.4, generator=g)
    view = view * torch.empty(n, 3, 1, 1).uniform_(0.7, 1.3, generator=g)
    grey = torch.rand(n, 1, 1, 1, generator=g) < 0.2
    return torch.where(grey, view.mean(1, keepdim=True), view)


def views_at(step: int, seed: int, images: Set) -> Views:
    g = torch.Generator().manual_seed(1_000_000 * seed + step)
    chosen = normalised(images.x[torch.randint(len(images.x), (BATCH,), generator=g)])
    globals_ = [crops(chosen, 32, (0.3, 1.0), g) for _ in range(2)]
    locals_ = [crops(chosen, 16, (0.1, 0.4), g) for _ in range(2)]
    masks = masks_for(seed, step, np.arange(BATCH), BATCH, MaskSpec((4, 4), 0.5, (0.1, 0.5)))
    hidden = torch.from_numpy(np.ascontiguousarray(masks.swapaxes(0, 1))).flatten(0, 1)
    return Views.of(globals_, locals_, hidden)


def planned(*fields: str) -> Plan:
    config = load([*RECIPE, *fields])
    machine = Machine(cpus=2, gpus=0, bfloat16=True)
    return start.located(resolve(config, SetFacts(20_000, "cifar"), machine=machine), None)


def trained(plan: Plan, images: Set) -> tuple[start.TrainState, float]:
    """A run of a plan, and the CPU seconds of its steps."""
    layout = build.layout(plan, torch.device("cpu"))
    state = start.train_state(plan, start.networks(plan, resumed=False), layout, resumed=False)
    begin = time.process_time()
    for step in range(plan.steps):
        seen = views_at(step, plan.config.run.seed, images)
        train_step(
            state.pair.student, state.pair, [seen], state.optimizer, plan.at(step),
            state.objective, autocast_dtype=torch.bfloat16,
        )  # fmt: skip
    return state, time.process_time() - begin


@torch.no_grad()
def accuracy(backbone: nn.Module, voters: Set, asked: Set) -> float:
    """k-NN-20, a plain vote."""

    def vectors(x: Tensor) -> Tensor:
        return F.normalize(torch.cat([backbone(normalised(part)) for part in x.split(500)]), dim=1)

    nearest = (vectors(asked.x) @ vectors(voters.x).T).topk(20, dim=1).indices
    votes = F.one_hot(voters.labels[nearest], 10).sum(dim=1)
    return float((votes.argmax(dim=1) == asked.labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--first", type=int, default=600, help="steps on A")
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--lr", type=float, help="instead of that of each way")
    parser.add_argument("--decay", type=float, help="layerwise, instead of that of each way")
    options = parser.parse_args()
    torch.set_num_threads(1)
    a, b = (
        {split: read(options.cifar, split, classes, other) for split in ("train", "test")}
        for classes, other in ((A, False), (B, True))
    )

    def scores(backbone: nn.Module) -> str:
        backbone.eval()
        on_b = accuracy(backbone, b["train"].first(8000), b["test"])
        on_a = accuracy(backbone, a["train"].first(6000), a["test"].first(3000))
        return f"B {on_b:.4f} A {on_a:.4f}"

    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            plan = planned(f"optim.steps={options.first}", "optim.lr=1e-3", f"run.seed={seed}")
            first, _ = trained(plan, a["train"])
            backbone = first.pair.teacher.backbone
            print(f"seed {seed} start          {scores(backbone)}", flush=True)
            save_backbone(backbone, build.backbone_spec(plan.config), folder)
            for way in options.ways:
                lr, decay = WAYS[way]
                plan = planned(
                    f"optim.steps={options.steps}", f"optim.lr={options.lr or lr}",
                    f"optim.layerwise_decay={options.decay or decay}", f"run.seed={100 + seed}",
                    f"model.init={folder}", f"train.tune={way}",
                    f"train.freeze_backbone_steps={options.steps // 10}",
                )  # fmt: skip
                state, seconds = trained(plan, b["train"])
                of = share(state.pair)
                merge_low_rank(state.pair.teacher.backbone)
                print(
                    f"seed {seed} {way:14} {scores(state.pair.teacher.backbone)} lr "
                    f"{options.lr or lr:g} decay {options.decay or decay:g}: backbone "
                    f"{of.backbone / of.backbone_of_all:.3f}, with heads "
                    f"{of.every / of.every_of_all:.3f} of the weights, optimizer "
                    f"{of.optimizer / 1024:.0f} of {of.optimizer_of_all / 1024:.0f} KiB, "
                    f"checkpoint {of.checkpoint / 1024:.0f} of {of.checkpoint_of_all / 1024:.0f} "
                    f"KiB; {1000 * seconds / options.steps:.0f} CPU ms a step",
                    flush=True,
                )


if __name__ == "__main__":
    main()
