"""Tries recipes on CIFAR-10, or on the demo's tiles, in a plain loop over `pipeline.api`, one core.

    python benchmarks/recipe_search.py --cifar cifar10/ --run "" --run "temperature=.02 batch=256"
    python benchmarks/recipe_search.py --demo 1 --run "images=12800 batch=64 size=48 eval_sizes=48"

Each `--run` changes fields of `Recipe`, and prints one line: changes, images, core-seconds, k-NN.
A run ends after `seconds` of processor time (evaluation is not counted) or, where `images` is
given, after so many images: schedules follow what part of that is over. Runs are compared on 5,000
images of the training split that nothing is trained on; 5,000 others of it vote. `test=1` asks the
10,000 test images instead, with all 50,000 voting: for the recipe that was chosen, once.
With `--demo SEED` all tiles vote, and the test tiles are asked. The demo itself has seed 0: choose
a recipe by other seeds, which hold out other parts of the photographs. The untrained network and
what needs none are printed first. docs/experiments.md lists what came out.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from recipe_networks import ConvNet, ConvVit
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import api
from pipeline.evaluate.baselines import colour_vectors, pixel_vectors, without_mean
from pipeline.evaluate.features import embed
from pipeline.evaluate.neighbours.knn import knn_classify
from pipeline.pack.demo.tiles import make_demo
from pipeline.train import objective as objective_module
from pipeline.views.batch import crop_major
from pipeline.views.crops import crop_boxes, cut_crops, empty_crops, resize_centre_crop
from pipeline.views.photometric import PHOTOMETRIC_DRAWS, apply_photometric, draw_photometric

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
ASKED, VOTERS = 5000, 5000


@dataclass(frozen=True)
class Recipe:
    """What a run is made of; sizes in pixels, rates for the batch as it is."""

    seconds: float = 150  # of processor time
    images: int = 0  # stop after so many instead
    seed: int = 0
    test: int = 0  # ask the test images with all that vote
    every: float = 0.0  # evaluate after each such part of the run
    # the network
    net: str = "conv"  # or vit
    widths: str = "64-128-256"
    blocks: str = "1-1-1"
    stem_stride: int = 2
    stem_size: int = 3
    feature_norm: int = 1  # BatchNorm at the end of the network
    stem: str = "64-128"  # of a ViT: convolutions of stride 2
    residual: int = 0  # whether the stem's are residual blocks
    width: int = 192
    depth: int = 4
    heads: int = 3
    mlp_ratio: float = 4.0
    layer_scale: float = 1.0
    # the head
    head_norm: int = 1
    input_norm: int = 0  # BatchNorm before the head, which evaluation and KoLeo do not see
    prototypes: int = 1024
    bottleneck: int = 64
    hidden: int = 512
    head_layers: int = 3
    # views
    size: int = 32
    low: str = ""  # "24:.6" trains the first .6 of the run at 24 pixels; "16:.3,24:.6" too
    scale: float = 0.3  # least part of the area in a global crop
    globals: int = 2
    locals: int = 0
    local_size: int = 16
    jitter: float = 0.8  # probability
    strengths: str = ".4-.4-.2-.1"  # of brightness, contrast, saturation, hue
    grey: float = 0.2
    solarize: float = 0.0
    eval_sizes: str = "32"  # the student, and the curve, at the first alone
    # the loss
    temperature: float = 0.04
    temperature_start: float = 0.0  # 0: as at the end
    temperature_warmup: float = 0.3
    student_temperature: float = 0.1
    koleo: float = 0.1
    spread: str = "koleo"
    # the optimiser
    batch: int = 128
    lr: float = 3e-3
    min_lr: float = 1e-6
    warmup: float = 0.05
    decay: float = 0.04
    decay_end: float = 0.1
    momentum: float = 0.99
    momentum_end: float = 1.0
    clip: float = 3.0

    @classmethod
    def of(cls, changes: str) -> Recipe:
        """The defaults with `name=value` changes."""
        kinds = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        pairs = [change.partition("=") for change in changes.split()]
        if unknown := [name for name, _, _ in pairs if name not in kinds]:
            raise SystemExit(f"no field {', '.join(unknown)}; there are {', '.join(kinds)}")
        return cls(**{name: kinds[name](value) for name, _, value in pairs})


class Images:
    """A set in memory: uint8 [N, S, S, 3] and labels, in an order that mixes the classes."""

    def __init__(self, files: list[bytes], labels: list[int]) -> None:
        decoded = [np.array(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
        order = np.random.default_rng(0).permutation(len(files))
        self.pixels = np.stack(decoded)[order]
        self.labels = torch.tensor(labels)[torch.from_numpy(order)]


def cifar(folder: Path, split: str) -> Images:
    tables = [pq.read_table(path) for path in sorted(folder.glob(f"{split}*.parquet"))]
    rows = [row for table in tables for row in table.to_pylist()]
    return Images([row["image"]["bytes"] for row in rows], [row["label"] for row in rows])


def demo(seed: int) -> list[Images]:
    """The demo's tiles and its test tiles, without what is planted among them."""
    sets = []
    with tempfile.TemporaryDirectory() as folder:
        report = make_demo(Path(folder) / "demo", seed)
        for part in ("train", "test"):
            paths = sorted((Path(folder) / "demo" / part).glob("*/tile_*.jpg"))
            labels = [report.class_names.index(path.parent.name) for path in paths]
            sets.append(Images([path.read_bytes() for path in paths], labels))
    return sets


