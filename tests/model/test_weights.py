"""Weights in: every form of a dinov2 file, and what is said where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from pipeline.errors import PipelineError
from pipeline.model.fit import Facts
from pipeline.model.vit import BackboneSpec
from pipeline.model.weights import Weights, fit, load_backbone, read_weights, save_backbone
from tests.model.official import draw, shapes

GOLDEN = Path(__file__).parents[1] / "golden"
SPEC = BackboneSpec(image_size=56, width=24, depth=3, heads=2, registers=0)
STATE = draw(shapes(24, 3, grid=4))


def same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor] = STATE) -> bool:
    return state.keys() == expected.keys() and all(
        torch.equal(x, expected[name]) for name, x in state.items()
    )


def prefixed(prefix: str, state: dict[str, Any] = STATE) -> dict[str, Any]:
    return {prefix + name: x for name, x in state.items()}


CHUNKED = {n.replace("blocks.", f"blocks.{n[7]}.", 1): x for n, x in STATE.items()}
HEADS = {"dino_head.last_layer.weight_g": torch.ones(3), "ibot_head.mlp.0.bias": torch.ones(2)}
WRAPPED = {n.replace("blocks.1.", "blocks.1._orig_mod."): x for n, x in STATE.items()}
FORMS: dict[str, tuple[Any, str]] = {
    "raw": (STATE, ""),
    "chunks": (CHUNKED, ""),
    "model": ({"model": STATE, "epoch": 3}, ""),
    "teacher": (
        {"teacher": {**prefixed("backbone."), **HEADS}},
        "Left out: dino_head (1), ibot_head (1).",
    ),
    "teacher, chunks": ({"teacher": prefixed("backbone.", CHUNKED)}, ""),
    "whole trainer": (
        {"model": {**prefixed("teacher.backbone."), **prefixed("student.backbone.", HEADS)}},
        "Left out: student (2).",
    ),
    "student": (prefixed("student."), ""),
    "ddp": (prefixed("module."), ""),
    "ddp, compiled": ({"state_dict": prefixed("module._orig_mod.", WRAPPED)}, ""),
    "dino 2021": (
        {"teacher": prefixed("backbone."), "student": prefixed("module.backbone.", CHUNKED)},
        "",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_dinov2_files_of_every_form(form: str, tmp_path: Path) -> None:
    stored, note = FORMS[form]
    torch.save(stored, tmp_path / "weights.pth")
    weights = read_weights(tmp_path / "weights.pth")
    assert same(weights.state)
    assert (weights.origin, weights.note, weights.heads) == ("dinov2 .pth", note, None)
    backbone = SPEC.build()
    fit(backbone, weights, "weights.pth")
    assert same(backbone.state_dict())


def test_official_names_are_the_released_ones() -> None:
    golden = json.loads((GOLDEN / "state_dict_shapes_vits14_518.json").read_text())
    assert shapes(384, 12) == {name: tuple(shape) for name, shape in golden.items()}
    with torch.device("meta"):
        ours = BackboneSpec(image_size=518, registers=0).build().state_dict()
    assert {name: tuple(x.shape) for name, x in ours.items()} == shapes(384, 12)


def test_our_own_folders(tmp_path: Path) -> None:
    backbone = SPEC.build()
    fit(backbone, Weights(STATE, "drawn"), "here")
    save_backbone(backbone, SPEC, tmp_path / "run" / "weights" / "dinov2")
    for place in (tmp_path / "run", tmp_path / "run" / "weights" / "dinov2"):
        weights = read_weights(place)
        assert same(weights.state) and weights.origin == "raydino export" and weights.heads == 2
    single = read_weights(tmp_path / "run" / "weights" / "dinov2" / "model.safetensors")
    assert same(single.state) and single.origin == "dinov2 .safetensors"
    before = torch.get_rng_state()
    again, _ = load_backbone(tmp_path / "run" / "weights" / "dinov2")
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.requires_grad for p in again.parameters()) and not again.training


def refused(backbone_spec: BackboneSpec, weights: Weights, **options: Any) -> str:
    with pytest.raises(PipelineError) as error:
        fit(backbone_spec.build(), weights, "w.pth", **options)
    return str(error.value)


def changed(**sizes: Any) -> Weights:
    sizes_given = {"width": 24, "depth": 3, "grid": 4} | sizes
    return Weights(draw(shapes(**sizes_given)), "dinov2 .pth")


MISFITS = {
    "ffn": (
        {"ffn": "swiglu"},
        [
            "w.pth (dinov2 .pth) does not fit the model: missing",
            "blocks.{0..2}.mlp.fc1.weight, blocks.{0..2}.mlp.fc1.bias",
            "; unknown blocks.{0..2}.mlp.w12.weight",
            "blocks.{0..2}.mlp.w3.bias",
            "the weights have SwiGLU, the model an MLP: set model.ffn=swiglu",
        ],
    ),
    "registers": (
        {"registers": 4},
        ["unknown register_tokens", "have 4 registers, the model 0: set model.registers=4"],
    ),
    "patch size": (
        {"patch": 16},
        [
            "patch_embed.proj.weight is (24, 3, 16, 16), expected (24, 3, 14, 14)",
            "have 16 pixels a patch side, the model 14: set model.patch_size=16",
        ],
    ),
    "channels": ({"channels": 4}, ["have 4 channels, the model 3: set model.in_channels=4"]),
    "size": (
        {"width": 384, "depth": 12},
        [
            "unknown blocks.{3..11}.norm1.weight",
            "blocks.{0..2}.attn.qkv.weight is (1152, 384), expected (72, 24)",
            "are 384 wide and 12 deep, the model 24 and 3: set model.size=vits",
        ],
    ),
    "depth": ({"depth": 2}, ["missing blocks.2.norm1.weight", "set model.depth=2"]),
    "grid": (
        {"grid": 6},
        [
            "pos_embed is (1, 37, 24), expected (1, 17, 24)",
            "is for 6 x 6 patches, the model has 4 x 4: set model.init_resize=true to resize it, "
            "or train at 84 pixels",
        ],
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_named_with_its_reason(case: str) -> None:
    sizes, sentences = MISFITS[case]
    said = refused(SPEC, changed(**sizes))
    assert not [sentence for sentence in sentences if sentence not in said], said


def test_the_reason_names_nothing_that_fits() -> None:
    assert refused(SPEC, changed(registers=4)).splitlines() == [
        "w.pth (dinov2 .pth) does not fit the model: unknown register_tokens",
        "  the weights have 4 registers, the model 0: set model.registers=4",
    ]
    with_four = BackboneSpec(**{**vars(SPEC), "registers": 4})
    said = refused(with_four, changed())
    assert "missing register_tokens" in said and "set model.registers=0" in said
    said = refused(SPEC, changed(patch=16))
    assert "init_resize" not in said  # another patch size changes the grid by itself
    every = Weights(STATE | {"blocks.1.extra": torch.ones(1)}, "dinov2 .pth")
    assert "the file is not complete, or of another kind" in refused(SPEC, every)


def test_every_missing_name_is_listed() -> None:
    gone = {n: x for n, x in STATE.items() if not n.endswith((".bias", "gamma", "mask_token"))}
    said = refused(SPEC, Weights(gone, "dinov2 .pth"))
    for name in set(shapes(24, 3, grid=4)) - set(gone):
        folded = name if "blocks." not in name else f"blocks.{{0..2}}.{name.split('.', 2)[2]}"
        assert folded in said, name
    assert "no LayerScale" in said


def test_heads_that_a_config_tells_are_checked() -> None:
    said = refused(SPEC, Weights(STATE, "Hugging Face", heads=3))
    assert "3 attention heads, expected 2" in said and "set model.heads=3" in said
    fit(SPEC.build(), Weights(STATE, "Hugging Face", heads=2), "w")


def test_ratio_of_the_feed_forward_layer() -> None:
    said = refused(BackboneSpec(**{**vars(SPEC), "mlp_ratio": 2.0}), changed())
    assert "are 96 wide, the model's 48: set model.mlp_ratio to about 4" in said


@pytest.mark.parametrize("ratio", [1.0, 2.0, 3.0, 4.0, 2.75])
@pytest.mark.parametrize("width", [16, 48, 130, 384])
def test_the_ratio_of_a_swiglu_is_read_back(width: int, ratio: float) -> None:
    """A whole one as a whole one, of small networks too: its width is rounded up a long way."""
    sizes = {"patch_size": 7, "width": width, "depth": 1, "heads": 2, "ffn": "swiglu"}
    with torch.device("meta"):
        facts = Facts.of(BackboneSpec(28, **sizes, mlp_ratio=ratio).build().state_dict())
        again = BackboneSpec(28, **sizes, mlp_ratio=facts.mlp_ratio).build().state_dict()
    assert Facts.of(again) == facts
    assert facts.mlp_ratio == int(facts.mlp_ratio) or ratio != int(ratio)


@pytest.mark.parametrize("antialias", [True, False])
def test_position_embeddings_are_resized_on_request(antialias: bool) -> None:
    spec = BackboneSpec(**{**vars(SPEC), "interpolate_antialias": antialias})
    large = changed(grid=6)
    backbone = spec.build()
    fit(backbone, large, "w.pth", resize=True)
    table = large.state["pos_embed"][0, 1:].view(6, 6, 24).permute(2, 0, 1)[None]
    resized = F.interpolate(table, (4, 4), mode="bicubic", antialias=antialias)[0]
    expected = resized.permute(1, 2, 0).reshape(16, 24)
    assert torch.equal(backbone.pos_embed[0, 1:], expected)
    assert torch.equal(backbone.pos_embed[0, 0], large.state["pos_embed"][0, 0])
    # So at the new size it is the same model as the one at the old size.
    native = BackboneSpec(**{**vars(spec), "image_size": 84}).build()
    fit(native, large, "w.pth")
    x = torch.randn(2, 3, 56, 56)
    assert torch.equal(backbone(x), native(x))
    others = {n: x for n, x in backbone.state_dict().items() if n != "pos_embed"}
    assert all(torch.equal(x, large.state[name]) for name, x in others.items())


def test_resizing_does_not_hide_other_mistakes() -> None:
    assert "unknown register_tokens" in refused(SPEC, changed(grid=6, registers=2), resize=True)
    odd = Weights(STATE | {"pos_embed": torch.zeros(1, 7, 24)}, "dinov2 .pth")
    said = refused(SPEC, odd, resize=True)
    assert "pos_embed is (1, 7, 24), expected (1, 17, 24)" in said
    assert "for 6 patches, which is no square" in said


def test_half_precision_files_become_the_models_type() -> None:
    half = Weights({name: x.half() for name, x in STATE.items()}, "dinov2 .pth")
    real, meta = SPEC.build(), SPEC.build().to("meta")
    for backbone in (real, meta):
        fit(backbone, half, "w.pth")
        assert backbone.pos_embed.dtype == torch.float32
        assert torch.equal(backbone.pos_embed, half.state["pos_embed"].float())


class Anything:
    """What a pickle could hold beside tensors."""


def test_what_is_no_backbone_is_refused(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(PipelineError) as error:
            read_weights(path)
        return str(error.value)

    missing = said(tmp_path / "nowhere.pth")
    assert f"there is no {tmp_path / 'nowhere.pth'}" in missing
    assert "give a dinov2 .pth file, a Hugging Face folder" in missing
    (tmp_path / "empty").mkdir()
    assert "has no config.json (found: nothing)" in said(tmp_path / "empty")
    for name, config in {
        "bert": {"model_type": "bert"},
        "list": [],
        "eps": {"model_type": "dinov2", "layer_norm_eps": 1e-12},
        "weightless": {"model_type": "dinov2"},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    assert "is of another kind of model (bert)" in said(tmp_path / "bert")
    assert "no JSON object" in said(tmp_path / "list")
    assert "layer_norm_eps=1e-12, DINOv2 has 1e-06" in said(tmp_path / "eps")
    assert "no model.safetensors in" in said(tmp_path / "weightless")
    index = {"weight_map": {"a": "../eps/config.json"}}
    (tmp_path / "weightless" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names ../eps/config.json, which is not there" in said(tmp_path / "weightless")
    torch.save({"a": torch.ones(1), "b": 2}, tmp_path / "other.pth")
    assert "holds no backbone: 1 names, such as a; expected cls_token" in said(
        tmp_path / "other.pth"
    )
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds a list, no state dict" in said(tmp_path / "list.pth")
    torch.save({"model": STATE, "args": Anything()}, tmp_path / "pickle.pth")
    assert "cannot be read as tensors alone" in said(tmp_path / "pickle.pth")
    (tmp_path / "text.pth").write_text("hello")
    assert "cannot be read as tensors alone" in said(tmp_path / "text.pth")
    save_file(STATE, tmp_path / "cut.safetensors")
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    assert "is no whole safetensors file" in said(tmp_path / "cut.safetensors")
