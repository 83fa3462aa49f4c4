"""Student and teacher, parameter groups, and weights on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.model.groups import apply_values, multipliers, parameter_groups
from pipeline.model.pair import HeadSpec, build_pair, ema_update
from pipeline.model.vit import BackboneSpec
from pipeline.model.weights import (
    flatten_chunks,
    load_backbone,
    load_weights,
    save_backbone,
    verify,
)
from pipeline.schedule import StepValues

GOLDEN = Path(__file__).parents[1] / "golden"
SPEC = BackboneSpec(image_size=28, width=24, depth=3, heads=2)
HEAD = HeadSpec(prototypes=20, bottleneck=8, hidden=16)


def test_the_teacher_is_the_student_at_step_0() -> None:
    pair = build_pair(SPEC, HEAD, HEAD, seed=3)
    student, teacher = pair.student.state_dict(), pair.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert all(torch.equal(x, teacher[name]) for name, x in student.items())
    assert not pair.teacher.training and pair.student.training
    assert not any(p.requires_grad for p in pair.teacher.parameters())
    storages = {p.data_ptr() for p in pair.student.parameters()}
    assert storages.isdisjoint(p.data_ptr() for p in pair.teacher.parameters())


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (build_pair(SPEC, HEAD, None, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    name = "backbone.blocks.0.attn.qkv.weight"
    weights = [pair.student.get_parameter(name) for pair in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_moving_average() -> None:
    golden = torch.load(GOLDEN / "ema.pt", weights_only=True)
    pair = build_pair(SPEC, HEAD, None, seed=0)
    pair.student = torch.nn.ParameterList(golden["student"])
    pair.teacher = torch.nn.ParameterList(x.clone() for x in golden["teacher_before"])
    ema_update(pair, golden["momentum"])
    for moved, expected in zip(pair.teacher, golden["teacher_after"], strict=True):
        torch.testing.assert_close(moved.detach(), expected, rtol=1e-6, atol=1e-7)
    before = [x.detach().clone() for x in pair.teacher]
    ema_update(pair, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(pair.teacher, before, strict=True))


@pytest.mark.parametrize(
    ("name", "depth", "decay"),
    [
        ("vits16_chunks0_decay0.9_pe0.2", 12, 0.9),
        ("tiny_d3_reg4_decay0.9_pe0.2", 3, 0.9),
        ("tiny_d3_swiglu_decay1.0_pe0.2", 3, 1.0),
        ("dino_head_decay0.9_pe0.2", 0, 0.9),
    ],
)
def test_parameter_factors(name: str, depth: int, decay: float) -> None:
    golden = json.loads((GOLDEN / "param_groups.json").read_text())[name]
    keys = set()
    for parameter, (lr, weight_decay, last_layer) in golden["params"].items():
        factors = multipliers(parameter, depth, decay, 0.2)
        assert factors == (pytest.approx(lr, rel=1e-12), weight_decay, last_layer), parameter
        keys.add(factors)
    assert len(keys) == golden["n_fused_groups"]


def test_groups_hold_every_parameter_once_and_take_the_rates() -> None:
    student = build_pair(SPEC, HEAD, HEAD, seed=0).student
    groups = parameter_groups(student, 0.9, 0.2)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in student.named_parameters())
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    apply_values(optimizer, StepValues(1e-3, 0.04, 0.99, 0.05, 0.0))
    rates = {n: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for n in g["names"]}
    assert rates["backbone.patch_embed.proj.weight"] == pytest.approx((1e-3 * 0.9**4 * 0.2, 0.04))
    assert rates["backbone.blocks.2.norm1.bias"] == pytest.approx((1e-3 * 0.9, 0.0))
    assert rates["backbone.norm.weight"] == pytest.approx((1e-3, 0.0))
    assert rates["dino_head.mlp.0.weight"] == pytest.approx((1e-3, 0.04))
    assert rates["ibot_head.last_layer.weight_g"] == pytest.approx((0.0, 0.04))


def test_weights_come_back_to_the_bit(tmp_path: Path) -> None:
    backbone = build_pair(SPEC, HEAD, None, seed=0).teacher.backbone
    save_backbone(backbone, SPEC, tmp_path)
    again, spec = load_backbone(tmp_path)
    assert spec == SPEC and not again.training
    x = torch.randn(2, 3, 28, 42)
    assert torch.equal(again(x), backbone(x))
    verify(backbone, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with torch.no_grad():
        backbone.norm.weight.add_(1)
    with pytest.raises(
        PipelineError, match=r"differs from the model in 1 tensors, first norm.weight"
    ):
        verify(backbone, tmp_path)


def test_chunked_names_load() -> None:
    backbone = SPEC.build()
    chunked = {n.replace("blocks.", "blocks.0.", 1): x for n, x in backbone.state_dict().items()}
    assert flatten_chunks(chunked).keys() == backbone.state_dict().keys()
    load_weights(SPEC.build(), chunked, "a file")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = SPEC.build().state_dict()
    del state["norm.bias"]
    state["head.weight"] = torch.zeros(1)
    state["pos_embed"] = torch.zeros(1, 7, 24)
    with pytest.raises(PipelineError) as error:
        load_weights(SPEC.build(), state, "a file")
    for part in ("missing norm.bias", "unknown head.weight", "pos_embed is (1, 7, 24), expected"):
        assert part in str(error.value)
    with pytest.raises(PipelineError, match=r"no config\.json in"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "other"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(PipelineError, match="is not a raydino-backbone-1 config"):
        load_backbone(tmp_path)
