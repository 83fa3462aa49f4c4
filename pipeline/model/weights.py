"""A backbone on disk, in three formats: ours (dinov2's names), Hugging Face's and timm's.

Each is a folder with `model.safetensors` and `config.json`, and each can be checked by reading it
back. Files appear whole or not at all, the config last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.fit import Weights, fit
from pipeline.model.formats import (
    CONFIG,
    FORMAT,
    WEIGHTS,
    agreement,
    huggingface_config,
    preprocessor_config,
    same_sizes,
    timm_config,
    without_huggingface,
)
from pipeline.model.names import flatten_chunks, to_huggingface, to_timm
from pipeline.model.read import read_json, read_weights, spec_from
from pipeline.model.vit import BackboneSpec, VisionTransformer
from pipeline.storage.run_folder import atomic

__all__ = [
    "Weights", "read_weights", "fit", "save_backbone", "save_huggingface", "save_timm",
    "load_backbone", "load_weights", "verify", "verify_huggingface", "verify_timm", "agreement",
    "without_huggingface", "tensors_digest", "flatten_chunks", "CONFIG", "FORMAT", "WEIGHTS",
]  # fmt: skip

PREPROCESSOR = "preprocessor_config.json"
# Two libraries order the same float32 sums differently on some machines; a wrong name, order or
# epsilon differs by far more. Of the largest output.
TOLERANCE = 1e-5


def save_backbone(backbone: VisionTransformer, spec: BackboneSpec, folder: str | Path) -> Path:
    """Write weights and config under dinov2's names. Returns the folder."""
    return write_folder(folder, _state(backbone), {CONFIG: {"format": FORMAT, **asdict(spec)}})


def save_huggingface(
    backbone: VisionTransformer,
    spec: BackboneSpec,
    folder: str | Path,
    images: Preprocessing,
) -> Path:
    """Write a folder for `AutoModel.from_pretrained` and `AutoImageProcessor.from_pretrained`.

    Args:
        backbone: the model.
        spec: what it is made of.
        folder: where to; made if it is not there.
        images: that it takes.

    Raises:
        PipelineError: Hugging Face has no such model (`without_huggingface`).
    """
    if reason := without_huggingface(spec):
        raise PipelineError(reason, "use the dinov2 or timm format, or a whole model.mlp_ratio")
    dtype = backbone.cls_token.dtype
    configs = {
        PREPROCESSOR: preprocessor_config(images),
        CONFIG: huggingface_config(spec, dtype),
    }
    return write_folder(folder, to_huggingface(_state(backbone)), configs)


def save_timm(
    backbone: VisionTransformer,
    spec: BackboneSpec,
    folder: str | Path,
    images: Preprocessing,
) -> Path:
    """Write a folder for `timm.create_model("local-dir:<folder>", pretrained=True)`.

    timm has no mask token, and with registers one tensor for CLS and its position: features are the
    same, the two are not told apart any more. Arguments as `save_huggingface`.
    """
    config = timm_config(spec, images)
    return write_folder(folder, to_timm(_state(backbone)), {CONFIG: config})


def load_backbone(folder: str | Path) -> tuple[VisionTransformer, BackboneSpec]:
    """Read what `save_backbone` wrote; the backbone is in eval mode, on the CPU.

    Raises:
        PipelineError: a file is missing, the config is of another kind, or names or shapes do not
            match it.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise PipelineError(
                f"no {name} in {folder}", "give the folder that an export or a run has written"
            )
    config = read_json(folder / CONFIG)
    if config.pop("format", None) != FORMAT:
        raise PipelineError(f"{folder / CONFIG} is not a {FORMAT} config", "export the run again")
    known = {field.name for field in fields(BackboneSpec)}
    if unknown := sorted(set(config) - known):
        raise PipelineError(
            f"{folder / CONFIG} has unknown fields: {', '.join(unknown)}",
            "it was written by a newer version; update raydino",
        )
    spec = spec_from(BackboneSpec, config, folder / CONFIG)
    return _loaded(spec, read_weights(folder), str(folder / WEIGHTS)), spec


def load_weights(backbone: VisionTransformer, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict of dinov2 names strictly, with or without block chunks; see `fit`.

    Raises:
        PipelineError: names or shapes differ.
    """
    fit(backbone, Weights(flatten_chunks(state), "dinov2 names"), source)


def verify(backbone: VisionTransformer, folder: str | Path) -> None:
    """Load `folder` back and compare weights and an output, to the bit.

    Raises:
        PipelineError: what was written is not what is in memory.
    """
    again, spec = load_backbone(folder)
    _same(backbone, _state(backbone), again, spec, folder)


def verify_huggingface(backbone: VisionTransformer, spec: BackboneSpec, folder: str | Path) -> str:
    """Check a folder of `save_huggingface`: read back and equal to the bit, and, where transformers
    is installed, loaded by `AutoModel` and its outputs equal, at every size where they should be.

    Returns:
        What was compared with transformers, or that it is not installed.

    Raises:
        PipelineError: what was written is not what is in memory.
    """
    again = _loaded(spec, read_weights(folder), str(folder))
    _same(backbone, _state(backbone), again, spec, folder)

    def outputs() -> tuple[str, Callable[[Tensor], Tensor]]:
        transformers: Any = import_module("transformers")
        logging = transformers.utils.logging
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = transformers.AutoModel.from_pretrained(str(folder), local_files_only=True)
        finally:
            if bars:
                logging.enable_progress_bar()
        model.eval()
        version = f"transformers {transformers.__version__}"
        return version, lambda x: model(pixel_values=x).last_hidden_state

    return _same_elsewhere(again, spec, folder, outputs, everywhere=same_sizes(spec)[0])


