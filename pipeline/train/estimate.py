"""What a plan costs before it starts: FLOPs, memory and disk."""

from __future__ import annotations

import torch
from torch.nn import Module

from pipeline.config.config import Config
from pipeline.model.foreign import ForeignBackbone
from pipeline.model.pair import Backbone, Pair
from pipeline.plan.plan import Plan
from pipeline.train.speed.cost import (
    BACKWARD,
    BYTES_F32,
    LIBRARIES,
    Cost,
    kept_for_backward,
    measured_numbers,
    vit_numbers,
)
from pipeline.train.speed.flops import Group, head_flops, measured_flops, vit_flops, vit_tokens


def flops_per_image(plan: Plan, built: Pair) -> float:
    """FLOPs of a step, forward and backward, for one of its images: see `speed/flops.py`.

    Student: all views, but for those that stochastic depth leaves out of a branch. Teacher (or
    the frozen one): the global views. Heads: CLS tokens and the patches that iBOT scores.
    """
    config, images = plan.config, plan.micro_batch
    loss, local_crops = config.loss, config.augment.local_crops
    whole = Group(2 * images, config.augment.global_size)
    local = Group(local_crops * images, config.augment.local_size)
    masked = images * masked_patches(plan)
    total = 0.0
    for encoder, groups, training in (
        (built.student, [whole, local] if local_crops else [whole], True),
        (built.target_maker, [whole], False),
    ):
        total += _backbone_flops(encoder.backbone, groups, config, training)
        cls = sum(group.views for group in groups) if loss.dino_weight else 0
        patch_head = encoder.ibot_head or encoder.dino_head
        total += head_flops(encoder.dino_head, cls, training=training)
        total += head_flops(patch_head, masked, training=training)
    if loss.koleo_weight and images > 1:  # the similarities of each of both global crops
        total += 2 * 2 * images * images * built.student.backbone.width
    return total / images


def tokens_per_image(plan: Plan, built: Pair) -> int:
    """Tokens of all crops of an image that enter the student's blocks, CLS and registers included;
    0 where the backbone is not ours.
    """
    backbone, augment = built.student.backbone, plan.config.augment
    if isinstance(backbone, ForeignBackbone):
        return 0
    local = vit_tokens(backbone, augment.local_size) if augment.local_crops else 0
    return 2 * vit_tokens(backbone, augment.global_size) + augment.local_crops * local


def masked_patches(plan: Plan) -> float:
    """Patches that iBOT scores, of both global views of an image, on average."""
    loss, patches = plan.config.loss, plan.grid[0] * plan.grid[1]
    if not loss.ibot_weight:
        return 0.0
    if plan.config.distill.teacher:
        return 2.0 * patches
    views = 2 * plan.config.optim.global_batch_size
    # of each masked view a whole number of patches, rounded down: half of one less on average
    each = max(0.0, patches * sum(loss.mask_ratio) / 2 - 0.5)
    return 2 * int(views * loss.mask_probability) / views * each


def _backbone_flops(
    backbone: Backbone, groups: list[Group], config: Config, training: bool
) -> float:
    if isinstance(backbone, ForeignBackbone):
        return measured_flops(backbone, groups, config.model.in_channels, training=training)
    return vit_flops(backbone, groups, training=training)


def estimated_cost(plan: Plan, built: Pair) -> Cost:
    """Parameters, FLOPs, memory and disk of a plan.

    On a CPU the memory is within 30 % of what steps take (benchmarks/memory.py); on a GPU it is
    computed and not measured.
    """
    config, half = plan.config, plan.precision == "bfloat16"
    parameters, element = _parameters(built.student), 2 if half else BYTES_F32
    rows = 4 + config.augment.local_crops
    patch_prototypes = (config.ibot_head if built.student.ibot_head else config.head).prototypes
    scores = rows * config.head.prototypes + 2 * masked_patches(plan) * patch_prototypes
    # student, its gradients, two moments and the teacher
    state = (parameters * 5 + _parameters(built.frozen)) * BYTES_F32
    activations: float
    if plan.device == "cuda":
        augment, backbone = config.augment, built.student.backbone
        numbers = 2 * _numbers(backbone, config, augment.global_size)
        if augment.local_crops:
            numbers += augment.local_crops * _numbers(backbone, config, augment.local_size)
        kept = numbers * element
        activations, libraries = kept + 2 * scores * BYTES_F32, 0
    else:
        kept = _kept_per_image(plan, built)
        activations, libraries = BACKWARD * (kept + scores * BYTES_F32), LIBRARIES
        state += 2 * parameters * half  # autocast holds the weights once more
    return Cost(
        parameters=parameters,
        flops_per_image=flops_per_image(plan, built),
        micro_batch=plan.micro_batch,
        state_bytes=state,
        activation_bytes_per_image=activations,
        batch_bytes_per_image=plan.view_bytes * (3 + element),
        checkpoint_bytes=parameters * BYTES_F32 * 4,
        library_bytes=libraries,
    )


def _kept_per_image(plan: Plan, built: Pair) -> float:
    """Bytes that the student keeps for its backward pass, for each image of a micro batch."""
    student, augment = built.student, plan.config.augment
    patches = plan.grid[0] * plan.grid[1]
    masked = round(masked_patches(plan) / 2)

    def kept(images: int) -> int:
        masks = torch.zeros(2 * images, patches, dtype=torch.bool)
        masks[:, :masked] = True
        places = masks.flatten().nonzero().squeeze(1)

        def forward() -> object:
            channels = plan.config.model.in_channels
            sides = [augment.global_size] * 2, [augment.local_size] * 2
            views = torch.zeros(2 * images, channels, *sides[0])
            crops = torch.zeros(augment.local_crops * images, channels, *sides[1])
            hidden = None if built.frozen else masks
            scores = plan.config.loss.dino_weight > 0
            return student(views, crops if len(crops) else None, hidden, places, scores, None)

        return kept_for_backward(forward, torch.bfloat16 if plan.precision == "bfloat16" else None)

    # What does not grow with the images are the weights.
    return (kept(32) - kept(16)) / 16


def _numbers(backbone: Backbone, config: Config, size: int) -> float:
    if isinstance(backbone, ForeignBackbone):
        return measured_numbers(backbone, config.model.in_channels, size)
    tokens = vit_tokens(backbone, size)
    return vit_numbers(tokens, width=backbone.width, depth=len(backbone.blocks))


def _parameters(module: Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0
