"""Facts read off weights that were planted: each size comes back, from every form of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.adapt import facts as facts_module
from pipeline.adapt.derive import derive
from pipeline.adapt.facts import facts_of
from pipeline.config.config import Config
from pipeline.config.load import load
from pipeline.errors import PipelineError
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.encoders.module import ModuleSpec
from pipeline.model.encoders.source import Name, read_source
from pipeline.model.foreign import TimmSpec
from pipeline.model.foreign_weights import save_foreign, save_module
from pipeline.model.vit import BackboneSpec
from pipeline.model.weights import save_backbone, save_huggingface, save_timm
from pipeline.train import build

SPEC = BackboneSpec(
    image_size=56,
    patch_size=8,
    width=32,
    depth=3,
    heads=2,
    mlp_ratio=2.0,
    registers=2,
    in_channels=4,
    layer_scale=0.1,
)
MEAN, STD = (0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)
PLANTED = {
    "model.encoder": "dinov2",
    "model.width": 32,
    "model.depth": 3,
    "model.heads": 2,
    "model.patch_size": 8,
    "model.in_channels": 4,
    "model.mlp_ratio": 2.0,
    "model.ffn": "mlp",
    "model.registers": 2,
    "model.interpolate_offset": 0.0,
    "model.interpolate_antialias": True,
}


def asked(init: object, *fields: str) -> Config:
    return load([f"model.init={init}", "adapt.enabled=true", *fields])


def known(values: dict[str, object], names: object) -> dict[str, object]:
    return {name: values[name] for name in values if name in names}  # type: ignore[operator]


def test_an_export_of_ours(tmp_path: Path) -> None:
    place = save_backbone(SPEC.build(), SPEC, tmp_path / "dinov2")
    alone = facts_of(asked(place))
    assert "augment.mean" not in alone.values  # this form says nothing of it
    save_huggingface(SPEC.build(), SPEC, tmp_path / "huggingface", Preprocessing(56, MEAN, STD))
    facts_module._facts.cache_clear()
    facts = facts_of(asked(place))
    assert known(facts.values, PLANTED) == PLANTED
    assert facts.values["augment.mean"] == pytest.approx(MEAN)
    assert facts.values["augment.std"] == pytest.approx(STD)
    assert (facts.image_size, facts.own_grid, facts.patch_size) == (56, 56, 8)
    assert (facts.width, facts.depth, facts.has_heads) == (32, 3, False)
    assert facts.parameters == sum(x.numel() for x in SPEC.build().parameters())


@pytest.mark.parametrize("form", ["huggingface", "timm"])
def test_what_the_libraries_read(tmp_path: Path, form: str) -> None:
    save = save_huggingface if form == "huggingface" else save_timm
    place = save(SPEC.build(), SPEC, tmp_path / form, Preprocessing(56, MEAN, STD))
    facts = facts_of(asked(place))
    assert known(facts.values, PLANTED) == PLANTED
    assert facts.values["augment.std"] == pytest.approx(STD)


def test_a_pth_without_registers_resizes_as_it_was_trained(tmp_path: Path) -> None:
    spec = BackboneSpec(image_size=70, patch_size=14, width=128, depth=2, heads=2, registers=0)
    torch.save(spec.build().state_dict(), tmp_path / "a.pth")
    facts = facts_of(asked(tmp_path / "a.pth"))
    assert facts.values["model.registers"] == 0
    assert facts.values["model.interpolate_offset"] == 0.1
    assert facts.values["model.interpolate_antialias"] is False
    assert facts.values["model.heads"] == 2  # 64 wide, as in every DINOv2
    assert "augment.mean" not in facts.values  # nothing says it: ImageNet's stay


def test_a_timm_encoder_of_ours(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    backbone = TimmSpec("resnet10t", image_size=64).build()
    place = save_foreign(backbone, tmp_path / "timm", Preprocessing(None, MEAN[:3], STD[:3]))
    facts = facts_of(asked(place))
    assert facts.values["model.encoder"] == "timm:resnet10t"
    assert facts.values["augment.mean"] == pytest.approx(MEAN[:3])
    assert (facts.image_size, facts.own_grid, facts.patch_size) == (64, None, 0)
    assert facts.batch_norm
    assert facts.has_layers and facts.depth == 0


def test_a_timm_folder_of_another_kind_and_a_loose_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3}
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = facts_of(asked(tmp_path))
    assert facts.values["model.encoder"] == "timm:vit_tiny_patch16_224"  # it has no LayerScale
    assert facts.values["augment.std"] == [0.25] * 3
    assert (facts.patch_size, facts.depth, facts.image_size) == (16, 12, 32)
    assert not facts.batch_norm
    assert facts_of(asked(f"timm:local-dir:{tmp_path}")) == facts
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "loose.safetensors")
    with pytest.raises(PipelineError):
        facts_of(asked(tmp_path / "loose.safetensors"))
    named = facts_of(asked(tmp_path / "loose.safetensors", "model.encoder=timm:resnet10t"))
    assert named.patch_size == 0


def test_places_that_cannot_be_hidden_are_no_patches_to_hide(tmp_path: Path) -> None:
    name = "pipeline.model.encoders.residual:small_map"
    files = read_source(Name.of(f"module:{name}"))
    backbone = ModuleSpec(name, 32, 8, files=files).build()
    assert backbone.has_patches and not backbone.takes_masks
    facts = facts_of(
        asked(save_module(backbone, tmp_path / "module", Preprocessing(None, MEAN[:3], STD[:3])))
    )
    assert facts.patch_size == 0 and facts.values["model.patch_size"] == 8
    recipe = derive(asked("/w"), facts, 10_000, True)
    assert recipe.value("loss.ibot_weight") == 0 and recipe.value("head.norm") == "batch"
    assert recipe.value("optim.lr") == 0.00267  # that of convolutional networks
    build.pair(recipe.applied(asked("/w")))


def test_nothing_to_adapt_is_said() -> None:
    with pytest.raises(PipelineError, match=r"model\.init is empty"):
        facts_of(asked(""))
    with pytest.raises(PipelineError, match="there is no"):
        facts_of(asked("/nowhere/at/all.pth"))