def crops_of(pixels: np.ndarray, rng: np.random.Generator, r: Recipe, size: int) -> list[Tensor]:
    """Views of images, `[B, C, S, S]` each: the global ones, then the local ones; drawn by the
    product's laws and cut and coloured by its functions.
    """
    rounds = (r.globals + 1) // 2
    views: list[Tensor] = []
    local: list[Tensor] = []
    for turn in range(rounds):
        crops = api.CropSpec(
            global_size=size,
            local_size=r.local_size,
            local_crops=0 if turn else r.locals,
            global_scale=(r.scale, 1.0),
            local_scale=(0.05, r.scale),
        )
        brightness, contrast, saturation, hue = (float(x) for x in r.strengths.split("-"))
        colour = api.PhotometricSpec(
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            jitter_probability=r.jitter,
            greyscale_probability=r.grey,
            blur_probability=(0, 0, 0),
            solarize_probability=(0, r.solarize, 0),
            mean=MEAN,
            std=STD,
        )
        count = len(pixels)
        side = np.full(count, pixels.shape[1])
        boxes, flips = crop_boxes(rng.random((count, crops.draws)), side, side, crops)
        large, small = empty_crops(count, crops)
        for row in range(count):
            cut_crops(pixels[row], boxes[row], flips[row], crops, (large[row], small[row]))
        drawn = draw_photometric(rng.random((count, crops.views, PHOTOMETRIC_DRAWS)), colour)
        numbers = torch.from_numpy(drawn)
        for cut, rows, into in ((large, numbers[:, :2], views), (small, numbers[:, 2:], local)):
            if cut.shape[1]:
                x = apply_photometric(crop_major(torch.from_numpy(cut)), crop_major(rows), colour)
                into += x.chunk(cut.shape[1])
    return views[: r.globals] + local


def network(r: Recipe) -> nn.Module:
    if r.net == "vit":
        stem = [int(x) for x in r.stem.split("-")]
        shape = (r.width, r.depth, r.heads, r.mlp_ratio, r.layer_scale)
        side = r.size // 2 ** len(stem)
        return ConvVit(stem, *shape, side, bool(r.feature_norm), bool(r.residual))
    return ConvNet(
        [int(x) for x in r.widths.split("-")],
        [int(x) for x in r.blocks.split("-")],
        r.stem_stride,
        r.stem_size,
        bool(r.feature_norm),
    )


