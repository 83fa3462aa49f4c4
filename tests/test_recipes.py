"""The official recipes: every value against the table of the reference's files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.config import Config
from pipeline.config.load import load
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan, SetFacts, resolve
from pipeline.plan.resume import value_at

ROOT = Path(__file__).parents[1]
SCHEDULES = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())
IMAGENET = 1_281_167
EPOCH = 1250  # steps, in the official code; not a pass over the data

Numbers = dict[str, Any]

# What the official files say: ssl_default_config.yaml with train/<name>.yaml over it.
SHORT: Numbers = {
    "gpus": 32,
    "images a gpu": 64,
    "batch": 2048,
    "epochs": 100,
    "steps": 125_000,
    "base lr": 4e-3,
    "lr": 5.657e-3,
    "warmup epochs": 10,
    "weight decay": (0.04, 0.4),
    "layerwise decay": 0.9,
    "patch embed": 0.2,
    "momentum": (0.992, 1.0),
    "temperature": (0.04, 0.07),
    "temperature epochs": 30,
    "drop path": 0.3,
    "ffn": "mlp",
    "patch": 16,
    "registers": 0,
    "dino head": (65536, 256),
    "ibot head": None,
    "centring": "softmax",
    "crops": (224, 8, 96),
}
LONG: Numbers = SHORT | {
    "gpus": 96,
    "images a gpu": 32,
    "batch": 3072,
    "epochs": 500,
    "steps": 625_000,
    "base lr": 2e-4,
    "lr": 3.464e-4,
    "warmup epochs": 80,
    "weight decay": (0.04, 0.2),
    "layerwise decay": 1.0,
    "momentum": (0.994, 1.0),
    "drop path": 0.4,
    "ffn": "swiglu",
    "patch": 14,
    "dino head": (131072, 384),
    "ibot head": (131072, 256),
    "centring": "sinkhorn",
    "crops": (224, 8, 98),
}
OFFICIAL = {
    "vitl16_short": SHORT,
    "vitl14": LONG,
    "vitg14": LONG | {"gpus": 256, "images a gpu": 12},
}
SIZE = {"vitl16_short": "vitl", "vitl14": "vitl", "vitg14": "vitg"}
COMMON: Numbers = {
    "hidden": 2048,
    "layers": 3,
    "weights": (1.0, 1.0, 0.1),
    "mask probability": 0.5,
    "mask ratio": (0.1, 0.5),
    "clip": 3.0,
    "freeze epochs": 1,
    "layer scale": 1e-5,
    "student temperature": 0.1,
    "min lr": 1e-6,
}
# Named elsewhere: position embeddings and LayerScale in section 1, crops in 4, optimiser in 6.
ALSO: Numbers = {
    "objective": "dinov2",
    "model.interpolate_offset": 0.1,
    "model.interpolate_antialias": False,
    "model.mlp_ratio": 4.0,
    "augment.global_scale": (0.32, 1.0),
    "augment.local_scale": (0.05, 0.32),
    "augment.flip": 0.5,
    "augment.jitter": 0.8,
    "augment.greyscale": 0.2,
    "augment.solarize": 0.2,
    "augment.blur": "paper",
    "augment.mean": (0.485, 0.456, 0.406),
    "augment.std": (0.229, 0.224, 0.225),
    "optim.lr_scaling": "sqrt_1024",
    "optim.betas": (0.9, 0.999),
    "train.workers": "auto",
    "train.eval_every": 12_500,
    "train.save_every": 3 * EPOCH,
    "train.keep_last": 3,
}


def recipe(name: str, *overrides: str) -> Config:
    return load([str(ROOT / "configs" / f"{name}.yaml"), *overrides])


def plan(config: Config, gpus: int) -> Plan:
    machine = Machine(cpus=16 * gpus, gpus=gpus, bfloat16=True)
    return resolve(config, SetFacts(IMAGENET, "d"), machine=machine)


def the_one(values: set[int]) -> int:
    """What all heads have."""
    (value,) = values
    return value


def in_their_words(config: Config, gpus: int) -> tuple[Numbers, Numbers]:
    """Our recipe as the official files would say it: what differs among the three, and the rest."""
    found = plan(config, gpus)
    model, optim, teacher, loss = config.model, config.optim, config.teacher, config.loss
    epochs = found.steps / EPOCH
    heads = [config.head] + [config.ibot_head] * config.ibot_head.separate
    sizes = [(head.prototypes, head.bottleneck) for head in heads]
    crops = config.augment
    differing = {
        "gpus": found.workers,
        "images a gpu": found.micro_batch,
        "batch": optim.global_batch_size,
        "epochs": epochs,
        "steps": optim.steps,
        "base lr": optim.lr,
        "lr": float(f"{found.lr:.3e}"),
        "warmup epochs": found.warmup_steps / EPOCH,
        "weight decay": (optim.weight_decay, optim.weight_decay_end),
        "layerwise decay": optim.layerwise_decay,
        "patch embed": optim.patch_embed_lr,
        "momentum": (teacher.momentum, teacher.momentum_end),
        "temperature": (teacher.temperature, teacher.temperature_end),
        "temperature epochs": found.temperature_warmup_steps / EPOCH,
        "drop path": model.drop_path,
        "ffn": model.ffn,
        "patch": model.patch_size,
        "registers": model.registers,
        "dino head": sizes[0],
        "ibot head": sizes[1] if len(sizes) > 1 else None,
        "centring": loss.centring,
        "crops": (crops.global_size, crops.local_crops, crops.local_size),
    }
    common = {
        "hidden": the_one({head.hidden for head in heads}),
        "layers": the_one({head.layers for head in heads}),
        "weights": (loss.dino_weight, loss.ibot_weight, loss.koleo_weight),
        "mask probability": loss.mask_probability,
        "mask ratio": loss.mask_ratio,
        "clip": optim.clip,
        "freeze epochs": found.freeze_last_layer_steps / EPOCH,
        "layer scale": model.layer_scale,
        "student temperature": loss.student_temperature,
        "min lr": optim.min_lr,
    }
    return differing, common


def card_of(path: Path) -> str:
    """The comment on top of a recipe, as one line of words."""
    lines: list[str] = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:])
    return " ".join(" ".join(lines).split())


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_value_is_the_official_one(name: str) -> None:
    config = recipe(name)
    differing, common = in_their_words(config, OFFICIAL[name]["gpus"])
    assert differing == OFFICIAL[name]
    assert common == COMMON
    assert {path: value_at(config, path) for path in ALSO} == ALSO
    assert (config.model.size, config.model.width, config.model.depth) == (SIZE[name], None, None)
    assert config.train.accumulation == 1
    if config.loss.centring == "softmax":
        assert config.loss.centre_momentum == 0.9


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_recipes_are_written_out(name: str) -> None:
    written = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    sections = {name: values for name, values in written.items() if isinstance(values, dict)}
    fields = {f"{section}.{field}" for section, values in sections.items() for field in values}
    model = {"size", "patch_size", "ffn", "registers", "layer_scale", "drop_path"}
    optim = {"steps", "global_batch_size", "lr", "min_lr", "warmup", "weight_decay", "clip"}
    optim |= {"weight_decay_end", "layerwise_decay", "patch_embed_lr", "freeze_last_layer"}
    teacher = {"momentum", "momentum_end", "temperature", "temperature_end", "temperature_warmup"}
    loss = {"dino_weight", "ibot_weight", "koleo_weight", "centring", "student_temperature"}
    loss |= {"mask_probability", "mask_ratio"}
    crops = {"global_size", "local_size", "local_crops"}
    head = {"prototypes", "bottleneck", "hidden", "layers"}
    wanted = {"ibot_head.separate"} | (set(ALSO) - {"objective", "train.workers"})
    named = {"model": model, "optim": optim, "teacher": teacher, "loss": loss, "augment": crops}
    for section, names in (named | {"head": head}).items():
        wanted |= {f"{section}.{field}" for field in names}
    assert written["objective"] == "dinov2"
    assert not wanted - fields
    assert "train.workers" not in fields  # the official number of GPUs is not asked for


# --- the table itself, where it is there ---------------------------------------------------------


def table(text: str) -> dict[str, list[str]]:
    """Rows of the table of section 7: name -> cells of the three official recipes."""
    section = text.split("## 7.")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:4]] for row in rows[2:]}


def spread_out(cells: list[str]) -> list[str]:
    """`same` replaced with what stands left of it, for cells and for parts between slashes."""
    out: list[str] = []
    for cell in cells:
        if cell == "same":
            out.append(out[-1])
        elif "/ same" in cell:
            out.append(cell.replace("same", out[-1].split(" / ")[1]))
        else:
            out.append(cell)
    return out


def floats(cell: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d*\.?\d+(?:e-?\d+)?", cell.replace("−", "-"))]


def from_the_table(rows: dict[str, list[str]], column: int) -> Numbers:
    cells = {name: spread_out(found)[column] for name, found in rows.items()}
    share, batch = (
        re.search(r"×(\d+)", cells["GPUs × per-GPU = batch"]),
        re.search(r"\b(\d{4})\b", cells["GPUs × per-GPU = batch"]),
    )
    assert share and batch
    steps = int(floats(cells["epochs × 1250 = iters"])[-1]) * 1000
    base, lr = floats(cells["base_lr → lr"])[:2]
    warmup, *decay = floats(cells["warmup / wd"])
    layer, patch_embed = floats(cells["layerwise decay / patch-embed mult"])
    low, high, cold, hot, warm = floats(cells["momentum / T_teacher"])
    ffn, patch, registers = cells["FFN / patch / registers"].split("/")
    heads = re.findall(r"(\d+)/(\d+)", cells["K / bottleneck / head"])
    sizes = [(int(k), int(b)) for k, b in heads]
    assert ("separate" in cells["K / bottleneck / head"]) == (len(sizes) == 2)
    return {
        "gpus": int(batch[1]) // int(share[1]),
        "images a gpu": int(share[1]),
        "batch": int(batch[1]),
        "epochs": steps / EPOCH,
        "steps": steps,
        "base lr": base,
        "lr": lr,
        "warmup epochs": warmup,
        "weight decay": tuple(decay),
        "layerwise decay": layer,
        "patch embed": patch_embed,
        "momentum": (low, high),
        "temperature": (cold, hot),
        "temperature epochs": warm,
        "drop path": floats(cells["drop path (uniform)"])[0],
        "ffn": ffn.strip().removesuffix("fused"),
        "patch": int(patch),
        "registers": int(registers),
        "dino head": sizes[0],
        "ibot head": sizes[1] if len(sizes) > 1 else None,
        "centring": cells["centering"].split()[0].lower(),
        "crops": tuple(int(x) for x in floats(cells["crops"])),
    }


def test_the_numbers_above_are_those_of_the_table(shared: Path) -> None:
    text = (shared / "RECIPE.md").read_text()
    rows = table(text)
    for column, name in enumerate(OFFICIAL):
        assert from_the_table(rows, column) == OFFICIAL[name], name
    line = re.search(r"^Common \(.*?\): (.*)$", text, re.MULTILINE)
    assert line
    said = dict(zip(COMMON, line[1].replace("–", " ").split(", "), strict=False))
    assert {name: floats(said[name]) for name in COMMON} == {
        name: [float(x) for x in (value if isinstance(value, tuple) else (value,))]
        for name, value in COMMON.items()
    }
    # what the authors report stands in the cards, as theirs
    for name, cell in zip(OFFICIAL, rows["dataset / expected"], strict=True):
        card = card_of(ROOT / "configs" / f"{name}.yaml")
        for number in re.findall(r"(?:kNN|lin) (\d+\.\d)", cell):
            assert number in card, f"{name}: {number}"


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("vitl16_short", "vitl16_short_32gpu"),
        ("vitl14", "vitl14_96gpu"),
        ("vitg14", "vitg14_256gpu"),
    ],
)
def test_the_schedules_of_the_reference(name: str, golden: str) -> None:
    expected = SCHEDULES[golden]
    found = plan(recipe(name), expected["world_size"])
    assert found.steps == expected["total_iters"]
    assert found.micro_batch == expected["batch_size_per_gpu"]
    assert found.warmup_steps == expected["warmup_iters"]
    assert found.temperature_warmup_steps == expected["teacher_temp_warmup_iters"]
    worst: dict[str, float] = {}
    for i, step in enumerate(expected["its"]):
        at = found.at(step)
        mine = {
            "lr": at.lr,
            "wd": at.weight_decay,
            "momentum": at.teacher_momentum,
            "teacher_temp": at.teacher_temperature,
            "last_layer_lr": at.last_layer_lr,
        }
        assert set(mine) == set(expected["values"])
        for key, value in mine.items():
            reference = expected["values"][key][i]
            error = abs(value - reference) / max(abs(reference), 1e-12)
            worst[key] = max(worst.get(key, 0.0), error)
    assert max(worst.values()) < 1e-12, worst


def test_the_schedules_are_those_of_the_shared_folder(shared: Path) -> None:
    there = json.loads((shared / "golden" / "schedules" / "schedules.json").read_text())
    assert there == SCHEDULES
