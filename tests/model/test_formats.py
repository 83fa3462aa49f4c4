"""Weights out, against transformers and timm: the same numbers, there and back."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.formats import preprocessor_config, timm_transform
from pipeline.model.vit import BackboneSpec, VisionTransformer
from pipeline.model.weights import (
    Weights,
    agreement,
    fit,
    load_backbone,
    read_weights,
    save_backbone,
    save_huggingface,
    save_timm,
    verify_huggingface,
    verify_timm,
    without_huggingface,
)
from pipeline.views.crops import resize_centre_crop
from tests.model.official import OFFICIAL, draw, shapes

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SIZES = [(224, 224), (518, 518), (224, 280)]
TINY: dict[str, Any] = {"image_size": 224, "width": 48, "depth": 3, "heads": 3}
PLAIN: dict[str, Any] = {"registers": 0, "interpolate_antialias": False}
CASES: dict[str, dict[str, Any]] = {
    "registers": {},
    "registers, swiglu": {"ffn": "swiglu"},
    "one register, patch 16, grey": {"registers": 1, "patch_size": 16, "in_channels": 1},
    "no registers": PLAIN,
    "no registers, swiglu": PLAIN | {"ffn": "swiglu"},
    "no registers, antialias": {"registers": 0},
    "registers, no antialias": {"interpolate_antialias": False},
    "official training": PLAIN | {"interpolate_offset": 0.1},
    "mlp ratio 2": {"mlp_ratio": 2.0, "width": 96},
}
# which of the two agrees with us away from the native size (golden values of the reference)
HUGGINGFACE_EVERYWHERE = [name for name in CASES if name not in (
    "no registers, antialias", "registers, no antialias", "official training")]  # fmt: skip
TIMM_EVERYWHERE = [name for name in CASES if CASES[name].get("interpolate_antialias", True)]


def made(spec: BackboneSpec, seed: int = 0) -> VisionTransformer:
    """A backbone in which every tensor matters; LayerScale starts at 1e-5 and would hide errors."""
    backbone = spec.build().eval()
    drawn = draw({name: tuple(x.shape) for name, x in backbone.state_dict().items()}, seed)
    fit(backbone, Weights(drawn, "drawn"), "here")
    return backbone


def tokens(backbone: VisionTransformer, x: Tensor) -> Tensor:
    return backbone.norm(backbone.packed([x], [None]).views()[0])


def sized(spec: BackboneSpec) -> list[tuple[int, int]]:
    """The sizes for a patch of 16: 518 is not a multiple."""
    patch = spec.patch_size
    return [(h // patch * patch, w // patch * patch) for h, w in SIZES]


def differences(spec: BackboneSpec, ours: VisionTransformer, theirs: Any) -> list[float]:
    """Largest differences over all tokens, native size first."""
    largest = []
    for height, width in sized(spec):
        x = torch.randn(1, spec.in_channels, height, width)
        largest.append((tokens(ours, x) - theirs(x)).abs().max().item())
    return largest


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="needs transformers (the compat extra)")


@pytest.fixture(scope="module")
def timm() -> Any:
    return pytest.importorskip("timm", reason="needs timm (the compat extra)")


def colours(spec: BackboneSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return MEAN[: spec.in_channels], STD[: spec.in_channels]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_transformers_gives_the_same(case: str, transformers: Any, tmp_path: Path) -> None:
    spec = BackboneSpec(**(TINY | CASES[case]))
    backbone = made(spec)
    save_huggingface(backbone, spec, tmp_path, Preprocessing(224, *colours(spec)))
    model = transformers.AutoModel.from_pretrained(tmp_path, local_files_only=True).eval()
    kind = "Dinov2WithRegistersModel" if spec.registers else "Dinov2Model"
    assert type(model).__name__ == kind
    apart = differences(spec, backbone, lambda x: model(x).last_hidden_state)
    assert apart[0] == 0.0
    assert (apart == [0.0, 0.0, 0.0]) == (case in HUGGINGFACE_EVERYWHERE), apart
    x = torch.randn(2, spec.in_channels, *sized(spec)[0])
    assert torch.equal(model(x).pooler_output, backbone(x))
    said = verify_huggingface(backbone, spec, tmp_path)
    native = f"{spec.image_size} x {spec.image_size}"
    away = f"{spec.image_size - spec.patch_size} x {spec.image_size + spec.patch_size}"
    where = f"{native} and {away}" if case in HUGGINGFACE_EVERYWHERE else native
    assert said == f"equal to the bit in transformers {transformers.__version__} at {where}"


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_timm_gives_the_same(case: str, timm: Any, tmp_path: Path) -> None:
    spec = BackboneSpec(**(TINY | CASES[case]))
    backbone = made(spec)
    save_timm(backbone, spec, tmp_path, Preprocessing(224, *colours(spec)))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(model).__name__ == "VisionTransformer"
    apart = differences(spec, backbone, model.forward_features)
    assert apart[0] == 0.0
    assert (apart == [0.0, 0.0, 0.0]) == (case in TIMM_EVERYWHERE), apart
    x = torch.randn(2, spec.in_channels, *sized(spec)[0])
    assert torch.equal(model(x), backbone(x))
    assert f"equal to the bit in timm {timm.__version__}" in verify_timm(backbone, spec, tmp_path)


@torch.no_grad()
def test_masks_mean_the_same_in_transformers(transformers: Any, tmp_path: Path) -> None:
    spec = BackboneSpec(**TINY)
    backbone = made(spec)
    save_huggingface(backbone, spec, tmp_path, Preprocessing(224, MEAN, STD))
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    x, masks = torch.randn(2, 3, 224, 280), torch.rand(2, 16 * 20) < 0.4
    theirs = model(x, bool_masked_pos=masks).last_hidden_state
    ours = backbone.forward_features(x, masks)
    assert torch.equal(theirs[:, 0], ours["x_norm_clstoken"])
    assert torch.equal(theirs[:, 5:], ours["x_norm_patchtokens"])


@torch.no_grad()
def test_the_order_of_gate_and_value_matters(timm: Any, tmp_path: Path) -> None:
    """Were the halves of SwiGLU swapped on both ways, only another library would tell."""
    spec = BackboneSpec(**TINY, ffn="swiglu")
    backbone = made(spec)
    save_timm(backbone, spec, tmp_path, Preprocessing(224, MEAN, STD))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(model.forward_features(x), tokens(backbone, x))
    for block in model.blocks:
        block.mlp.fc1.weight.copy_(block.mlp.fc1.weight.roll(len(block.mlp.fc1.weight) // 2, 0))
    assert (model.forward_features(x) - tokens(backbone, x)).abs().max() > 0.01


def test_the_image_processor_is_the_recipes(transformers: Any, tmp_path: Path) -> None:
    from PIL import Image

    spec = BackboneSpec(**TINY)
    save_huggingface(made(spec), spec, tmp_path, Preprocessing(224, MEAN, STD))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, local_files_only=True)
    assert type(processor).__name__.startswith("BitImageProcessor")
    assert (processor.size["height"], processor.size["width"]) == (256, 256)
    assert processor.crop_size["height"] == 224
    grey = Image.fromarray(np.full((300, 400, 3), 51, np.uint8))
    pixels = processor(grey, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    expected = (0.2 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(pixels[0, :, 100, 100], expected)


def test_timm_knows_the_recipes_colours(timm: Any, tmp_path: Path) -> None:
    spec = BackboneSpec(**TINY)
    save_timm(made(spec), spec, tmp_path, Preprocessing(280, MEAN, STD))
    model = timm.create_model(f"local-dir:{tmp_path}")
    settings = timm.data.resolve_model_data_config(model)
    assert (tuple(settings["mean"]), tuple(settings["std"])) == (MEAN, STD)
    assert tuple(settings["input_size"]) == (3, 280, 280)
    assert settings["interpolation"] == "bicubic"


def test_both_processors_make_the_pixels_of_our_evaluation(
    transformers: Any, timm: Any, tmp_path: Path
) -> None:
    """At every size: sides that are odd, tiny, longer than wide, below the crop and just above."""
    from PIL import Image

    sizes = [(96, 131), (120, 97), (97, 97), (40, 40), (50, 70), (1, 1), (1, 300), (300, 7), (5, 6)]
    scale, shift = 255 * torch.tensor(STD)[:, None, None], torch.tensor(MEAN)[:, None, None]
    for crop in (7, 33, 48, 64, 98, 224):
        config = preprocessor_config(Preprocessing(crop, MEAN, STD))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
        resolved = timm.data.resolve_data_config(
            pretrained_cfg=timm_transform(Preprocessing(crop, MEAN, STD))
        )
        transform = timm.data.create_transform(**resolved)
        for height, width in sizes:
            rng = np.random.default_rng(height * width)
            low = Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8))
            image = low.resize((width, height), Image.Resampling.BICUBIC)
            ours = torch.from_numpy(resize_centre_crop(np.asarray(image), crop)).permute(2, 0, 1)
            huggingface = processor(images=image, return_tensors="pt")["pixel_values"][0]
            processed = {"Hugging Face": huggingface, "timm": transform(image)}
            for name, pixels in processed.items():
                off = (pixels * scale + 255 * shift - ours).abs().mean().item()
                assert off < 0.3, f"{name}, crop {crop}, {height} x {width}: {off} of 255"


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True])
@torch.no_grad()
def test_a_folder_that_transformers_wrote(
    registers: int, swiglu: bool, transformers: Any, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 14}
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    more = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, **more, use_swiglu_ffn=swiglu, image_size=224
    )
    theirs = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    spec = BackboneSpec(
        **TINY, registers=registers, ffn="swiglu" if swiglu else "mlp",
        interpolate_antialias=registers > 0,
    )  # fmt: skip
    weights = read_weights(tmp_path)
    assert (weights.origin, weights.heads) == ("Hugging Face", 3)
    assert weights.note == "Left out: classifier (2)."
    backbone = spec.build().eval()
    fit(backbone, weights, str(tmp_path))
    inner = theirs.base_model
    assert differences(spec, backbone, lambda x: inner(x).last_hidden_state) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("embed_class", [False, True])
@pytest.mark.parametrize("single", [False, True])
@torch.no_grad()
def test_a_folder_that_timm_wrote(
    registers: int, embed_class: bool, single: bool, timm: Any, tmp_path: Path
) -> None:
    options = {"img_size": 224, "embed_dim": 48, "depth": 3, "num_heads": 3, "init_values": 0.5}
    options |= {"reg_tokens": registers, "no_embed_class": not embed_class, "patch_size": 14}
    model = timm.create_model(
        "vit_small_patch14_dinov2", **options, dynamic_img_size=True, num_classes=10
    ).eval()
    randomise(model)
    timm.models.save_for_hf(model, tmp_path, model_args=options, safe_serialization=True)
    weights = read_weights(tmp_path / "model.safetensors" if single else tmp_path)
    assert weights.origin == "timm"
    assert weights.heads == (None if single else 3)
    assert "Left out: head (2). It has no mask token; a fresh one (0) is used." in weights.note
    assert ("CLS token holds its position" in weights.note) == (not embed_class)
    assert not weights.state["mask_token"].any()
    assert (not weights.state["pos_embed"][:, 0].any()) == (not embed_class)
    spec = BackboneSpec(**TINY, registers=registers)
    backbone = spec.build().eval()
    fit(backbone, weights, str(tmp_path))
    apart = differences(spec, backbone, model.forward_features)
    # A register with a position is added up once here, for every image there: the same sum.
    assert apart == [0.0, 0.0, 0.0]


def randomise(model: nn.Module) -> None:
    state = model.state_dict()
    drawn = draw({name: tuple(x.shape) for name, x in state.items()})
    for name in drawn:
        if "lambda1" in name:  # their LayerScale
            drawn[name] += 1.0
    model.load_state_dict(drawn)


BIG = [
    pytest.param("S", 0, None, id="S"),
    pytest.param("S", 4, None, id="S with registers"),
    pytest.param("B", 4, 3, id="B with registers, 3 blocks"),
    pytest.param("g", 0, 1, id="g, 1 block"),
    pytest.param("g", 4, 1, id="g with registers, 1 block"),
    *(
        pytest.param(size, registers, None, id=f"{size}, {registers} registers, whole",
                     marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
        for size in ("B", "L", "g") for registers in (0, 4)
    ),
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("size", "registers", "blocks"), BIG)
@torch.no_grad()
def test_official_weights_go_through_all_formats(
    size: str, registers: int, blocks: int | None, transformers: Any, tmp_path: Path
) -> None:
    """dinov2 `.pth` -> ours -> Hugging Face folder -> transformers -> its folder -> ours."""
    width, depth, heads, ffn = OFFICIAL[size]
    depth = blocks or depth
    names = shapes(width, depth, ffn, registers)
    torch.save(draw(names, seed=1), tmp_path / "official.pth")
    spec = BackboneSpec(
        image_size=518, width=width, depth=depth, heads=heads, ffn=ffn, registers=registers,
        interpolate_antialias=registers > 0,
    )  # fmt: skip
    with torch.device("meta"):
        backbone = spec.build().eval()
    fit(backbone, read_weights(tmp_path / "official.pth"), "official.pth")
    backbone, spec = load_backbone(save_backbone(backbone, spec, tmp_path / "own"))
    shutil.rmtree(tmp_path / "own")
    save_huggingface(backbone, spec, tmp_path / "ours", Preprocessing(518, MEAN, STD))
    model = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    for height, side in SIZES[:: 2 if blocks else 1]:  # few blocks of a wide one: not at 518
        x = torch.randn(1, 3, height, side)
        assert torch.equal(model(x).last_hidden_state, tokens(backbone, x))
    del backbone
    model.save_pretrained(tmp_path / "theirs")
    del model
    gc.collect()
    again = read_weights(tmp_path / "theirs")
    assert again.heads == heads
    assert {name: tuple(x.shape) for name, x in again.state.items()} == names
    expected = torch.load(tmp_path / "official.pth", weights_only=True, mmap=True)
    assert all(torch.equal(x, expected[name]) for name, x in again.state.items())
    shutil.rmtree(tmp_path)  # 13 GB of g: too much to leave behind


def test_every_sentence_of_agreement() -> None:
    said = {name: agreement(BackboneSpec(**(TINY | CASES[name]))) for name in CASES}
    assert said["registers"] == (
        "dinov2, Hugging Face and timm give the same features at every size."
    )
    assert said["no registers"].startswith("Hugging Face gives the same features at every size, t")
    assert said["no registers, antialias"].startswith("timm gives the same features at every size")
    for name in ("registers, no antialias", "official training"):
        assert said[name].startswith("Hugging Face and timm give the same features at 224 x 224 o")
    assert "an offset of 0.1" in said["official training"]


def test_what_hugging_face_has_no_model_for(tmp_path: Path) -> None:
    spec = BackboneSpec(**TINY, mlp_ratio=3.5)
    assert "whole numbers as mlp_ratio" in without_huggingface(spec)
    assert agreement(spec).endswith("not 3.5; timm gives the same features at every size.")
    assert without_huggingface(BackboneSpec()) == ""
    with pytest.raises(PipelineError, match=r"whole numbers as mlp_ratio only, not 3\.5"):
        save_huggingface(spec.build(), spec, tmp_path, Preprocessing(224, MEAN, STD))


# 88 wide: 480 / 88 * 88 is a little under 480 in floating point, and timm rounds down.
@pytest.mark.parametrize(("ratio", "width"), [(3.5, 48), (2.6, 48), (4.0, 88)])
@torch.no_grad()
def test_odd_ratios_in_timm(ratio: float, width: int, timm: Any, tmp_path: Path) -> None:
    for ffn in ("mlp", "swiglu"):
        sizes = TINY | {"width": width, "heads": width // 8}
        spec = BackboneSpec(**sizes, mlp_ratio=ratio, ffn=ffn)
        backbone = made(spec)
        save_timm(backbone, spec, tmp_path / ffn, Preprocessing(224, MEAN, STD))
        assert "equal to the bit" in verify_timm(backbone, spec, tmp_path / ffn)


def test_a_wrong_file_is_noticed_without_the_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("transformers", "timm"):
        monkeypatch.setitem(__import__("sys").modules, name, None)  # as if not installed
    spec = BackboneSpec(**(TINY | {"image_size": 28}))
    backbone = made(spec)
    for save, verify in ((save_huggingface, verify_huggingface), (save_timm, verify_timm)):
        folder = tmp_path / save.__name__
        save(backbone, spec, folder, Preprocessing(28, MEAN, STD))
        assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
        assert verify(backbone, spec, folder).startswith("not compared (import of ")
        other = made(spec, seed=1)
        with pytest.raises(PipelineError, match=r"differs from the model in \d+ tensors, first"):
            verify(other, spec, folder)


def test_a_wrong_config_is_noticed_with_the_libraries(
    transformers: Any, timm: Any, tmp_path: Path
) -> None:
    spec = BackboneSpec(**TINY)
    backbone = made(spec)
    save_huggingface(backbone, spec, tmp_path / "h", Preprocessing(224, MEAN, STD))
    change(tmp_path / "h", layer_norm_eps=1e-6, num_register_tokens=4, hidden_act="gelu")
    verify_huggingface(backbone, spec, tmp_path / "h")
    change(tmp_path / "h", num_attention_heads=6)
    with pytest.raises(PipelineError, match="6 attention heads, expected 3"):
        verify_huggingface(backbone, spec, tmp_path / "h")
    save_timm(backbone, spec, tmp_path / "t", Preprocessing(224, MEAN, STD))
    options = json.loads((tmp_path / "t" / "config.json").read_text())["model_args"]
    change(tmp_path / "t", model_args=options | {"act_layer": "relu"})
    with pytest.raises(PipelineError, match=r"gives other features in timm .* at 224 x 224 pixels"):
        verify_timm(backbone, spec, tmp_path / "t")


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
