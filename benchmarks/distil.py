"""Distillation without heads against self-distillation: steps to 95 % of the teacher's k-NN.

    python benchmarks/distil.py CIFAR10 [--seeds 3] [--steps 600] [--teacher-steps 900]

CIFAR10 holds the hub's parquet files. A residual network learns with our own objective and is
exported; a narrower one learns from these weights (`api.feature_teacher`), and the same narrower
one alone by self-distillation, with the same images, crops, batches, rates and steps. One process,
through `pipeline.api`. k-NN with k = 20 of the moving average: 5,000 training images vote, 2,000
test images are asked. Prints one JSON line for each point, and a summary.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline import api
from pipeline.evaluate.deciding import deciding_score
from pipeline.evaluate.features import embed
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.encoders.module import ModuleSpec
from pipeline.model.encoders.residual import Residual
from pipeline.model.encoders.source import Name, read_source
from pipeline.model.foreign_weights import save_module

TEACHER = "pipeline.model.encoders.residual:small"
MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
COLOUR = api.PhotometricSpec(
    jitter_probability=0.8,
    greyscale_probability=0.2,
    blur_probability=(0.0, 0.0, 0.0),
    solarize_probability=(0.0, 0.0, 0.0),
    mean=MEAN,
    std=STD,
)
HEAD = api.HeadSpec(1024, 64, 512, norm="batch", input_norm="batch")
ALONE = api.ObjectiveSpec(ibot_weight=0.0, centring="sinkhorn")
VOTERS, ASKED, BATCH = 5_000, 2_000, 128
LR, WARMUP, DECAY, TEMPERATURE = 3e-3, 0.05, (0.04, 0.1), 0.04
SHARE = 0.95  # of the teacher's k-NN


class Images:
    """Part of CIFAR-10 in memory: uint8 pictures and labels."""

    def __init__(self, folder: Path, images: int, half: bool, side: int) -> None:
        self.dtype = torch.bfloat16 if half else torch.float32
        self.crops = api.CropSpec(global_size=side, local_crops=0, global_scale=(0.3, 1.0))
        self.train, labels = _read(sorted(folder.glob("train*.parquet")), images)
        self.asked, asked_labels = _read(sorted(folder.glob("test*.parquet")), ASKED)
        self.voters, self.labels = self.train[:VOTERS], (labels[:VOTERS], asked_labels)

    def views(self, step: int, seed: int) -> api.Views:
        """A batch of a step: pictures without one twice in a pass, and their crops."""
        per_pass = len(self.train) // BATCH
        number, place = divmod(step, per_pass)
        order = np.random.default_rng([seed, number]).permutation(len(self.train))
        chosen = [self.train[i] for i in order[place * BATCH : (place + 1) * BATCH]]
        return api.multi_crop(chosen, self.crops, COLOUR, seed=seed, pass_index=number)

    def knn(self, backbone: torch.nn.Module) -> float:
        """k-NN-20 top-1 of a backbone."""
        sets = []
        for part, labels in zip((self.voters, self.asked), self.labels, strict=True):
            batches = (np.stack(part[i : i + 250]) for i in range(0, len(part), 250))
            features = embed(backbone, batches, MEAN, STD, dtype=self.dtype)
            ids = [hashlib.blake2b(pixels.tobytes(), digest_size=16).digest() for pixels in part]
            rows = np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 16)
            sets.append(api.LabelledFeatures(features, torch.from_numpy(labels), rows))
        return float(deciding_score("knn20_top1", *sets, 0.07))


def _read(files: list[Path], count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The first so many pictures of each file's share, in an order mixed by a fixed seed."""
    tables = [pq.read_table(file) for file in files]
    rows = [(t, i) for t in range(len(tables)) for i in range(tables[t].num_rows)]
    picked = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:count]]
    label = next(name for name in tables[0].column_names if "label" in name)
    image = next(name for name in tables[0].column_names if name in ("img", "image"))
    pictures, labels = [], []
    for table, row in picked:
        encoded = tables[table][image][row].as_py()
        encoded = encoded["bytes"] if isinstance(encoded, dict) else encoded
        pictures.append(np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")))
        labels.append(tables[table][label][row].as_py())
    return pictures, np.asarray(labels, np.int64)


def learn(
    images: Images, pair: api.Pair, spec: api.ObjectiveSpec, steps: int, every: int, note: dict
) -> list[tuple[int, float]]:
    """Trains a pair for so many steps; k-NN every so many, and the crops of the seed in `note`."""
    objective = api.Objective.for_pair(spec, pair)
    optimizer = torch.optim.AdamW(api.parameter_groups(pair.student, 1.0, 1.0), fused=True)
    points, began = [], time.process_time()
    for step in range(steps):
        lr = api.cosine(step, LR, 1e-6, steps, warmup=round(WARMUP * steps))
        values = api.StepValues(
            lr=lr,
            weight_decay=api.cosine(step, *DECAY, steps),
            teacher_momentum=api.cosine(step, *note["momentum"], steps),
            teacher_temperature=TEMPERATURE,
            last_layer_lr=lr if step >= 0.01 * steps else 0.0,
        )
        views = images.views(step, note["seed"])
        result = api.train_step(
            pair.student, pair, [views], optimizer, values, objective,
            autocast_dtype=images.dtype if note["half"] else None,
        )  # fmt: skip
        done = step + 1
        if done % every == 0 or done == steps:
            score = images.knn(pair.teacher.backbone)
            points.append((done, score))
            total = float(result.scalars["loss/total"])
            print(
                json.dumps(
                    note
                    | {"step": done, "knn": score, "loss": round(total, 4)}
                    | {"core_s": round(time.process_time() - began, 1)}
                ),
                flush=True,
            )
    return points


def reached(points: list[tuple[int, float]], score: float) -> int | None:
    """The first step at or above a score."""
    return next((step for step, value in points if value >= score), None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="of a student")
    parser.add_argument("--teacher-steps", type=int, default=900)
    parser.add_argument("--every", type=int, default=25, help="steps between two scores")
    parser.add_argument("--widths", default="48,96,192", help="of the student's stages")
    parser.add_argument("--images", type=int, default=25_000)
    parser.add_argument("--losses", default="cosine", help="cosine, smooth_l1, beside")
    parser.add_argument("--weights", type=Path, default=Path("teacher"), help="made once")
    parser.add_argument("--side", type=int, default=32, help="of a crop, pixels")
    parser.add_argument("--momentum", default="0.99,0.998", help="of the moving average")
    parser.add_argument("--half", action="store_true", help="bfloat16")
    parser.add_argument("--without", action="store_true", help="no self-distillation")
    given = parser.parse_args()
    torch.set_num_threads(1)
    images = Images(given.data, given.images, given.half, given.side)
    widths = [int(x) for x in given.widths.split(",")]
    common = {"half": given.half, "momentum": [float(x) for x in given.momentum.split(",")]}
    if not (given.weights / "config.json").is_file():
        spec = ModuleSpec(TEACHER, given.side, 8, files=read_source(Name.of(f"module:{TEACHER}")))
        torch.manual_seed(100)
        pair = api.student_teacher(spec.build(), HEAD, seed=100)
        note = common | {"what": "teacher", "seed": 100}
        learn(images, pair, ALONE, given.teacher_steps, 100, note)
        save_module(pair.teacher.backbone, given.weights, Preprocessing(None, MEAN, STD))
    teacher = api.feature_teacher(str(given.weights), mean=MEAN, std=STD)
    goal = SHARE * images.knn(teacher.network)
    print(json.dumps({"teacher": goal / SHARE, "goal": goal}), flush=True)
    found: dict[str, list[int | None]] = {}
    for seed in range(given.seeds):
        for loss in given.losses.split(","):
            form = api.FeatureSpec("cosine" if loss == "beside" else loss)
            torch.manual_seed(seed)
            network = Residual(widths)
            if loss == "beside":
                pair = api.distilled_student(network, teacher, form, head=HEAD, seed=seed)
                spec = api.ObjectiveSpec(ibot_weight=0.0, centring="sinkhorn", features=form)
            else:
                pair = api.distilled_student(network, teacher, form, seed=seed)
                spec = api.ObjectiveSpec(0.0, 0.0, 0.0, features=form)
            note = common | {"what": loss, "seed": seed}
            points = learn(images, pair, spec, given.steps, given.every, note)
            found.setdefault(loss, []).append(reached(points, goal))
        if not given.without:
            torch.manual_seed(seed)
            pair = api.student_teacher(Residual(widths), HEAD, seed=seed)
            note = common | {"what": "alone", "seed": seed}
            points = learn(images, pair, ALONE, given.steps, given.every, note)
            found.setdefault("alone", []).append(reached(points, goal))
        print(json.dumps({"steps to the goal": found}), flush=True)


if __name__ == "__main__":
    main()
