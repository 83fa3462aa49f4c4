"""Weights that were damaged or edited: one sentence each, whatever reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.model.vit import BackboneSpec
from pipeline.model.weights import load_backbone, read_weights, save_backbone

SPEC = BackboneSpec(image_size=16, patch_size=8, width=8, depth=1, heads=2)


def ends(call: Callable[..., object], *arguments: object) -> str:
    """What is wrong with how a call ends; a result and a sentence are fine."""
    try:
        call(*arguments)
    except PipelineError as error:
        return "" if "\n" not in error.what.strip() else f"no sentence: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_torch_files(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "weights.pth"
    torch.save(SPEC.build().state_dict(), file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    assert read_weights(file).state["cls_token"].shape == (1, 1, 8)
    size, wrong = len(whole), []
    for cut in (0, 1, 2, 3, 7, 10, 40, 100, size // 3, size // 2, size - 300, size - 30, size - 1):
        file.write_bytes(whole[:cut])
        wrong += [f"cut {cut}: {end}" for end in [ends(read_weights, file)] if end]
    for start in [*range(0, 200, 7), size // 2, size - 100, size - 20]:
        changed = bytearray(whole)
        changed[start : start + 8] = b"\xff" * 8
        file.write_bytes(changed)
        wrong += [f"hit {start}: {end}" for end in [ends(read_weights, file)] if end]
    for value in (5, [1], "x", {"teacher": 5}, {"model": [1]}, {"cls_token": 5}, {1: 2}, {}):
        torch.save(value, file, _use_new_zipfile_serialization=zipped)
        end = ends(read_weights, file)
        wrong += [f"{value}: {end}"] * bool(end)
        with pytest.raises(PipelineError):
            read_weights(file)
    assert not wrong, "\n".join(wrong)


def test_edited_configs(tmp_path: Path) -> None:
    good = save_backbone(SPEC.build(), SPEC, tmp_path / "good")
    base, folder, wrong = json.loads((good / "config.json").read_text()), tmp_path / "changed", []
    odd = (None, -1, 0, 1.5, 1e30, float("nan"), "x", "", [], {}, True, 2**70, 10**6)
    texts = [json.dumps(base | {key: value}) for key in base for value in odd]
    texts += ["", "[]", "null", "5", '"x"', "{", "[" * 100_000, '{"format":"raydino-backbone-1"}']
    for kind in ('["dinov2"]', "{}", "5", '"dinov2"', "null"):
        texts.append(f'{{"model_type": {kind}}}')
    for arguments in ("5", "[1]", '"x"', '{"no_embed_class": []}', "null"):
        texts.append(f'{{"architecture": 1, "model_args": {arguments}}}')
        texts.append(f'{{"architecture": "x", "raydino_spec": {arguments}}}')
    shutil.copytree(good, folder)
    for text in texts:
        (folder / "config.json").write_text(text)
        for call in (read_weights, load_backbone):
            end = ends(call, folder)
            wrong += [f"{call.__name__} {text[:150]}: {end}"] * bool(end)
    assert not wrong, "\n".join(wrong)
    (folder / "config.json").write_text(json.dumps(base | {"patch_size": True}))
    with pytest.raises(PipelineError, match="has patch_size=true, which is no int"):
        load_backbone(folder)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, bytes(range(256)), b"\xff" * 20])
def test_a_damaged_safetensors_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(PipelineError, match="no whole safetensors file"):
        read_weights(file)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": 5}, {"weight_map": {"a": 1}}, {"weight_map": []}]
)
def test_an_edited_index(tmp_path: Path, index: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PipelineError):
        read_weights(tmp_path)
