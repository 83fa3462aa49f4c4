"""Reading the golden step files: inputs, names and tolerances of the reference's training step."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.model.groups import parameter_groups
from pipeline.model.pair import Encoder, HeadSpec, Pair, build_pair
from pipeline.model.vit import BackboneSpec
from pipeline.schedule import StepValues
from pipeline.train.step import Objective, ObjectiveSpec
from pipeline.views.batch import Views
from pipeline.views.masks import block_mask

SHARED = Path(__file__).resolve().parents[3] / "shared"


def randn(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape)).float()


def collate_masks(seed: int, images: int, grid: int) -> Tensor:
    """The reference's collate: ratios in order, then all views shuffled, one generator."""
    rng = random.Random(seed)
    views = 2 * images
    masked = int(views * 0.5)
    edges = torch.linspace(0.1, 0.5, masked + 1)
    masks = []
    for i in range(masked):
        share = rng.uniform(float(edges[i]), float(edges[i + 1]))
        masks.append(block_mask((grid, grid), int(grid * grid * share), rng))
    masks += [np.zeros((grid, grid), dtype=bool)] * (views - masked)
    rng.shuffle(masks)
    return torch.from_numpy(np.stack(masks)).flatten(1)


def golden_views(seed: int, images: int = 4, local_crops: int = 4) -> Views:
    return Views(
        randn(seed, 2, images, 3, 112, 112).flatten(0, 1),
        randn(seed + 1, local_crops, images, 3, 42, 42).flatten(0, 1),
        collate_masks(seed, images, 8),
        images,
    )


def golden_pair(golden: dict[str, Any]) -> Pair:
    cfg = golden["cfg"]
    student = cfg["student"]
    spec = BackboneSpec(
        image_size=cfg["crops"]["global_crops_size"],
        width=48,
        depth=3,
        heads=3,
        ffn="swiglu" if student["ffn_layer"].startswith("swiglu") else "mlp",
        registers=student["num_register_tokens"],
        drop_path=student["drop_path_rate"],
        interpolate_offset=student["interpolate_offset"],
        interpolate_antialias=student["interpolate_antialias"],
    )
    heads = [
        HeadSpec(
            cfg[name]["head_n_prototypes"],
            cfg[name]["head_bottleneck_dim"],
            cfg[name]["head_hidden_dim"],
            cfg[name]["head_nlayers"],
        )
        for name in ("dino", "ibot")
    ]
    pair = build_pair(spec, heads[0], heads[1] if cfg["ibot"]["separate_head"] else None, seed=0)
    pair.student.load_state_dict(golden["init_student"])
    pair.teacher.load_state_dict(golden["init_teacher"])
    return pair


def golden_objective(golden: dict[str, Any], pair: Pair) -> Objective:
    centring = "softmax" if golden["cfg"]["train"]["centering"] == "centering" else "sinkhorn"
    return Objective.for_pair(ObjectiveSpec(centring=centring), pair)


def golden_optimizer(golden: dict[str, Any], student: Encoder) -> torch.optim.AdamW:
    optim = golden["cfg"]["optim"]
    groups = parameter_groups(student, optim["layerwise_decay"], optim["patch_embed_lr_mult"])
    return torch.optim.AdamW(groups, lr=0.0, betas=(optim["adamw_beta1"], optim["adamw_beta2"]))


def golden_values(step: dict[str, Any]) -> StepValues:
    return StepValues(
        lr=step["lr"],
        weight_decay=step["wd"],
        teacher_momentum=step["momentum"],
        teacher_temperature=step["teacher_temp"],
        last_layer_lr=step["last_layer_lr"],
    )


def logged(losses: dict[str, Tensor], koleo_weight: float = 0.1) -> dict[str, float]:
    """The reference's logged losses under our names; it halves koleo and ibot for display."""
    return {
        "loss/dino_global": float(losses["dino_global_crops_loss"]),
        "loss/dino_local": float(losses["dino_local_crops_loss"]),
        "loss/ibot": 2 * float(losses["ibot_loss"]),
        "loss/koleo": 2 * float(losses["koleo_loss"]) / koleo_weight,
    }


def flat(nested: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{module}.{name}": x for module, part in nested.items() for name, x in part.items()}


def without_key_bias(name: str, x: Tensor) -> Tensor:
    """The key bias of attention has no gradient but round-off, which Adam blows up."""
    if not name.endswith("attn.qkv.bias"):
        return x
    third = len(x) // 3
    return torch.cat([x[:third], x[2 * third :]])
