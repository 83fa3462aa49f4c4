"""All recipes in configs/ as plans and as cards, and our own presets."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
import torch

from pipeline.config.config import Config
from pipeline.config.load import load
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan, SetFacts, resolve
from pipeline.plan.resume import value_at
from pipeline.train import build, estimate

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
IMAGENET = 1_281_167


def recipe(name: str, *overrides: str) -> Config:
    return load([str(ROOT / "configs" / f"{name}.yaml"), *overrides])


def plan(config: Config, gpus: int) -> Plan:
    machine = Machine(cpus=16 * gpus, gpus=gpus, bfloat16=True)
    return resolve(config, SetFacts(IMAGENET, "d"), machine=machine)


def card_of(path: Path) -> str:
    """The comment on top of a recipe, as one line of words."""
    lines: list[str] = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:])
    return " ".join(" ".join(lines).split())


def test_every_recipe_is_a_plan_on_one_and_on_eight_gpus() -> None:
    for path, gpus in itertools.product(RECIPES, (1, 8)):
        config = load([str(path)])
        if config.adapt.enabled:  # its length follows from weights and images
            continue
        derived = plan(config, gpus)
        assert derived.steps > 0, path
        assert derived.workers * derived.worker_batch == config.optim.global_batch_size, path
        for step in (0, 1, derived.steps // 2, derived.steps - 1):
            values = vars(derived.at(step)).values()
            assert all(math.isfinite(x) for x in values if x is not None), (path, gpus, step)


def test_every_recipe_has_a_card() -> None:
    for path in RECIPES:
        card = card_of(path)
        assert f"python jobs/run.py configs/{path.stem}.yaml" in card
        if path.stem != "demo":  # it shows the commands and claims nothing of the result
            assert re.search(r"\bMeasured\b", card), path
            assert "Not measured" in card, path


def test_the_commands_of_a_card_parse() -> None:
    for path in RECIPES:
        load_what_a_card_says(path)


def load_what_a_card_says(path: Path) -> None:
    text = "\n".join(line[1:] for line in path.read_text().splitlines() if line.startswith("#"))
    commands = re.findall(r"^ *(python jobs/.*)$", text.replace("\\\n", " "), re.MULTILINE)
    for words in [command.replace('"', "").split() for command in commands]:
        load([str(ROOT / words[2]), *[w for w in words[3:] if not w.startswith("--")]])
    # and what the prose tells to change
    advice = [word.strip("(),;:.") for word in card_of(path).replace('"', "").split()]
    for word in [w for w in advice if re.fullmatch(r"\w+\.\w+=[^…]+", w)]:
        load([str(path), word])


# --- the presets ---------------------------------------------------------------------------------

PRESETS = {  # batch and passes; the micro batch of a GPU
    "vits14": (1024, 100, 1, 256),
    "vits16": (1024, 100, 1, 256),
    "vitb14": (1024, 100, 1, 128),
    "vits14_8gpu": (2048, 200, 8, 256),
    "vits16_8gpu": (2048, 200, 8, 256),
    "vitb14_8gpu": (2048, 200, 8, 128),
}
CARDS = [*PRESETS, "highres", "dino_vits16"]  # those whose memory is estimated on the card


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets(name: str) -> None:
    batch, passes, gpus, micro = PRESETS[name]
    config = recipe(name)
    found = plan(config, gpus)
    model = config.model
    assert (config.optim.global_batch_size, config.optim.passes) == (batch, passes)
    assert (found.workers, found.micro_batch) == (gpus, micro)
    assert found.lr == pytest.approx(2e-3 * math.sqrt(batch / 1024))
    assert 125_000 <= found.steps <= 125_100  # the official short recipe has 125,000
    assert (model.size, model.patch_size) == (name[:4], int(name[4:6]))
    assert config.augment.local_size == {14: 98, 16: 96}[model.patch_size]
    exact = (model.registers, model.interpolate_antialias, model.interpolate_offset)
    assert exact == (4, True, 0.0)  # what makes the exports agree at every size
    assert (model.drop_path, config.loss.centring) == (0.1, "softmax")


def test_one_and_eight_gpus_differ_in_batch_and_length_only() -> None:
    layout = {"optim": {"passes", "global_batch_size"}, "train": {"accumulation"}, "run": {"name"}}
    for name in ("vits14", "vitb14", "vits16"):
        one, eight = recipe(name), recipe(f"{name}_8gpu")
        assert one.model_dump(exclude=layout) == eight.model_dump(exclude=layout)


@pytest.mark.parametrize("name", CARDS)
def test_the_memory_on_a_card_is_what_the_dry_run_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for draw in ("trunc_normal_", "kaiming_uniform_", "uniform_", "normal_"):
        monkeypatch.setattr(torch.nn.init, draw, lambda tensor, *_, **__: tensor)  # sizes only
    card = card_of(ROOT / "configs" / f"{name}.yaml")
    large = re.search(r"80 GB \(the estimate is (\d+) GiB\)", card)
    small = re.search(r"24 GB (?:take )?(train\.accumulation=\d+) .*?estimate (\d+) GiB\)", card)
    assert large and small
    gpus = 8 if name.endswith("_8gpu") else 1
    for overrides, said, limit in (((), large[1], 70), ((small[1],), small[2], 20)):
        config = recipe(name, *overrides)
        found = plan(config, gpus)
        cost = estimate.estimated_cost(found, build.pair(config))
        assert round(cost.memory_bytes / 2**30) == pytest.approx(int(said), abs=1)
        assert cost.memory_bytes / 2**30 < limit


def test_the_second_phase_continues_the_first() -> None:
    first, second = recipe("vits14"), recipe("highres")
    assert second.model.init == "runs/vits14"
    fields = {"init", "init_resize"}
    assert second.model.model_dump(exclude=fields) == first.model.model_dump(exclude=fields)
    assert second.model.init_resize
    for section in ("head", "ibot_head", "loss", "teacher"):
        assert value_at(second, section) == value_at(first, section), section
    assert (second.augment.global_size, second.augment.local_size) == (518, 98)
    same = {"lr", "steps", "passes"}
    assert second.optim.model_dump(exclude=same) == first.optim.model_dump(exclude=same)
    assert second.optim.lr == pytest.approx(first.optim.lr / 10)
    # all schedules in 10,000 steps
    found, earlier = plan(second, 1), plan(first, 1)
    assert (found.steps, found.warmup_steps, found.freeze_last_layer_steps) == (10_000, 1000, 100)
    assert found.temperature_warmup_steps == 3000
    for share in (0.0, 0.05, 0.3, 0.7):
        then, now = earlier.at(round(share * earlier.steps)), found.at(round(share * found.steps))
        assert now.teacher_momentum == pytest.approx(then.teacher_momentum, abs=1e-9)
        assert now.weight_decay == pytest.approx(then.weight_decay, abs=1e-6)
        assert now.teacher_temperature == pytest.approx(then.teacher_temperature, abs=2e-5)


def test_distillation_fits_the_teacher_it_names() -> None:
    config = recipe("distill")
    teacher = recipe(config.distill.teacher.removeprefix("runs/"))
    assert config.head == teacher.head
    assert config.ibot_head == teacher.ibot_head
    assert config.model.patch_size == teacher.model.patch_size
    assert config.augment == teacher.augment
    assert config.loss.centring == teacher.loss.centring
    assert (config.model.drop_path, config.optim.global_batch_size) == (0.0, 2048)
    assert plan(config, 1).lr == 1e-3


def test_distillation_from_any_network_is_the_same_student() -> None:
    config, other = recipe("distill_any"), recipe("distill")
    assert config.distill.loss == "cosine" and config.distill.alone
    same = other.optim.model_copy(update={"freeze_last_layer": config.optim.freeze_last_layer})
    assert (config.model, config.optim) == (other.model, same)
    assert config.teacher.momentum == other.teacher.momentum


@pytest.mark.parametrize(("batch", "rate"), [(1024, 2e-3), (512, 1e-3)])
def test_plain_dino(batch: int, rate: float) -> None:
    config = recipe("dino_vits16", f"optim.global_batch_size={batch}", f"optim.lr={rate}")
    found = plan(config, 1)
    assert found.lr == pytest.approx(5e-4 * batch / 256)
    a_pass = IMAGENET // batch
    assert found.warmup_steps == 10 * a_pass
    assert found.temperature_warmup_steps == 30 * a_pass
    assert found.freeze_last_layer_steps == a_pass
    assert (found.at(0).teacher_momentum, found.at(found.steps).teacher_momentum) == (0.996, 1.0)
    half = found.at(found.steps // 2)
    assert half.teacher_momentum == pytest.approx(0.998)
    assert half.weight_decay == pytest.approx(0.22)
    assert half.teacher_temperature == 0.07
    assert config.objective == "dino"
    assert (config.loss.ibot_weight, config.loss.koleo_weight) == (0.0, 0.0)
