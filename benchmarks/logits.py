"""Scores of prototypes in bfloat16 or in float32: what targets lose, and what a network learns.

    python benchmarks/logits.py --cifar cifar10/ [--steps 250] [--seeds 2]

Small networks learn from the same crops in the same order, with the losses of configs/cifar10.yaml,
under bfloat16 autocast; only `train.logits` differs. Then k-NN-20 of 2,000 test images by 8,000
training images. Targets of the teacher's float32 logits are compared with those of the same logits
rounded to bfloat16.
"""

from __future__ import annotations

import argparse
import io
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.loss.target import sinkhorn_targets, softmax_targets
from pipeline.model.groups import parameter_groups
from pipeline.model.pair import HeadSpec, Pair, build_pair
from pipeline.model.vit import BackboneSpec
from pipeline.schedule import StepValues
from pipeline.train.step import Objective, ObjectiveSpec, train_step
from pipeline.views.batch import Views
from pipeline.views.masks import MaskSpec, masks_for

IMAGES, TRAINING, TEST, LOCAL = 64, 8000, 2000, 4
BACKBONE = BackboneSpec(
    image_size=32, patch_size=8, width=96, depth=4, heads=3, registers=1, layer_scale=0.1
)
HEAD = HeadSpec(prototypes=1024, bottleneck=64, hidden=256)


def load(folder: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Images of all classes, normalised, and their labels."""
    tables = [pq.read_table(path) for path in sorted(folder.glob(f"{split}*.parquet"))]
    rows = [(row["image"]["bytes"], row["label"]) for t in tables for row in t.to_pylist()]
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    pixels = [np.asarray(Image.open(io.BytesIO(rows[i][0])).convert("RGB")) for i in chosen]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return (x - 0.45) / 0.25, torch.tensor([rows[i][1] for i in chosen])


def crops(x: Tensor, side: int, scale: tuple[float, float], g: torch.Generator) -> Tensor:
    """A crop of each image, mirrored in half of the cases, with another brightness."""
    n = len(x)
    half = torch.empty(n).uniform_(*scale, generator=g).sqrt()
    centre = (torch.rand(n, 2, generator=g) * 2 - 1) * (1 - half)[:, None]
    flip = half * (1 - 2 * (torch.rand(n, generator=g) < 0.5).float())
    zero = torch.zeros(n)
    theta = torch.stack([flip, zero, centre[:, 0], zero, half, centre[:, 1]], dim=1)
    grid = F.affine_grid(theta.view(n, 2, 3), [n, 3, side, side], align_corners=False)
    view = F.grid_sample(x, grid, align_corners=False, padding_mode="reflection")
    return view * torch.empty(n, 1, 1, 1).uniform_(0.6, 1.4, generator=g)


def views_at(step: int, x: Tensor) -> Views:
    g = torch.Generator().manual_seed(step)
    chosen = x[torch.randint(len(x), (IMAGES,), generator=g)]
    globals_ = [crops(chosen, 32, (0.4, 1.0), g) for _ in range(2)]
    locals_ = [crops(chosen, 16, (0.15, 0.5), g) for _ in range(LOCAL)]
    masks = masks_for(0, step, np.arange(IMAGES), IMAGES, MaskSpec((4, 4), 0.5, (0.1, 0.5)))
    hidden = torch.from_numpy(np.ascontiguousarray(masks.swapaxes(0, 1))).flatten(0, 1)
    return Views.of(globals_, locals_, hidden)


def learned(x: Tensor, centring: str, float32: bool, steps: int, seed: int) -> tuple[Pair, float]:
    """The pair after so many steps, and the mean loss of the last fifty."""
    pair = build_pair(BACKBONE, replace(HEAD, float32=float32), None, seed)
    objective = Objective.for_pair(ObjectiveSpec(centring=centring), pair)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(parameter_groups(pair.student))
    losses = []
    for step in range(steps):
        lr = 5e-4 * min(1.0, (step + 1) / 25)
        result = train_step(
            pair.student, pair, [views_at(1000 * seed + step, x)], optimizer,
            StepValues(lr, 0.04, 0.98, 0.04, lr), objective, autocast_dtype=torch.bfloat16,
        )  # fmt: skip
        losses.append(float(result.scalars["loss/total"]))
    return pair, float(np.mean(losses[-50:]))


@torch.no_grad()
def accuracy(pair: Pair, training: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """k-NN-20, a plain vote."""

    def vectors(x: Tensor) -> Tensor:
        parts = [pair.teacher(part).cls for part in x.split(500)]
        return F.normalize(torch.cat(parts), dim=1)

    nearest = (vectors(test[0]) @ vectors(training[0]).T).topk(20, dim=1).indices
    votes = F.one_hot(training[1][nearest], 10).sum(dim=1)
    return float((votes.argmax(dim=1) == test[1]).float().mean())


@torch.no_grad()
def rounding(pair: Pair, x: Tensor, centring: str) -> str:
    """Targets of float32 logits of the teacher against those of the same logits in bfloat16."""
    logits = torch.cat([pair.teacher(part).dino for part in x[:1024].split(256)])
    said = []
    for temperature in (0.04, 0.07):

        def targets(x: Tensor, temperature: float = temperature) -> Tensor:
            if centring == "sinkhorn":
                return sinkhorn_targets([x], temperature)[0].probabilities()
            return softmax_targets([x], logits.mean(dim=0), temperature)[0].probabilities()

        exact, rounded = targets(logits), targets(logits.bfloat16())
        divergence = (exact * (exact.clamp(min=1e-30) / rounded.clamp(min=1e-30)).log()).sum(dim=1)
        entropy = -(exact * exact.clamp(min=1e-30).log()).sum(dim=1)
        same = (exact.argmax(dim=1) == rounded.argmax(dim=1)).float().mean()
        said.append(
            f"temperature {temperature}: entropy {entropy.mean():.2f}, KL mean "
            f"{divergence.mean():.1e} max {divergence.max():.1e}, same prototype {same:.3f}"
        )
    return f"logits to {logits.abs().max():.2f}; " + "; ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    training = load(options.cifar, "train", TRAINING)
    test = load(options.cifar, "test", TEST)
    for seed in range(options.seeds):
        for centring in ("sinkhorn", "softmax"):
            for float32 in (False, True):
                start = time.monotonic()
                pair, loss = learned(training[0], centring, float32, options.steps, seed)
                score = accuracy(pair, training, test)
                print(
                    f"{centring} logits {'float32' if float32 else 'bfloat16'} seed {seed}: "
                    f"loss {loss:.4f}, k-NN {score:.4f}, {time.monotonic() - start:.0f} s",
                    flush=True,
                )
            print("   ", rounding(pair, test[0], centring), flush=True)


if __name__ == "__main__":
    main()
