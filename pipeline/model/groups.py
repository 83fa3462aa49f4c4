"""Parameter groups: layerwise learning rates, which parameters decay, and the frozen last layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.model.foreign import ForeignBackbone
from pipeline.schedule import StepValues

FIRST_LAYER = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")


def multipliers(
    name: str, depth: int, layerwise_decay: float, patch_embed_lr_multiplier: float
) -> tuple[float, float, bool]:
    """Learning rate factor, weight decay factor and whether it is a last layer, of one backbone or
    head parameter.

    Follows DINOv2 utils/param_groups.py: embeddings are layer 0, block i is layer i + 1, the rest
    is the last layer. Tokens, the position embedding and `weight_g` do decay; biases, norms and
    LayerScale do not.
    """
    parts = name.split(".")
    layer = depth + 1
    if parts[0] in FIRST_LAYER:
        layer = 0
    elif parts[0] == "blocks":
        layer = int(parts[1]) + 1
    lr = layerwise_decay ** (depth + 1 - layer)
    if "patch_embed" in name:
        lr *= patch_embed_lr_multiplier
    fixed = name.endswith(".bias") or "norm" in name or "gamma" in name
    return lr, 0.0 if fixed else 1.0, "last_layer" in name


def parameter_groups(
    student: nn.Module, layerwise_decay: float = 0.9, patch_embed_lr_multiplier: float = 0.2
) -> list[dict[str, Any]]:
    """Groups for AdamW from an `Encoder` (or a bare backbone or head), parameters of equal factors
    together.

    Each has `params`, `names`, `lr_multiplier`, `weight_decay_multiplier`, `is_last_layer`,
    `is_backbone`; `apply_values` sets the rates. Layers of foreign backbones are those that they
    name themselves; of those, and of heads (BatchNorm), vectors do not decay.
    """
    backbone = getattr(student, "backbone", None)
    foreign = backbone if isinstance(backbone, ForeignBackbone) else None
    layers, last = foreign.layers() if foreign else ({}, 0)
    named = list(student.named_parameters())
    heads = ("dino_head", "ibot_head", "adapter")
    children = ("backbone", *heads)
    depth = len({n.split("blocks.")[1].split(".")[0] for n, _ in named if "blocks." in n})
    groups: dict[tuple[float, float, bool, bool], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        head, _, within = name.partition(".")
        inside = within if head in children else name
        # A head's `mlp` must not meet the backbone's rules by accident: it has no blocks, so its
        # factor is 1.
        lr, decay, is_last = multipliers(inside, depth, layerwise_decay, patch_embed_lr_multiplier)
        if head in children[1:] and parameter.ndim < 2:
            decay = 0.0
        if foreign and head == "backbone":
            lr = layerwise_decay ** (last - layers.get(inside, last))
            lr *= patch_embed_lr_multiplier if "patch_embed" in inside else 1.0
            decay, is_last = (0.0 if parameter.ndim < 2 else decay), False
        key = (lr, decay, is_last, head not in heads)
        group = groups.setdefault(
            key,
            {
                "params": [],
                "names": [],
                "lr_multiplier": key[0],
                "weight_decay_multiplier": key[1],
                "is_last_layer": key[2],
                "is_backbone": key[3],
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def apply_values(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Set this step's learning rate and weight decay in every group made by `parameter_groups`."""
    for group in optimizer.param_groups:
        lr = values.last_layer_lr if group["is_last_layer"] else values.lr
        if group["is_backbone"] and values.backbone_lr is not None:
            lr = values.backbone_lr
        group["lr"] = lr * group["lr_multiplier"]
        group["weight_decay"] = values.weight_decay * group["weight_decay_multiplier"]
