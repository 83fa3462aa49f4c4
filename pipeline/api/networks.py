"""Student, teacher and backbone from sizes, from a name, or from a module of one's own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from pipeline.config.sizes import SIZES
from pipeline.errors import PipelineError
from pipeline.evaluate.features import inference
from pipeline.model.encoders.module import ModuleBackbone
from pipeline.model.foreign import ForeignBackbone, TimmSpec, timm_by_name
from pipeline.model.pair import Backbone, HeadSpec, Pair, Spec, build_pair
from pipeline.model.vit import BackboneSpec, VisionTransformer

PROBE = 224  # side of the image that tells a module's width


class FieldSizes(TypedDict, total=False):
    """Sizes under the names that papers and libraries have for them; all may be left out."""

    image_size: int  # pixels, square [224]
    patch_size: int  # pixels, square [14]
    in_channels: int  # [3]
    embed_dim: int  # width [384]
    num_heads: int  # [6]
    num_layers: int  # depth [12]
    mlp_ratio: float  # [4.0]
    num_register_tokens: int  # [4]
    head_hidden_dim: int  # [2048]
    head_bottleneck_dim: int  # [256]
    head_output_dim: int  # prototypes [65536]
    seed: int  # of the weights [0]


BACKBONE_NAMES = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "embed_dim": "width",
    "num_heads": "heads",
    "num_layers": "depth",
    "mlp_ratio": "mlp_ratio",
    "num_register_tokens": "registers",
}
HEAD_NAMES = {
    "head_hidden_dim": "hidden",
    "head_bottleneck_dim": "bottleneck",
    "head_output_dim": "prototypes",
}

_NAME = re.compile(r"(?:dinov2-)?(vit[a-z])(\d+)")


def _size_of(name: str) -> re.Match[str] | None:
    match = _NAME.fullmatch(name)
    return match if match and match[1] in SIZES else None


def sized(name: str, **changes: Any) -> BackboneSpec:
    """A backbone of a recommended size: `vits14`, `vitb14`, `vitl16`, `vitg14` …

    Args:
        name: `vits`, `vitb`, `vitl` or `vitg`, then the patch size.
        changes: other fields of `BackboneSpec`, e.g. `image_size=112, in_channels=4`.

    Raises:
        PipelineError: no such size.
    """
    match = _size_of(name)
    if not match:
        raise PipelineError(
            f"no size {name!r}", f"give one of {', '.join(SIZES)} and a patch size, e.g. vits14"
        )
    width, depth, heads = SIZES[match[1]]
    patch = int(match[2])
    # g has the gated feed-forward in every published model (DINOv2 paper, table 17).
    ffn = "swiglu" if match[1] == "vitg" else "mlp"
    spec = BackboneSpec(
        image_size=224 // patch * patch,
        patch_size=patch,
        width=width,
        depth=depth,
        heads=heads,
        ffn=ffn,
    )
    return replace(spec, **changes)


def build_student_teacher(**sizes: Unpack[FieldSizes]) -> Pair:
    """Student and teacher, its copy, from sizes; the result unpacks: `student, teacher = …`.

    Both give `Encoded(cls, dino, …)` for images `[B, C, H, W]`: CLS tokens `[B, D]`, logits `[B,
    K]`. The teacher has no gradients; move it with `update_teacher` after each step.

    Args:
        sizes: see `FieldSizes`; what is left out is that of DINOv2's ViT-S/14 with registers.

    Raises:
        PipelineError: a name is unknown, or sizes do not fit each other.
    """
    known = [*BACKBONE_NAMES, *HEAD_NAMES, "seed"]
    if unknown := [name for name in sizes if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise PipelineError(
            f"build_student_teacher has no {unknown[0]}",
            f"did you mean {near[0]}?" if near else f"give {', '.join(known)}",
        )
    values: Mapping[str, Any] = sizes
    backbone = {ours: values[name] for name, ours in BACKBONE_NAMES.items() if name in values}
    head = {ours: values[name] for name, ours in HEAD_NAMES.items() if name in values}
    return build_pair(BackboneSpec(**backbone), HeadSpec(**head), None, values.get("seed", 0))


def student_teacher(
    backbone: str | BackboneSpec | TimmSpec | Backbone | nn.Module,
    head: HeadSpec | None = None,
    ibot_head: HeadSpec | None = None,
    *,
    seed: int = 0,
    width: int | None = None,
    encoder_kwargs: Mapping[str, Any] | None = None,
    pretrained: bool = False,
) -> Pair:
    """A student, and a teacher that is its copy.

    Args:
        backbone: a recommended size by name (`vits14`), the name of a timm model
            (`vit_small_patch16_224`), sizes (`BackboneSpec`, or `sized(name)`), a timm model with
            other sizes (`TimmSpec`), or a module of your own that returns `[B, D]` or tokens `[B,
            N, D]`.
        head: sizes of the DINO head; default: DINOv2's short recipe.
        ibot_head: sizes of a head of iBOT's own; None shares the DINO head.
        seed: of the random weights that are made here.
        width: D of a module of your own; default: what it gives for one image of 224 x 224.
        encoder_kwargs: more arguments of `timm.create_model`, where a timm model is named.
        pretrained: load timm's own weights, where a timm model is named; timm downloads them.

    Raises:
        PipelineError: no such model, or a module whose width is not to be found.
    """
    network = network_of(backbone, seed, width, encoder_kwargs, pretrained)
    return build_pair(network, head or HeadSpec(), ibot_head, seed)


def network_of(
    backbone: str | BackboneSpec | TimmSpec | Backbone | nn.Module,
    seed: int = 0,
    width: int | None = None,
    encoder_kwargs: Mapping[str, Any] | None = None,
    pretrained: bool = False,
) -> Spec | Backbone:
    """The backbone that `student_teacher` is given, as `build_pair` takes it; raises what it
    raises.
    """
    named = isinstance(backbone, str) and not _size_of(backbone)
    if not named and (encoder_kwargs or pretrained):
        raise PipelineError(
            "encoder_kwargs and pretrained go with the name of a timm model, and "
            f"{backbone if isinstance(backbone, str) else type(backbone).__name__} is none",
            "leave them out, or name a timm model",
        )
    if isinstance(backbone, str):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = (
                timm_by_name(backbone.removeprefix("timm:"), encoder_kwargs, pretrained)
                if named
                else sized(backbone)
            )
    elif not isinstance(backbone, BackboneSpec | TimmSpec | VisionTransformer | ForeignBackbone):
        backbone = ModuleBackbone(backbone, _width(backbone) if width is None else width)
    return backbone


def _width(module: nn.Module) -> int:
    """D, which a module shows on one image.

    Raises:
        PipelineError: it takes no RGB image of this size, or returns something else.
    """
    weights = next(module.parameters(), torch.zeros(0))
    try:
        with inference(module, weights.device, torch.float32):
            out = module(torch.zeros(1, 3, PROBE, PROBE, device=weights.device))
        shape, why = tuple(getattr(out, "shape", ())), ""
    except (RuntimeError, ValueError, AssertionError) as error:
        shape, why = (), f": {(str(error).splitlines() or [''])[0]}"
    if len(shape) not in (2, 3) or shape[0] != 1:
        raise PipelineError(
            f"the width of {type(module).__name__} is not known, since an image [1, 3, {PROBE}, "
            f"{PROBE}] gives {list(shape) or 'none'}{why}",
            "give width=…, or wrap it as ModuleBackbone(module, width, patch_size)",
        )
    return int(shape[-1])


def with_head(backbone: Backbone, head: HeadSpec) -> nn.Sequential:
    """A backbone alone with a fresh head on its CLS token: `[B, C, H, W]` to logits `[B, K]`."""
    return nn.Sequential(backbone, head.build(backbone.width))


def output_size(backbone: BackboneSpec | TimmSpec | Backbone) -> int:
    """D, the length of a feature. A timm model is built to find out."""
    return backbone.build().width if isinstance(backbone, TimmSpec) else backbone.width
