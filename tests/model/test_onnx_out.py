"""Backbones as ONNX: the files against torch, at sizes whose position embeddings are resized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.onnx_out import (
    KINDS,
    OPSET,
    OnnxFile,
    SessionModule,
    at_size,
    save_onnx,
)
from pipeline.model.pair import BackboneSpec
from pipeline.model.vit import VisionTransformer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.long
SIZES = [28, 42, 56]  # 28 is the native one
PIXELS = Preprocessing(None, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), (0, 4095))


def backbone(registers: int = 2, antialias: bool = True) -> VisionTransformer:
    torch.manual_seed(3)
    spec = BackboneSpec(
        image_size=28,
        width=48,
        depth=2,
        heads=3,
        registers=registers,
        layer_scale=1.0,
        interpolate_antialias=antialias,
        interpolate_offset=0.0 if antialias else 0.1,
    )
    built = spec.build().eval()
    with torch.no_grad():  # else position and tokens are too small to be seen
        built.pos_embed.normal_()
        built.cls_token.normal_()
    return built


def images(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


def run(file: OnnxFile, x: Tensor) -> dict[str, np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(str(file.path), providers=["CPUExecutionProvider"])
    names = [out.name for out in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": x.numpy()}), strict=True))


@pytest.mark.parametrize(
    ("registers", "antialias", "kinds"), [(2, True, KINDS), (0, False, ("fp32",))]
)
def test_each_size_equals_torch(
    tmp_path: Path, registers: int, antialias: bool, kinds: tuple[str, ...]
) -> None:
    network = backbone(registers, antialias)
    files = save_onnx(network, tmp_path / "onnx", SIZES, PIXELS, kinds)
    assert [(file.kind, file.size) for file in files] == [
        (kind, size) for size in SIZES for kind in kinds
    ]
    assert sorted(p.name for p in (tmp_path / "onnx").iterdir()) == sorted(
        file.path.name for file in files
    )
    allowed = {"fp32": 1e-5, "fp16": 5e-3, "int8": 0.15}
    for file in files:
        for count in (1, 3):
            x = images(count, file.size)
            out = run(file, x)
            with torch.no_grad():
                expected = network.forward_features(x)
            for name, key in (("cls", "x_norm_clstoken"), ("patches", "x_norm_patchtokens")):
                truth = expected[key]
                assert truth is not None and out[name].dtype == np.float32
                error = np.abs(out[name] - truth.numpy()).max() / float(truth.abs().max())
                assert error < allowed[file.kind], (file, name, error)


def test_what_stands_in_the_file(tmp_path: Path) -> None:
    network = backbone()
    whole, half, small = save_onnx(network, tmp_path / "onnx", [28], PIXELS)
    digests = set()
    for file in (whole, half, small):
        model = onnx.load(file.path)
        onnx.checker.check_model(model)
        facts = {entry.key: entry.value for entry in model.metadata_props}
        digests.add(facts.pop("digest"))
        facts.pop("onnx.infer", None)  # onnxruntime's, of int8
        assert {name: json.loads(value) for name, value in facts.items()} == {
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.25, 0.3],
            "image_size": 28,
            "patch_size": 14,
            "value_range": [0, 4095],
        }
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == OPSET
        shapes = {
            value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in [*model.graph.input, *model.graph.output]
        }
        assert shapes == {
            "image": ["batch", 3, 28, 28],
            "cls": ["batch", 48],
            "patches": ["batch", 4, 48],
        }
    assert len(digests) == 1
    assert half.bytes < 0.7 * whole.bytes and small.bytes < 0.7 * whole.bytes


@pytest.mark.parametrize("broken", ["cls", "patches"])
def test_features_that_are_no_numbers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def outputs(session: SessionModule, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            features = network.forward_features(x)
        both = {"cls": features["x_norm_clstoken"], "patches": features["x_norm_patchtokens"]}
        return both | {broken: both[broken] * float("nan")}

    network = backbone()
    monkeypatch.setattr(SessionModule, "outputs", outputs)
    for kind in ("fp32", "int8"):
        with pytest.raises(PipelineError, match=rf"{kind}-28.onnx gives other features .*nan"):
            save_onnx(network, tmp_path / "onnx", [28], PIXELS, [kind])


@pytest.mark.slow
def test_large_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for models of over 1 GiB."""
    monkeypatch.setattr("pipeline.model.onnx_out.INLINE", 0)
    network = backbone()
    for file in save_onnx(network, tmp_path / "onnx", [28], PIXELS):
        assert file.path.stat().st_size < 0.5 * file.bytes, file
        x = images(3, 28)
        with torch.no_grad():
            truth = network(x).numpy()
        assert np.abs(run(file, x)["cls"] - truth).max() / np.abs(truth).max() < 0.1, file
        model = onnx.load(file.path, load_external_data=False)
        assert "digest" in {entry.key for entry in model.metadata_props}


def test_a_size_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no images of 30 x 30 pixels"):
        save_onnx(backbone(), tmp_path / "onnx", [28, 30], PIXELS)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if "script" in name else 1)
    with pytest.raises(PipelineError, match="needs the packages onnxscript"):
        save_onnx(backbone(), tmp_path / "onnx", [28], PIXELS)


@pytest.mark.slow
def test_timm_models(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    from pipeline.model.foreign import TimmSpec

    for name, sizes in (("vit_tiny_patch16_224", [32, 48]), ("resnet10t", [64])):
        torch.manual_seed(0)
        network = TimmSpec(name, image_size=sizes[0], patch_size=16).build().eval()
        for file in save_onnx(network, tmp_path / name, sizes, PIXELS, ["fp32"]):
            x = images(3, file.size)
            with torch.no_grad():
                truth = network(x).numpy()
            out = run(file, x)["cls"]
            assert np.abs(out - truth).max() / np.abs(truth).max() < 1e-4
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            f"fp32-{size}.onnx" for size in sizes
        }


def test_a_copy_for_a_size_has_that_grid_and_leaves_the_network() -> None:
    network = backbone()
    before = network.pos_embed.detach().clone()
    assert at_size(network, 56, 3).pos_embed.shape == (1, 17, 48)  # type: ignore[union-attr]
    assert torch.equal(network.pos_embed, before)
