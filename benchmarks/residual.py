"""What types below float32 do to learning: tokens between blocks, sums of gradients, logits.

    python benchmarks/residual.py

Trains a small network on tiles of photographs, several times from the same weights on the same
images, and prints loss, the norm of LayerScale, and k-NN of the test tiles. One process; the sum of
gradients of one worker is rounded as two workers would round theirs before they add them up.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.model.groups import parameter_groups
from pipeline.model.pair import HeadSpec, build_pair
from pipeline.model.vit import BackboneSpec
from pipeline.pack.demo.tiles import _cut, _photographs, _test_blocks, _train_boxes
from pipeline.schedule import StepValues
from pipeline.train.objective import Objective, ObjectiveSpec
from pipeline.train.parallel.strategy import Layout, prepare
from pipeline.train.step import train_step
from pipeline.views.batch import Views

HALF = torch.bfloat16
TILE, WHOLE, LOCAL, PATCH, CROPS = 30, 24, 12, 6, 4
K = 20


@dataclass(frozen=True)
class Case:
    layer_scale: float
    residual: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32


CASES = {
    "LayerScale 0.1": Case(0.1),
    "LayerScale 0.1, residual bfloat16": Case(0.1, residual=HALF),
    "LayerScale 0.1, reduce bfloat16": Case(0.1, reduce=HALF),
    "LayerScale 1e-5": Case(1e-5),
    "LayerScale 1e-5, residual bfloat16": Case(1e-5, residual=HALF),
}


def tiles() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train and test tiles as float [N, 3, 30, 30] around 0, with the photograph as label."""
    rng = random.Random(0)
    sets: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    for label, photo in enumerate(_photographs().values()):
        blocks = _test_blocks(photo, rng)
        for part, boxes in enumerate((_train_boxes(photo, blocks, rng)[:80], blocks * 8)):
            for left, top, side in boxes:
                if part:  # a random part of a test block
                    inner = side * 2 // 3
                    left += rng.randrange(side - inner)
                    top, side = top + rng.randrange(side - inner), inner
                tile = _cut(photo, (left, top, side)).convert("RGB").resize((TILE, TILE))
                sets[part].append(np.asarray(tile))
                labels[part].append(label)
    pixels = [torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2).float() / 64 - 2 for x in sets]
    return pixels[0], torch.tensor(labels[0]), pixels[1], torch.tensor(labels[1])


def crops(images: Tensor, side: int, scale: tuple[float, float], g: torch.Generator) -> Tensor:
    """One random square of each image, perhaps mirrored, brighter or darker, at `side` pixels."""
    count = len(images)
    size = torch.empty(count).uniform_(*scale, generator=g).sqrt()
    at = (torch.rand(count, 2, generator=g) * 2 - 1) * (1 - size)[:, None]
    mirrored = torch.where(torch.rand(count, generator=g) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = size * mirrored, size, at
    grid = F.affine_grid(theta, [count, 3, side, side], align_corners=False)
    out = F.grid_sample(images, grid, align_corners=False, padding_mode="reflection")
    return out * torch.empty(count, 3, 1, 1).uniform_(0.7, 1.3, generator=g)


def batch(images: Tensor, step: int, size: int) -> Views:
    g = torch.Generator().manual_seed(step)
    chosen = images[torch.randperm(len(images), generator=g)[:size]]
    whole = torch.cat([crops(chosen, WHOLE, (0.32, 1.0), g) for _ in range(2)])
    local = torch.cat([crops(chosen, LOCAL, (0.05, 0.32), g) for _ in range(CROPS)])
    patches = (WHOLE // PATCH) ** 2
    masks = torch.rand(2 * size, patches, generator=g) < 0.3
    masks[size:] = False
    return Views(whole, local, masks, size)


def run(case: Case, data: tuple[Tensor, ...], steps: int, size: int, seed: int) -> dict[str, float]:
    images, labels, test, test_labels = data
    spec = BackboneSpec(WHOLE, PATCH, 96, 8, 3, registers=1, layer_scale=case.layer_scale)
    pair = build_pair(spec, HeadSpec(256, 64, 256), None, seed)
    layout = Layout(1, torch.device("cpu"), precision=HALF, residual=case.residual)
    prepare(pair, layout)
    if case.reduce == HALF:
        for parameter in pair.student.parameters():
            parameter.register_hook(lambda grad: grad.to(HALF).float())
    objective = Objective.for_pair(ObjectiveSpec(centring="sinkhorn"), pair)
    optimizer = torch.optim.AdamW(parameter_groups(pair.student, 1.0, 1.0), lr=0.0)
    losses = []
    for step in range(steps):
        lr = 1e-3 * min(1.0, (step + 1) / (steps / 10))
        values = StepValues(lr, 0.04, 0.98, 0.04, lr)
        views = batch(images, 1000 * seed + step, size)
        result = train_step(
            pair.student, pair, [views], optimizer, values, objective, autocast_dtype=HALF
        )
        losses.append(float(result.scalars["loss/total"]))
    gamma = torch.cat([block.ls2.gamma.detach() for block in pair.student.backbone.blocks])
    with torch.no_grad():
        features = [F.normalize(pair.teacher.backbone(x), dim=-1) for x in (images, test)]
    near = (features[1] @ features[0].T).topk(K).indices
    votes = F.one_hot(labels[near], 16).sum(1).argmax(1)
    return {
        "loss": sum(losses[-10:]) / 10,
        "|gamma|": float(gamma.abs().mean()),
        "k-NN": float((votes == test_labels).float().mean()),
    }


def lost(layer_scale: float) -> float:
    """Share of the numbers between blocks that a block of a fresh network changes in bfloat16."""
    spec = BackboneSpec(224, 16, 384, 12, 6, layer_scale=layer_scale)
    network = build_pair(spec, HeadSpec(8, 8, 8, 1), None, 0).teacher.backbone
    changed: list[float] = []
    for block in network.blocks:
        block.register_forward_hook(
            lambda _, inputs, out: changed.append(float((inputs[0] != out).float().mean()))
        )
    network.residual = HALF
    with torch.no_grad(), torch.autocast("cpu", dtype=HALF):
        network(torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    return sum(changed) / len(changed)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for scale in (1e-5, 1e-2, 0.1, 1.0):
        print(f"LayerScale {scale:g}: a fresh block changes {lost(scale):.1%} of the numbers")
    data = tiles()
    print(f"{len(data[0])} tiles, {len(data[2])} test tiles")
    for name in arguments.only:
        begin = time.perf_counter()
        said = run(CASES[name], data, arguments.steps, arguments.images, arguments.seed)
        numbers = ", ".join(f"{key} {value:.3g}" for key, value in said.items())
        print(f"{name}: {numbers} ({time.perf_counter() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
