"""Facts read off weights that were planted: each size comes back, from every form of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.adapt.derive import derive
from pipeline.adapt.facts import facts_of
from pipeline.config.config import Config
from pipeline.config.load import load
from pipeline.embed.load import timm_facts
from pipeline.errors import PipelineError
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.encoders.module import ModuleSpec
from pipeline.model.encoders.source import Name, read_source
from pipeline.model.foreign import TimmSpec
from pipeline.model.foreign_weights import fit_foreign, save_foreign, save_module
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
MODULE = "pipeline.model.encoders.residual:small_map"
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


def test_a_loose_file_says_the_size_and_the_channels_that_it_is_for(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    name = "vit_tiny_patch16_224"
    model = timm.create_model(name, img_size=64, in_chans=1)
    save_file(model.state_dict(), tmp_path / "loose.safetensors")
    facts = facts_of(asked(tmp_path / "loose.safetensors", f"model.encoder=timm:{name}"))
    assert (facts.image_size, facts.own_grid, facts.patch_size) == (64, 64, 16)
    assert facts.values["model.in_channels"] == 1
    assert "augment.mean" not in facts.values  # timm's are of three channels
    config = asked(tmp_path, "augment.mean=[0.5]", "augment.std=[0.5]")
    applied = derive(config, facts, 600, False).applied(config)
    fit_foreign(
        build.pair(applied).student.backbone, model.state_dict(), "x", applied.model.init_resize
    )


def test_weights_of_another_architecture_are_refused_before_anything_is_packed(
    tmp_path: Path,
) -> None:
    timm = pytest.importorskip("timm")
    file = tmp_path / "loose.safetensors"
    save_file(timm.create_model("resnet10t").state_dict(), file)
    sizes = ["model.patch_size=8", "augment.local_size=32"]
    for encoder in ("timm:resnet18", "timm:vit_tiny_patch16_224", f"module:{MODULE}"):
        with pytest.raises(PipelineError, match="does not fit the encoder") as caught:
            facts_of(asked(file, f"model.encoder={encoder}", *sizes))
        assert len(caught.value.what) < 600 and "model.encoder" in caught.value.hint


def test_weights_of_a_module_of_ones_own(tmp_path: Path) -> None:
    """A state dict says nothing of its module: the recipe names it, and images take 64 pixels."""
    files = read_source(Name.of(f"module:{MODULE}"))
    module = ModuleSpec(MODULE, 64, 8, files=files).build().module
    save_file(module.state_dict(), tmp_path / "own.safetensors")
    named = [f"model.encoder=module:{MODULE}", "model.patch_size=8", "augment.local_size=32"]
    fields = [*named, "augment.global_size=64"]
    config = asked(tmp_path / "own.safetensors", *fields)
    facts = facts_of(config)
    assert facts.values["model.encoder"] == f"module:{MODULE}"
    assert facts.patch_size == 0 and facts.image_size is None and facts.batch_norm
    applied = derive(config, facts, 600, False).applied(config)
    assert fit_foreign(build.pair(applied).student.backbone, module.state_dict(), "x")
    # nobody says a size: the usual one is taken, and is not called the weights' own
    open_size = asked(tmp_path / "own.safetensors", *named)
    lines = derive(open_size, facts_of(open_size), 600, False).lines
    reasons = {line.field: line.reason for line in lines}
    assert "nothing says what size" in reasons["augment.global_size"]


def test_a_module_that_is_made_for_a_size_asks_for_it(tmp_path: Path) -> None:
    name = "pipeline.model.encoders.stemmed:vit"
    module = ModuleSpec(name, 64, 8, files=read_source(Name.of(f"module:{name}"))).build().module
    save_file(module.state_dict(), tmp_path / "own.safetensors")
    fields = [f"model.encoder=module:{name}", "model.patch_size=8", "augment.local_size=32"]
    with pytest.raises(PipelineError, match="does not fit the encoder") as caught:
        facts_of(asked(tmp_path / "own.safetensors", *fields))
    assert "augment.global_size" in caught.value.hint
    facts = facts_of(asked(tmp_path / "own.safetensors", *fields, "augment.global_size=64"))
    assert facts.width == 192 and facts.values["model.patch_size"] == 8


@pytest.mark.parametrize("form", ["file", "folder", "timm's word for a folder"])
def test_facts_go_with_the_weights_that_they_are_of(tmp_path: Path, form: str) -> None:
    """In one process: the file that is there now, not the one that was there before."""
    timm = pytest.importorskip("timm")
    cfg = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.25] * 3}
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    init = {"file": f"{tmp_path}/model.safetensors", "folder": f"{tmp_path}"}.get(
        form, f"timm:local-dir:{tmp_path}"
    )
    sides = []
    for side in (32, 64):
        model = timm.create_model("vit_tiny_patch16_224", img_size=side)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        facts = facts_of(asked(init, "model.encoder=timm:vit_tiny_patch16_224"))
        sides.append(facts.own_grid)
    assert sides == [32, 64]


def test_the_digest_of_a_folder_of_timm_goes_with_its_files(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet10t"}))
    digests = set()
    for _ in range(2):
        model = timm.create_model("resnet10t", num_classes=0)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        digests |= {timm_facts(f"local-dir:{tmp_path}")[0] for _ in range(2)}
    assert len(digests) == 2


def test_facts_go_with_what_lies_beside_weights(tmp_path: Path) -> None:
    place = save_timm(SPEC.build(), SPEC, tmp_path / "a", Preprocessing(56, MEAN, STD))
    file = place / "model.safetensors"
    assert facts_of(asked(file)).values["augment.mean"] == pytest.approx(MEAN)
    save_timm(SPEC.build(), SPEC, tmp_path / "a", Preprocessing(56, STD, STD))
    assert facts_of(asked(file)).values["augment.mean"] == pytest.approx(STD)


def test_places_that_cannot_be_hidden_are_no_patches_to_hide(tmp_path: Path) -> None:
    files = read_source(Name.of(f"module:{MODULE}"))
    backbone = ModuleSpec(MODULE, 32, 8, files=files).build()
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