def pair_for(r: Recipe) -> api.Pair:
    torch.manual_seed(r.seed)
    net = network(r)
    backbone = api.ModuleBackbone(net, net.width)
    norms = ["batch" if wanted else "none" for wanted in (r.head_norm, r.input_norm)]
    sizes = (r.prototypes, r.bottleneck, r.hidden, r.head_layers)
    head = api.HeadSpec(*sizes, norm=norms[0], input_norm=norms[1]).build(net.width)
    return api.pair_of(api.Encoder(backbone, head, None))


def side_at(r: Recipe, done: float) -> int:
    """Pixels of a global crop when `done` of the run is over."""
    for stage in filter(None, r.low.split(",")):
        side, _, until = stage.partition(":")
        if done < float(until):
            return int(side)
    return r.size


def values_at(r: Recipe, done: float) -> api.StepValues:
    """Rates when `done` of the run is over, by the product's schedules over 10,000 steps."""
    step = int(done * 10000)
    lr = api.cosine(step, r.lr, r.min_lr, 10000, warmup=int(r.warmup * 10000))
    return api.StepValues(
        lr=max(lr, r.lr * 1e-3),
        weight_decay=api.cosine(step, r.decay, r.decay_end, 10000),
        teacher_momentum=api.cosine(step, r.momentum, r.momentum_end, 10000),
        teacher_temperature=api.linear(
            step,
            r.temperature_start or r.temperature,
            r.temperature,
            int(r.temperature_warmup * 10000),
        ),
        last_layer_lr=lr,
    )


def knn(net: nn.Module, sets: list[tuple[np.ndarray, Tensor]], side: int) -> float:
    """k-NN of the second set by the first, with the product's evaluation transform."""
    features = []
    for pixels, labels in sets:
        small = (
            np.stack([resize_centre_crop(image, side) for image in pixels[i : i + 250]])
            for i in range(0, len(pixels), 250)
        )
        rows = embed(net, small, MEAN, STD, dtype=torch.bfloat16)
        features.append(api.LabelledFeatures(rows, labels))
    return knn_classify(*features, 20)[20]


def without_network(train_set: Images, test_set: Images, side: int) -> str:
    """k-NN of small pixels and of colours at the side that networks are evaluated at."""
    vectors = []
    for one in (train_set, test_set):
        small = np.stack([resize_centre_crop(image, side) for image in one.pixels])
        vectors.append([pixel_vectors(small), colour_vectors(small)])
    pixels = without_mean(vectors[0][0], vectors[1][0])
    colours = (vectors[0][1], vectors[1][1])
    labels = (train_set.labels, test_set.labels)
    said = []
    for name, pair in (("raw pixels", pixels), ("colours", colours)):
        sets = [api.LabelledFeatures(x, y) for x, y in zip(pair, labels, strict=True)]
        said.append(f"{name} {knn_classify(*sets, 20)[20]:.4f}")
    return ", ".join(said)


