"""Any file or folder that holds a backbone, as `Weights` under our names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import PipelineError, shortened
from pipeline.model.block import LAYER_NORM_EPS
from pipeline.model.fit import Weights
from pipeline.model.formats import CONFIG, FORMAT, INDEX, MODELS, WEIGHTS
from pipeline.model.names import State, from_checkpoint, from_huggingface, from_timm

Spec = TypeVar("Spec", bound=Any)
LARGEST = 2**16  # of any number that says what a network is made of
DEEPEST = 1000  # blocks
EXPECTED = (
    "give a dinov2 .pth file, a Hugging Face folder (config.json with model_type dinov2 or "
    "dinov2_with_registers), a timm folder or .safetensors file, or an export or run folder of ours"
)


def read_weights(path: str | Path) -> Weights:
    """The backbone in a file or folder, under our names.

    Accepted: a dinov2 `.pth` (raw, or a checkpoint under `teacher` or `model`; with or without
    block chunks), a Hugging Face folder (one file or shards), a timm folder or file, the folder of
    an export, a run folder that has one. Nothing is unpickled but tensors, nothing is downloaded.

    Raises:
        PipelineError: no such path, none of these, or a file that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise PipelineError(
            f"no weights: there is no {path}", f"{EXPECTED}; download hub names first"
        )
    if path.suffix == ".safetensors":
        return _named(_load_safetensors(path), path, "timm")
    return _named(_load_torch(path), path, "dinov2")


def _read_folder(path: Path) -> Weights:
    if not (path / CONFIG).is_file():
        if (path / "weights" / "dinov2" / CONFIG).is_file():
            return _read_folder(path / "weights" / "dinov2")
        names = sorted(p.name for p in path.iterdir())
        inside = ", ".join([*names[:6], *["…"] * (len(names) > 6)]) or "nothing"
        raise PipelineError(f"no weights: {path} has no {CONFIG} (found: {inside})", EXPECTED)
    config = read_json(path / CONFIG)
    if config.get("format") == FORMAT:
        return Weights(_load_folder(path), "raydino export", heads=config.get("heads"))
    if config.get("model_type") in list(MODELS):
        for field, ours in (("layer_norm_eps", LAYER_NORM_EPS), ("hidden_act", "gelu")):
            if config.get(field, ours) != ours:
                raise PipelineError(
                    f"{path / CONFIG} has {field}={config[field]}, DINOv2 has {ours}", EXPECTED
                )
        state, note = from_huggingface(_load_folder(path))
        return Weights(state, "Hugging Face", note, config.get("num_attention_heads"))
    if "architecture" in config:
        options = config.get("model_args") or {}
        if not isinstance(options, dict):
            raise PipelineError(f"{path / CONFIG} has model_args={options!r}, no object", EXPECTED)
        state, note = from_timm(_load_folder(path), options.get("no_embed_class"))
        return Weights(state, "timm", note, options.get("num_heads"))
    kind = config.get("model_type") or config.get("format") or "no model_type"
    raise PipelineError(f"{path / CONFIG} is of another kind of model ({kind})", EXPECTED)


def _named(state: Mapping[str, Any], path: Path, otherwise: str) -> Weights:
    """A single file has no config: its names say what it is."""
    if any("embeddings.cls_token" in name for name in state):
        return Weights(*_ordered(from_huggingface(state), "Hugging Face"))
    if "reg_token" in state or (otherwise == "timm" and "mask_token" not in state):
        converted, origin = from_timm(state), "timm"
    else:
        converted = from_checkpoint(state)
        origin = f"dinov2 {path.suffix}"
    if not {"cls_token", "patch_embed.proj.weight"} <= converted[0].keys():
        names = list(converted[0] or state)
        raise PipelineError(
            f"{path} holds no backbone: {len(names)} names, such as {', '.join(names[:4])}; "
            "expected cls_token, patch_embed.proj.weight and blocks.*",
            EXPECTED,
        )
    return Weights(*_ordered(converted, origin))


