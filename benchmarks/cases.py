"""The recipes that benchmarks look at, as plans, and views of noise for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config.config import Config
from pipeline.config.load import load
from pipeline.model.pair import Encoded, Pair
from pipeline.model.vit import BackboneSpec
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan, SetFacts, resolve
from pipeline.schedule import StepValues
from pipeline.train import build
from pipeline.views.batch import Views
from pipeline.views.masks import MaskSpec, masks_for

ROOT = Path(__file__).resolve().parents[1]
# Images of a micro batch where the recipe says how many GPUs it is for.
RECIPES = {
    "vits16_8gpu": 256,
    "vitb14_8gpu": 128,
    "vitl16_short": 64,
    "vitl14": 32,
    "vitg14": 12,
}
IMAGENET, IMAGE_BYTES = 1_281_167, 110_000.0  # images, and bytes of one on average
VALUES = StepValues(
    lr=1e-4,
    weight_decay=0.04,
    teacher_momentum=0.992,
    teacher_temperature=0.05,
    last_layer_lr=1e-4,
)


def config_of(recipe: str, *fields: str) -> Config:
    """A recipe with other fields, `a.b=value`."""
    return load([str(ROOT / "configs" / f"{recipe}.yaml"), "data.source=images", *fields])


def plan_of(recipe: str, images: int, *fields: str, gpus: int = 1, workers: int = 1) -> Plan:
    """The plan of a recipe with micro batches of so many images, and no accumulation.

    Args:
        recipe: a file of configs/, without its ending.
        images: of a micro batch.
        fields: other fields, `a.b=value`.
        gpus: of the machine; 0: training runs on its CPUs.
        workers: of the group.
    """
    layout = (
        f"train.workers={workers}",
        "train.accumulation=1",
        f"optim.global_batch_size={images * workers}",
    )
    machine = Machine(cpus=16 * workers, gpus=gpus * workers, bfloat16=True)
    return resolve(
        config_of(recipe, *layout, *fields),
        SetFacts(IMAGENET, "noise", image_bytes=IMAGE_BYTES),
        machine=machine,
    )


def narrow(recipe: str) -> list[str]:
    """Fields that make a recipe's network small, with all of its blocks."""
    config = config_of(recipe)
    patch = config.model.patch_size
    fields = ["model.width=32", "model.heads=2", "head.prototypes=64", "head.hidden=32"]
    fields += [f"augment.global_size={4 * patch}", f"augment.local_size={2 * patch}"]
    if config.ibot_head.separate:
        fields += ["ibot_head.prototypes=64", "ibot_head.hidden=32"]
    return fields


def masks_of(plan: Plan, step: int) -> Tensor:
    """Bool `[2 B, P]`: the masks of a step's micro batch, crop-major as in `Views`."""
    loss, images = plan.config.loss, plan.micro_batch
    spec = MaskSpec(plan.grid, loss.mask_probability, loss.mask_ratio)
    masks = masks_for(0, step, np.arange(images), images, spec)  # [B, 2, P]
    return torch.from_numpy(np.ascontiguousarray(masks.swapaxes(0, 1))).flatten(0, 1)


def views_of(
    plan: Plan, step: int, device: torch.device | str = "cpu", crops: Sequence[Tensor] = ()
) -> Views:
    """Views of noise with the masks of a step; `crops`: global and local ones that are there."""
    images, augment = plan.micro_batch, plan.config.augment
    if not crops:
        sides = ((2, augment.global_size), (augment.local_crops, augment.local_size))
        channels = plan.config.model.in_channels
        dtype = torch.bfloat16 if plan.precision == "bfloat16" else torch.float32
        crops = [
            torch.randn(n * images, channels, side, side, device=device, dtype=dtype)
            for n, side in sides
        ]
    masks = masks_of(plan, step)
    masked = build.patch_finder(plan)(masks, None).to(torch.device(device))
    return Views(crops[0], crops[1], masks.to(device), images, masked=masked)


def encodings(
    plan: Plan, pair: Pair, views: Views, device: torch.device | str = "cpu"
) -> tuple[Encoded, Encoded]:
    """What teacher and student would say of views: logits of noise, as their heads give them."""
    heads = [head for head in (pair.student.dino_head, pair.student.ibot_head) if head]
    assert views.masked is not None
    patches, width = len(views.masked.places), plan.config.model.dimensions[0]

    def encoded(views_scored: int, learns: bool) -> Encoded:
        counts = [views_scored, patches] if len(heads) == 2 else [views_scored + patches]

        def noise(rows: int, columns: int) -> Tensor:
            x = torch.randn(rows, columns, device=device).mul_(0.1).to(torch.bfloat16)
            # as they come from a layer: what is no leaf may be overwritten
            return x.requires_grad_().view_as(x) if learns else x

        logits = [
            noise(rows, len(head.last_layer.weight_g))
            for rows, head in zip(counts, heads, strict=True)
        ]
        cls = noise(len(views.global_views), width)
        return Encoded(cls, logits[0], logits[1] if len(logits) == 2 else None)

    images = plan.micro_batch
    rows = (2 + plan.config.augment.local_crops) * images
    return encoded(2 * images, False), encoded(rows, True)


def spec_of(plan: Plan) -> BackboneSpec:
    """The backbone of a plan."""
    return build.backbone_spec(plan.config)