def verify_timm(backbone: VisionTransformer, spec: BackboneSpec, folder: str | Path) -> str:
    """As `verify_huggingface`, for a folder of `save_timm` and `timm.create_model`."""
    again = _loaded(spec, read_weights(folder), str(folder))
    expected = _state(backbone)
    expected["mask_token"] = torch.zeros_like(expected["mask_token"])
    if spec.registers:
        position = expected["pos_embed"]
        expected["cls_token"] = expected["cls_token"] + position[:, :1]
        none = torch.zeros_like(position[:, :1])
        expected["pos_embed"] = torch.cat([none, position[:, 1:]], dim=1)
    _same(backbone, expected, again, spec, folder)

    def outputs() -> tuple[str, Callable[[Tensor], Tensor]]:
        timm: Any = import_module("timm")
        model = timm.create_model(f"local-dir:{Path(folder).absolute()}", pretrained=True).eval()
        return f"timm {timm.__version__}", model.forward_features

    return _same_elsewhere(again, spec, folder, outputs, everywhere=same_sizes(spec)[1])


def tensors_digest(module: nn.Module) -> str:
    """Of all tensors by name, 16 hex digits: equal for equal weights."""
    hashed = blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        hashed.update(f"{name} {tuple(tensor.shape)}\0".encode())
        hashed.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()


def _state(backbone: VisionTransformer) -> dict[str, Tensor]:
    return {name: x.detach().cpu() for name, x in backbone.state_dict().items()}


def _loaded(spec: BackboneSpec, weights: Weights, source: str) -> VisionTransformer:
    """A backbone that holds the weights themselves: nothing is drawn, no tensor exists twice."""
    try:
        with torch.device("meta"):
            backbone = spec.build().eval()
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise PipelineError(
            f"no network can be made for {source}: {str(error).partition(chr(10))[0][:160]}",
            f"its {CONFIG} was edited: put it back, or export the run again",
        ) from error
    fit(backbone, weights, source)
    return backbone


@torch.no_grad()
def _same(
    backbone: VisionTransformer,
    expected: Mapping[str, Tensor],
    again: VisionTransformer,
    spec: BackboneSpec,
    folder: str | Path,
) -> None:
    written = again.state_dict()
    different = [name for name, x in expected.items() if not torch.equal(x, written[name])]
    if different:
        raise PipelineError(
            f"{folder} differs from the model in {len(different)} tensors, first {different[0]}",
            "check the disk and export again",
        )
    image = _image(spec, spec.image_size, spec.image_size)
    device, training = backbone.cls_token.device, backbone.training
    backbone.eval()
    here = backbone(image.to(device, backbone.cls_token.dtype)).cpu()
    backbone.train(training)
    # Equal weights on the same device give equal bits; another device only rounds differently.
    there = again(image.to(again.cls_token.dtype))
    if not torch.allclose(here, there, atol=0.0 if device.type == "cpu" else 1e-2, rtol=0.0):
        raise PipelineError(f"{folder} gives other features than the model", "export again")


@torch.no_grad()
def _same_elsewhere(
    backbone: VisionTransformer,
    spec: BackboneSpec,
    folder: str | Path,
    load: Callable[[], tuple[str, Callable[[Tensor], Tensor]]],
    everywhere: bool,
) -> str:
    """Compare all tokens with another library's, where it is installed."""
    try:
        version, outputs = load()
    except ImportError as error:
        return f"not compared ({error})"
    side, patch = spec.image_size, spec.patch_size
    sizes = [(side, side)] + ([(max(patch, side - patch), side + patch)] if everywhere else [])
    worst = 0.0
    for height, width in sizes:
        image = _image(spec, height, width).to(backbone.cls_token.dtype)
        here = backbone.norm(backbone.packed([image], [None]).views()[0])
        there = outputs(image)
        difference = (here - there).abs().max().item() if here.shape == there.shape else torch.inf
        if not difference <= TOLERANCE * here.abs().max().item():
            raise PipelineError(
                f"{folder} gives other features in {version} at {height} x {width} pixels: "
                f"they differ by {difference:.2g}",
                "report it with the versions of torch and of this library",
            )
        worst = max(worst, difference)
    shown = " and ".join(f"{height} x {width}" for height, width in sizes)
    how = "equal to the bit" if worst == 0 else f"equal but for {worst:.1g}"
    return f"{how} in {version} at {shown}"


def _image(spec: BackboneSpec, height: int, width: int) -> Tensor:
    pixels = torch.linspace(-2, 2, spec.in_channels * height * width)
    return pixels.view(1, spec.in_channels, height, width)


def write_folder(
    folder: str | Path, state: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]
) -> Path:
    """A folder of `model.safetensors` and JSON files, each whole or not at all.

    Weights first and configs in their order: who finds the last one finds all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: x.contiguous() for name, x in state.items()}
    with atomic(folder / WEIGHTS) as partial:
        save_file(contiguous, partial, metadata={"format": "pt"})
    for name, config in configs.items():
        with atomic(folder / name) as partial:
            partial.write_text(json.dumps(config, indent=2) + "\n")
    return folder