def _ordered(converted: tuple[State, str], origin: str) -> tuple[State, str, str]:
    return converted[0], origin, converted[1]


def _load_torch(path: Path) -> Mapping[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can end in any of Python's
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise PipelineError(
            f"{path} cannot be read as tensors alone: {shortened(reason)}",
            "fetch it again if it is damaged; else save its state dict by itself, e.g. "
            "torch.save(checkpoint['teacher'], 'teacher.pth')",
        ) from error
    if not isinstance(loaded, Mapping):
        raise PipelineError(f"{path} holds a {type(loaded).__name__}, no state dict", EXPECTED)
    return {str(name): value for name, value in loaded.items()}


def _load_safetensors(path: Path) -> State:
    try:
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise PipelineError(
            f"{path} is no whole safetensors file: {error}", "copy or export it again"
        ) from error
    return state


def _load_folder(folder: Path) -> State:
    if (folder / WEIGHTS).is_file():
        return _load_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise PipelineError(f"no {WEIGHTS} in {folder}", EXPECTED)
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(n, str) for n in listed.values()):
        raise PipelineError(f"{folder / INDEX} has no weight_map of file names", EXPECTED)
    files = sorted(set(listed.values()))
    state: State = {}
    for name in files:
        # A name with a path in it could lead out of the folder.
        if Path(name).name != name or not (folder / name).is_file():
            raise PipelineError(f"{folder / INDEX} names {name}, which is not there", EXPECTED)
        state.update(_load_safetensors(folder / name))
    return state


@dataclass(frozen=True)
class Resizing:
    """How position embeddings get the size of another image; fields as of `BackboneSpec`."""

    interpolate_offset: float = 0.0
    interpolate_antialias: bool = True


def resizing_of(path: str | Path, weights: Weights) -> Resizing:
    """How the model that weights are of resizes its position embeddings: as the config of an export
    of ours says, else as the program does that reads weights of that origin. Transformers
    antialiases with registers only; the released `.pth` files without registers were trained with
    an offset of 0.1 and without antialiasing.

    Args:
        path: of the weights, as for `read_weights`.
        weights: what was read.

    Raises:
        PipelineError: the config says what no network can have.
    """
    path = Path(path)
    file = (path.parent if path.name == WEIGHTS else path) / CONFIG
    config = read_json(file) if file.is_file() else {}
    if {field.name for field in fields(Resizing)} & config.keys():
        return spec_from(Resizing, config, file)
    registers = "register_tokens" in weights.state
    if weights.origin == "Hugging Face":
        return Resizing(interpolate_antialias=registers)
    if weights.origin.startswith("dinov2") and not registers:
        return Resizing(interpolate_offset=0.1, interpolate_antialias=False)
    return Resizing()


def spec_from(kind: type[Spec], values: Mapping[str, Any], path: Path) -> Spec:
    """Settings of a network from a JSON file that may have been edited.

    Args:
        kind: a dataclass of numbers, words and yes-or-no values.
        values: of its fields; others are passed over.
        path: of the file.

    Raises:
        PipelineError: a value is none that a network can have.
    """
    chosen = {f.name: values[f.name] for f in fields(kind) if f.name in values}
    for field in fields(kind):
        value = chosen.get(field.name, field.default)
        if field.type == "int":
            low = 0 if field.name == "registers" else 1
            high = DEEPEST if field.name == "depth" else LARGEST
            good = type(value) is int and low <= value <= high
        elif field.type == "float":
            good = type(value) in (int, float) and 0 <= value <= LARGEST
        else:
            good = type(value).__name__ == field.type
        if not good:
            raise PipelineError(
                f"{path} has {field.name}={json.dumps(value)[:40]}, which is no {field.type} that "
                "a network can have",
                "put the file back, or export the run again",
            )
    spec: Spec = kind(**chosen)
    return spec


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        PipelineError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise PipelineError(f"{path} is no JSON: {error}", "copy or export it again") from error
    if not isinstance(content, dict):
        raise PipelineError(f"{path} holds no JSON object", "copy or export it again")
    return content
