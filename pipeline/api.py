"""The pieces from Python: networks, losses, teacher targets and the step, without Ray or config.

    from pipeline import api

    pair = api.student_teacher(api.sized("vits14"), api.HeadSpec(prototypes=4096), seed=0)
    objective = api.Objective.for_pair(api.ObjectiveSpec(), pair)

docs/python.md shows each piece at work. Everything here has the same behaviour as in a run, because
a run is made of it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import nn

from pipeline.config.sizes import SIZES
from pipeline.errors import PipelineError
from pipeline.loss.dino import dino_loss
from pipeline.loss.ibot import ibot_loss, patch_weights
from pipeline.loss.koleo import koleo
from pipeline.loss.target import Centre, Target, sinkhorn_targets, softmax_targets
from pipeline.model.fit import fit
from pipeline.model.foreign import ForeignBackbone, ModuleBackbone, TimmSpec
from pipeline.model.groups import apply_values, parameter_groups
from pipeline.model.head import Head
from pipeline.model.pair import (
    Backbone,
    BackboneSpec,
    Encoded,
    Encoder,
    HeadSpec,
    Pair,
    build_pair,
    ema_update,
    freeze,
    pair_of,
)
from pipeline.model.vit import VisionTransformer
from pipeline.model.weights import load_backbone, read_weights, save_backbone
from pipeline.schedule import StepValues, cosine, linear
from pipeline.train.objective import Objective, ObjectiveSpec
from pipeline.train.step import NonFinite, StepResult, train_step
from pipeline.views.batch import Views
from pipeline.views.masks import masks_for

__all__ = [
    # networks
    "SIZES",
    "BackboneSpec",
    "TimmSpec",
    "HeadSpec",
    "sized",
    "student_teacher",
    "with_head",
    "output_size",
    "VisionTransformer",
    "ModuleBackbone",
    "Head",
    "Encoder",
    "Encoded",
    "Pair",
    "pair_of",
    "freeze",
    "ema_update",
    # weights
    "load_backbone",
    "save_backbone",
    "read_weights",
    "fit",
    # losses and targets
    "dino_loss",
    "ibot_loss",
    "patch_weights",
    "koleo",
    "Centre",
    "Target",
    "softmax_targets",
    "sinkhorn_targets",
    "masks_for",
    # training
    "Views",
    "Objective",
    "ObjectiveSpec",
    "StepValues",
    "cosine",
    "linear",
    "parameter_groups",
    "apply_values",
    "train_step",
    "StepResult",
    "NonFinite",
]

_NAME = re.compile(r"(?:dinov2-)?(vit[a-z])(\d+)")


def sized(name: str, **changes: Any) -> BackboneSpec:
    """A backbone of a recommended size: `vits14`, `vitb14`, `vitl16`, `vitg14` …

    Args:
        name: `vits`, `vitb`, `vitl` or `vitg`, then the patch size.
        changes: other fields of `BackboneSpec`, e.g. `image_size=112, in_channels=4`.

    Raises:
        PipelineError: no such size.
    """
    match = _NAME.fullmatch(name)
    if not match or match[1] not in SIZES:
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


def student_teacher(
    backbone: BackboneSpec | TimmSpec | Backbone | nn.Module,
    head: HeadSpec | None = None,
    ibot_head: HeadSpec | None = None,
    *,
    seed: int = 0,
    width: int | None = None,
) -> Pair:
    """A student, and a teacher that is its copy.

    Args:
        backbone: sizes (`BackboneSpec`, or `sized(name)`), a timm model (`TimmSpec`), or a module
            of your own that returns `[B, D]` or tokens `[B, N, D]`.
        head: sizes of the DINO head; default: DINOv2's short recipe.
        ibot_head: sizes of a head of iBOT's own; None shares the DINO head.
        seed: of the random weights that are made here.
        width: D of a module of your own, unless it is a `ModuleBackbone` already.

    Raises:
        PipelineError: a module of your own without its width.
    """
    if not isinstance(backbone, BackboneSpec | TimmSpec | VisionTransformer | ForeignBackbone):
        if width is None:
            raise PipelineError(
                f"the width of {type(backbone).__name__} is not known",
                "give width=…, or wrap it as ModuleBackbone(module, width, patch_size)",
            )
        backbone = ModuleBackbone(backbone, width)
    return build_pair(backbone, head or HeadSpec(), ibot_head, seed)


def with_head(backbone: Backbone, head: HeadSpec) -> nn.Sequential:
    """A backbone alone with a fresh head on its CLS token: `[B, C, H, W]` to logits `[B, K]`."""
    return nn.Sequential(backbone, head.build(backbone.width))


def output_size(backbone: BackboneSpec | TimmSpec | Backbone) -> int:
    """D, the length of a feature. A timm model is built to find out."""
    return backbone.build().width if isinstance(backbone, TimmSpec) else backbone.width
