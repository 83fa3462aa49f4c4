"""A backbone on disk: `model.safetensors` under DINOv2's names, and `config.json` that says what it
is.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.model.pair import BackboneSpec
from pipeline.model.vit import VisionTransformer

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = "raydino-backbone-1"


def save_backbone(backbone: VisionTransformer, spec: BackboneSpec, folder: str | Path) -> Path:
    """Write weights and config; each file appears whole or not at all, the config last. Returns the
    folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: x.detach().cpu().contiguous() for name, x in backbone.state_dict().items()}
    partial = folder / f".{WEIGHTS}.{os.getpid()}"
    save_file(state, partial, metadata={"format": "pt"})
    _publish(partial, folder / WEIGHTS)
    partial = folder / f".{CONFIG}.{os.getpid()}"
    partial.write_text(json.dumps({"format": FORMAT, **asdict(spec)}, indent=2) + "\n")
    _publish(partial, folder / CONFIG)
    return folder


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
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    if config.pop("format", None) != FORMAT:
        raise PipelineError(f"{folder / CONFIG} is not a {FORMAT} config", "export the run again")
    known = {field.name for field in fields(BackboneSpec)}
    if unknown := sorted(set(config) - known):
        raise PipelineError(
            f"{folder / CONFIG} has unknown fields: {', '.join(unknown)}",
            "it was written by a newer version; update raydino",
        )
    spec = BackboneSpec(**config)
    backbone = spec.build().eval()
    load_weights(backbone, load_file(folder / WEIGHTS), str(folder / WEIGHTS))
    return backbone, spec


def load_weights(backbone: VisionTransformer, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict strictly, `blocks.<chunk>.<i>` names of the reference's FSDP runs included.

    A loose load is how the reference came to evaluate random weights: here every name and shape
    must fit.

    Raises:
        PipelineError: naming the first few tensors that are missing, unknown or of another shape.
    """
    state = flatten_chunks(state)
    expected = backbone.state_dict()
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unknown {name}" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(x.shape)}, expected {tuple(expected[name].shape)}"
        for name, x in state.items()
        if name in expected and x.shape != expected[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise PipelineError(
            f"{source} does not fit the model: {'; '.join(problems[:4])}{more}",
            "give the model's size, patch size, registers and image size as they were in training",
        )
    backbone.load_state_dict(state)


def flatten_chunks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename `blocks.<chunk>.<i>.*` to `blocks.<i>.*`; other names stay."""
    flat = {}
    for name, x in state.items():
        parts = name.split(".")
        if parts[0] == "blocks" and len(parts) > 2 and parts[2].isdigit():
            del parts[1]
        flat[".".join(parts)] = x
    return flat


@torch.no_grad()
def verify(backbone: VisionTransformer, folder: str | Path) -> None:
    """Load `folder` back and compare weights and an output, to the bit.

    Raises:
        PipelineError: what was written is not what is in memory.
    """
    again, spec = load_backbone(folder)
    written = again.state_dict()
    different = [
        n for n, x in backbone.state_dict().items() if not torch.equal(x.cpu(), written[n])
    ]
    if different:
        raise PipelineError(
            f"{folder} differs from the model in {len(different)} tensors, first {different[0]}",
            "check the disk and export again",
        )
    size = spec.image_size
    image = torch.linspace(-2, 2, spec.in_channels * size * size).view(1, -1, size, size)
    device, training = backbone.cls_token.device, backbone.training
    backbone.eval()
    here = backbone(image.to(device, backbone.cls_token.dtype)).cpu()
    backbone.train(training)
    # Equal weights on the same device give equal bits; another device only rounds differently.
    if not torch.allclose(here, again(image), atol=0.0 if device.type == "cpu" else 1e-2, rtol=0.0):
        raise PipelineError(f"{folder} gives other features than the model", "export again")


def _publish(partial: Path, final: Path) -> None:
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(final)