def train(r: Recipe, train_set: Images, test_set: Images) -> str:
    pair = pair_for(r)
    objective_module.koleo = SPREADS[r.spread]
    spec = api.ObjectiveSpec(
        ibot_weight=0.0,
        koleo_weight=r.koleo,
        student_temperature=r.student_temperature,
        centring="sinkhorn",
        clip=r.clip,
    )
    objective = api.Objective.for_pair(spec, pair)
    groups = api.parameter_groups(pair.student, 1.0, 1.0)
    optimizer = torch.optim.AdamW(groups, fused=True)
    rng = np.random.default_rng(r.seed)
    pixels, labels = train_set.pixels, train_set.labels
    if r.test:
        sets = [(pixels, labels), (test_set.pixels, test_set.labels)]
    else:
        sets = [
            (pixels[ASKED : ASKED + VOTERS], labels[ASKED : ASKED + VOTERS]),
            (pixels[:ASKED], labels[:ASKED]),
        ]
    first_side = int(r.eval_sizes.split("-")[0])
    queue = np.zeros(0, np.int64)
    seen, spent, curve, last = 0, 0.0, [], {}
    while (done := seen / r.images if r.images else spent / r.seconds) < 1:
        if r.every and done >= r.every * (len(curve) + 1):
            curve.append(f"{knn(pair.teacher.backbone, sets, first_side):.4f}")
        began = time.process_time()
        if len(queue) < r.batch:
            first = 0 if r.test else ASKED
            queue = np.concatenate([queue, first + rng.permutation(len(pixels) - first)])
        rows, queue = queue[: r.batch], queue[r.batch :]
        size = side_at(r, done)
        views = crops_of(pixels[rows], rng, r, size)
        views = api.Views.of(views[: r.globals], views[r.globals :])
        result = api.train_step(
            pair.student,
            pair,
            [views],
            optimizer,
            values_at(r, done),
            objective,
            autocast_dtype=torch.bfloat16,
        )
        last = result.scalars
        seen += r.batch
        spent += time.process_time() - began
    scores = [f"{knn(pair.teacher.backbone, sets, int(s)):.4f}" for s in r.eval_sizes.split("-")]
    student = knn(pair.student.backbone, sets, first_side)
    tail = " ".join(f"{k.split('/')[1]} {float(v):.3f}" for k, v in last.items() if "norm" not in k)
    cost = f"{seen} images {spent:.0f} s {1000 * spent / seen:.2f} ms/image"
    quality = f"k-NN {' '.join(scores)} (student {student:.4f}) curve {' '.join(curve) or '-'}"
    return f"{cost} {quality} [{tail}]"


def uniformity(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Log of the mean Gaussian potential of pairs, t = 2 (Wang and Isola 2020, section 4.1.2)."""
    x = F.normalize(x.float(), dim=-1)
    return torch.pdist(x).square().mul(-2).exp().mean().log()


def coding_rate(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Minus the rate to code the rows with a mean error of .5 (Yu et al. 2020; SimDINO 2025)."""
    x = F.normalize(x.float(), dim=-1)
    rows, width = x.shape
    identity = torch.eye(width)
    return -0.5 * torch.logdet(identity + width / (rows * 0.25) * (x.T @ x))


def kernel_density(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean log density at the rows, by a von Mises-Fisher kernel of concentration 5 over the others
    (Virchow2, Zimmermann et al. 2024, in place of KoLeo).
    """
    x = F.normalize(x.float(), dim=-1)
    others = (5 * x @ x.T).fill_diagonal_(-torch.inf)
    return others.logsumexp(1).mean() - math.log(len(x) - 1)


SPREADS = {
    "koleo": api.koleo,
    "kde": kernel_density,
    "uniformity": uniformity,
    "coding": coding_rate,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cifar", type=Path, help="folder of the parquet files")
    what.add_argument("--demo", type=int, metavar="SEED", help="the demo's tiles of this seed")
    parser.add_argument("--run", action="append", required=True, help="name=value changes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    test = "test=1 " if arguments.cifar is None else ""
    if arguments.cifar is None:
        splits = demo(arguments.demo)
    else:
        splits = [cifar(arguments.cifar, split) for split in ("train", "test")]
    for changes in arguments.run:
        recipe = Recipe.of(test + changes)
        if test:
            side = int(recipe.eval_sizes.split("-")[0])
            sets = [(split.pixels, split.labels) for split in splits]
            start = knn(pair_for(recipe).teacher.backbone, sets, side)
            print(f"at {side}: untrained {start:.4f}, {without_network(*splits, side)}", flush=True)
        print(f"{changes or 'base'}: {train(recipe, *splits)}", flush=True)


if __name__ == "__main__":
    main()
