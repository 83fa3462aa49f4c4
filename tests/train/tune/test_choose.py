"""What learns by `train.tune`, that nothing else changes, and what a checkpoint of it holds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config.config import Config
from pipeline.config.load import load
from pipeline.errors import ConfigError, PipelineError
from pipeline.model.encoders.module import ModuleBackbone
from pipeline.model.groups import parameter_groups
from pipeline.model.low_rank import merge_low_rank
from pipeline.model.pair import HeadSpec, Pair, build_pair
from pipeline.train import build
from pipeline.train.checkpoint import restore, state
from pipeline.train.checkpoint.names import divided
from pipeline.train.objective import Objective, ObjectiveSpec
from pipeline.train.start import TrainState
from pipeline.train.step import train_step
from pipeline.train.tune.choose import frozen_names, tuned
from pipeline.train.tune.share import share
from tests.train.small_run import HEAD, VALUES, views
from tests.train.test_start import SMALL

TUNES = ("last_blocks=1", "lora(rank=3)", "heads")


def config(tune: str, *overrides: str) -> Config:
    return load([*SMALL, f"train.tune={tune}", "model.init=somewhere", *overrides])


def pair_of(tune: str, *overrides: str) -> Pair:
    recipe = config(tune, "ibot_head.separate=false", *overrides)
    return tuned(build.pair(recipe), recipe)


def held(tune: str, seed: int = 0) -> TrainState:
    """As a worker holds it, small."""
    built = pair_of(tune, f"run.seed={seed}", "model.drop_path=0")
    optimizer = torch.optim.AdamW(parameter_groups(built.student, 0.8))
    return TrainState(built, Objective.for_pair(ObjectiveSpec(), built), optimizer)


def step(held: TrainState, number: int) -> None:
    batch = [views(4, seed=number)]
    train_step(held.pair.student, held.pair, batch, held.optimizer, VALUES, held.objective)


def learnt(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_what_learns_of_our_vit() -> None:
    every = {tune: learnt(pair_of(tune).student.backbone) for tune in (*TUNES, "all")}
    assert every["heads"] == set()
    last = {name for name in every["all"] if name.startswith(("blocks.1.", "norm."))}
    assert every["last_blocks=1"] == last
    assert every["lora(rank=3)"] == {"mask_token"} | {
        f"blocks.{i}.{layer}.low_rank_{part}"
        for i in (0, 1)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for part in ("down", "up")
    }
    plain = pair_of("lora(rank=3)", "loss.mask_probability=0", "loss.ibot_weight=0")
    assert "mask_token" not in learnt(plain.student)
    for tune in TUNES:
        assert {n for n in learnt(pair_of(tune).student) if n.startswith("dino_head.")} == {
            n for n in learnt(pair_of("all").student) if n.startswith("dino_head.")
        }


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("test_vit", {"module.blocks.5.", "module.norm."}),
        ("test_efficientnet", {"module.blocks.4.0.", "module.conv_head.", "module.bn2."}),
    ],
)
def test_the_last_blocks_of_timm_models(name: str, first: set[str]) -> None:
    timm = pytest.importorskip("timm")
    fields = ["model.patch_size=16", "augment.global_size=32", "augment.local_crops=0"]
    if name == "test_efficientnet":
        fields += ["loss.ibot_weight=0", "loss.mask_probability=0"]
    backbone = pair_of("last_blocks=1", f"model.encoder=timm:{name}", *fields).student.backbone
    every = {f"module.{n}" for n, _ in timm.create_model(name, num_classes=0).named_parameters()}
    assert learnt(backbone) == {n for n in every if n.startswith(tuple(first))}


@pytest.mark.parametrize("tune", TUNES)
def test_frozen_weights_are_there_once_and_nothing_of_them_changes(tune: str) -> None:
    held_state = held(tune)
    built = held_state.pair
    before = copy.deepcopy(built.teacher.state_dict())
    frozen = frozen_names(built.student)
    assert frozen == {n for n, p in built.student.named_parameters() if not p.requires_grad}
    for name, p in built.teacher.named_parameters():
        ours = built.student.get_parameter(name)
        assert torch.equal(p, ours)
        assert (p is ours) == (name in frozen)
        assert not p.requires_grad
    by_hand = {n: x.clone() for n, x in before.items()}
    for number in range(3):
        step(held_state, number)
        student = built.student.state_dict()
        for n in by_hand:
            by_hand[n] = 0.9 * by_hand[n] + 0.1 * student[n]
    teacher = built.teacher.state_dict()
    for n, x in by_hand.items():
        if n in frozen:
            assert torch.equal(teacher[n], before[n]), n
        else:
            torch.testing.assert_close(teacher[n], x, atol=1e-6, rtol=1e-5)
            assert not torch.equal(x, before[n]) or n.endswith("qkv.bias"), n
    assert {n for g in held_state.optimizer.param_groups for n in g["names"]} == learnt(
        built.student
    )
    assert set(held_state.state()["optimizer"]) == learnt(built.student)


@pytest.mark.parametrize("tune", TUNES)
def test_the_rates_of_what_learns_are_those_that_it_has_when_all_learns(tune: str) -> None:
    def rates(of: str) -> dict[str, tuple[float, float]]:
        groups = parameter_groups(pair_of(of).student, 0.8, 0.2)
        return {
            name: (group["lr_multiplier"], group["weight_decay_multiplier"])
            for group in groups
            for name in group["names"]
        }

    every, ours = rates("all"), rates(tune)
    for name, rate in ours.items():
        whole = name.replace("low_rank_down", "weight").replace("low_rank_up", "weight")
        assert rate == every[whole], name


@pytest.mark.parametrize("tune", TUNES)
def test_a_checkpoint_holds_what_is_frozen_once_and_goes_on_to_the_bit(
    tune: str, tmp_path: Path
) -> None:
    left_alone = held(tune)
    for number in range(2):
        step(left_alone, number)
    saved = state.save(tmp_path, 2, left_alone.state(), {"plan": {}})
    frozen = frozen_names(left_alone.pair.student)
    names = set(divided(saved.load())[0])
    assert {f"teacher/{n}" for n in frozen} < names
    assert not {f"student/{n}" for n in frozen} & names
    shares = share(left_alone.pair)
    tensors = sum(x.nbytes for n, x in divided(saved.load())[0].items() if "objective" not in n)
    counts = 4 * len(saved.load()["optimizer"])  # AdamW's step of each parameter
    assert tensors == shares.checkpoint + counts
    # of a run with other weights, as a restart builds them
    again = held(tune, seed=5)
    source = restore.newest(tmp_path)
    assert source is not None
    source.into(again, torch.device("cpu"))
    for each in (left_alone, again):
        for number in range(2, 4):
            step(each, number)
    expected, got = divided(left_alone.state())[0], divided(again.state())[0]
    assert expected.keys() == got.keys()
    for name, x in expected.items():
        assert torch.equal(x, got[name]), name
    for name, x in again.pair.student.state_dict().items():
        assert torch.equal(x, left_alone.pair.student.state_dict()[name]), name


def test_what_reads_a_checkpoint_gets_plain_weights(tmp_path: Path) -> None:
    held_state = held("lora(rank=3)")
    with torch.no_grad():
        for name, p in held_state.pair.teacher.named_parameters():
            if "low_rank" in name:
                p.normal_()
    saved = state.save(tmp_path, 2, held_state.state(), {"plan": {}})
    plain = build.pair(config("lora(rank=3)")).teacher
    plain.load_state_dict(saved.teacher())
    x = torch.randn(2, 3, 28, 28)
    teacher = held_state.pair.teacher
    torch.testing.assert_close(plain.backbone(x), teacher.backbone(x), atol=1e-5, rtol=1e-5)
    merge_low_rank(teacher.backbone)
    torch.testing.assert_close(plain.backbone(x), teacher.backbone(x), atol=1e-6, rtol=1e-6)


def test_the_last_blocks_of_the_residual_network_of_ours() -> None:
    fields = ["loss.ibot_weight=0", "loss.mask_probability=0"]
    encoder = "model.encoder=module:pipeline.model.encoders.residual:small"
    backbone = pair_of("last_blocks=1", encoder, "optim.layerwise_decay=1", *fields).student
    names = learnt(backbone.backbone)
    assert names and all(n.startswith("module.stages.2.") for n in names)
    low = pair_of("lora(rank=4)", encoder, "optim.layerwise_decay=1", *fields).student.backbone
    assert "module.stages.0.conv1.low_rank_up" in learnt(low)


class Mean(nn.Module):
    """[B, C, N] to [B, C]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(2)


class Blocks(nn.Module):
    """Convolutions with BatchNorm, as rows of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(self.block() for _ in range(3)))

    @staticmethod
    def block() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


CONVOLUTIONAL = [
    "model.encoder=module:nets:blocks",
    "loss.ibot_weight=0",
    "loss.mask_probability=0",
    "optim.layerwise_decay=1",
]


def convolutional(tune: str, *overrides: str, seed: int = 0) -> Pair:
    torch.manual_seed(seed)
    built = build_pair(ModuleBackbone(Blocks(), 8), HEAD, None, seed=seed)
    recipe = config(tune, *CONVOLUTIONAL, *overrides)
    return tuned(built, recipe)


def convolutional_state(*overrides: str, seed: int = 0) -> TrainState:
    built = convolutional("all", *overrides, seed=seed)
    for module in built.student.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):  # as weights bring them, not 0 and 1
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    built.teacher.load_state_dict(built.student.state_dict())
    optimizer = torch.optim.AdamW(parameter_groups(built.student))
    return TrainState(built, Objective.for_pair(ObjectiveSpec(ibot_weight=0), built), optimizer)


def test_kept_statistics_are_those_of_the_weights_and_all_else_learns(tmp_path: Path) -> None:
    left_alone = convolutional_state("train.batch_norm=kept")
    student = left_alone.pair.student
    image = torch.randn(3, 3, 28, 28)
    evaluated = copy.deepcopy(student.backbone).eval()
    torch.testing.assert_close(student.backbone(image), evaluated(image))  # in training mode
    means = {f"backbone.module.blocks.{n}.1.running_mean" for n in range(3)}
    assert means <= frozen_names(student)
    before = copy.deepcopy(student.state_dict())
    for number in range(2):
        step(left_alone, number)
    for encoder in left_alone.pair:
        after = encoder.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in means)
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert changed >= {n for n in learnt(student) if n.startswith("backbone.module.blocks")}
    # it goes on to the bit
    state.save(tmp_path, 2, left_alone.state(), {"plan": {}})
    again = convolutional_state("train.batch_norm=kept", seed=5)
    source = restore.newest(tmp_path)
    assert source is not None
    source.into(again, torch.device("cpu"))
    for each in (left_alone, again):
        step(each, 2)
    for name, x in again.pair.student.state_dict().items():
        assert torch.equal(x, student.state_dict()[name]), name
    # and without it, they move
    moving = convolutional_state()
    step(moving, 0)
    assert not any(torch.equal(before[n], moving.pair.student.state_dict()[n]) for n in means)


def test_statistics_that_are_not_there_are_not_kept() -> None:
    without = ModuleBackbone(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), Mean()), 8)
    recipe = config("all", *CONVOLUTIONAL, "train.batch_norm=kept")
    with pytest.raises(PipelineError, match="the backbone has no BatchNorm with running means"):
        tuned(build_pair(without, HEAD, None, seed=0), recipe)
    with pytest.raises(ConfigError, match="a ViT of ours has no BatchNorm"):
        config("all", "train.batch_norm=kept")
    with pytest.raises(ConfigError, match=r"weights, but model\.init is empty"):
        load([*SMALL, "train.batch_norm=kept"])


@pytest.mark.parametrize("tune", ["last_blocks=1", "lora(rank=2)", "heads"])
def test_batch_norm_that_does_not_learn_keeps_its_statistics(tune: str) -> None:
    built = convolutional(tune)
    objective = Objective.for_pair(ObjectiveSpec(ibot_weight=0), built)
    optimizer = torch.optim.AdamW(parameter_groups(built.student))
    held_state = TrainState(built, objective, optimizer)
    norms = [n for n, m in built.student.named_modules() if isinstance(m, nn.BatchNorm2d)]
    moving = {norms[-1]} if tune == "last_blocks=1" else set()
    assert frozen_names(built.student) >= {f"{n}.running_mean" for n in norms if n not in moving}
    before = copy.deepcopy(built.student.state_dict())
    for number in range(2):
        batch = [views(4, seed=number)]
        train_step(built.student, built, batch, optimizer, VALUES, objective)
    for encoder in built:
        after = encoder.state_dict()
        for name in norms:
            mean = f"{name}.running_mean"
            assert torch.equal(before[mean], after[mean]) == (name not in moving), mean
    assert not frozen_names(built.student) & set(held_state.state()["student"])


@pytest.mark.parametrize(
    ("tune", "what"),
    [
        ("lora", r"train.tune=lora is none of all, heads, last_blocks=N and lora\(rank=R\)"),
        ("last_blocks=0", "train.tune=last_blocks=0 is none of all"),
        ("lora(rank=-1)", "is none of all"),
    ],
)
def test_what_is_no_tune_is_one_sentence(tune: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        config(tune)


def test_random_weights_are_not_frozen() -> None:
    with pytest.raises(ConfigError, match=r"freezes weights, but model\.init is empty"):
        load([*SMALL, "train.tune=heads"])
    assert load([*SMALL, "train.tune= all"]).train.tune == "all"
    assert config("lora( rank = 4 )").train.tune == "lora(rank=4)"


@pytest.mark.parametrize(
    ("build_it", "what"),
    [
        (lambda: pair_of("last_blocks=3"), "has 2 blocks"),
        (lambda: pair_of("lora(rank=24)"), r"train.tune=lora\(rank=24\) is no low rank"),
        (
            lambda: tuned(
                build_pair(
                    ModuleBackbone(nn.Sequential(nn.Flatten(), nn.Linear(2352, 8)), 8),
                    HeadSpec(8, 4, 8),
                    None,
                    0,
                ),
                config("last_blocks=1"),
            ),
            "no blocks of this encoder are known",
        ),
    ],
)
def test_what_does_not_fit_the_network_is_one_sentence(build_it: Any, what: str) -> None:
    with pytest.raises(PipelineError, match=what):
        build_it()
