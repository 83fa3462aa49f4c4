"""What a plan costs before it starts: FLOPs, memory and disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Linear, Module

from pipeline.config.config import Config
from pipeline.model.foreign import ForeignBackbone
from pipeline.model.pair import Backbone, Encoder, Pair
from pipeline.model.vit import VisionTransformer
from pipeline.plan.plan import Plan
from pipeline.train import build
from pipeline.train.parallel import strategy
from pipeline.train.parallel.memory import activations, numbers, state_bytes
from pipeline.train.parallel.strategy import Layout
from pipeline.train.speed.cost import (
    BACKWARD,
    BYTES_F32,
    CONTEXT,
    LIBRARIES,
    NCCL,
    Cost,
    Memory,
    kept_for_backward,
)
from pipeline.train.speed.flops import (
    Group,
    first_learning,
    head_flops,
    kept_views,
    measured_flops,
    vit_flops,
    vit_tokens,
)
from pipeline.train.tune.share import checkpoint_bytes


def flops_per_image(plan: Plan, built: Pair) -> float:
    """FLOPs of a step, forward and backward, for one of its images: see `speed/flops.py`.

    Student: all views, but for those that stochastic depth leaves out of a branch. Teacher (or
    the frozen one): the global views. Heads: CLS tokens and the patches that iBOT scores.
    """
    config, images = plan.config, plan.micro_batch
    loss, local_crops = config.loss, plan.local_crops
    whole = Group(2 * images, config.augment.global_size)
    local = Group(local_crops * images, config.augment.local_size)
    masked = images * masked_patches(plan)
    total = 0.0
    asked = [(built.student, [whole, local] if local_crops else [whole], True)]
    if not plan.headless:
        asked.append((built.target_maker, [whole], False))
    for encoder, groups, training in asked:
        total += _backbone_flops(encoder.backbone, groups, config, training)
        cls = sum(group.views for group in groups) if loss.dino_weight else 0
        patch_head = encoder.ibot_head or encoder.dino_head
        total += head_flops(encoder.dino_head, cls, training=training)
        total += head_flops(patch_head, masked, training=training)
    total += feature_flops(built, images, config)
    if loss.koleo_weight and images > 1 and not plan.headless:  # similarities of each global crop
        total += 2 * 2 * images * images * built.student.backbone.width
    return total / images


def feature_flops(built: Pair, images: int, config: Config) -> float:
    """Of a teacher of features on the global views of a micro batch, and of the adapter to it.
    What torch does not run is not counted.
    """
    teacher, adapter = built.feature_teacher, built.student.adapter
    if teacher is None or adapter is None:
        return 0.0
    views = 2 * images
    side = config.augment.global_size // built.student.backbone.patch_size
    total = head_flops(adapter.cls, views, training=True)
    total += head_flops(adapter.patch, views * side * side, training=True)
    network: Any = teacher.network
    if teacher.outside:
        return total
    return total + _backbone_flops(network, [Group(views, teacher.size)], config, training=False)


def tokens_per_image(plan: Plan, built: Pair) -> int:
    """Tokens of all crops of an image that enter the student's blocks, CLS and registers included;
    0 where the backbone is not ours.
    """
    backbone, augment = built.student.backbone, plan.config.augment
    if isinstance(backbone, ForeignBackbone):
        return 0
    local = vit_tokens(backbone, augment.local_size) if plan.local_crops else 0
    return 2 * vit_tokens(backbone, augment.global_size) + plan.local_crops * local


def masked_patches(plan: Plan) -> float:
    """Patches that iBOT scores, of both global views of an image, on average."""
    loss, patches = plan.config.loss, plan.grid[0] * plan.grid[1]
    if not loss.ibot_weight or plan.headless:
        return 0.0
    if plan.config.distill.alone:
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
    """Parameters, FLOPs, memory and disk of a plan; `built` need not be prepared for its devices.

    On a CPU the memory was within 16 % of what steps took in the cases that were measured
    (benchmarks/memory.py); on a GPU it is computed and not measured.
    """
    parameters = numbers(built.student.parameters())
    return Cost(
        parameters=parameters,
        flops_per_image=flops_per_image(plan, built),
        checkpoint_bytes=checkpoint_bytes(built),
        memory=memory_of(plan, built),
    )


def lighter(plan: Plan) -> str:
    """What takes less memory on a GPU, as fields with values, the lightest change first."""
    train, batch = plan.config.train, plan.micro_batch
    factor = next((n for n in range(2, batch + 1) if batch % n == 0), 0)
    ways = [f"train.accumulation={train.accumulation * factor}"] * (factor > 0)
    if not train.activation_checkpointing:
        ways.append("train.activation_checkpointing=true")
    if train.strategy == "ddp" and plan.workers > 1:
        ways.append("train.strategy=fsdp")
    return f"take {' or '.join(ways or ['a smaller model.size or head.prototypes'])}"


def memory_of(plan: Plan, built: Pair) -> Memory:
    """Memory of a worker at the peak of a step."""
    config, cuda = plan.config, plan.device == "cuda"
    half = plan.precision == "bfloat16"
    layout = build.layout(plan, torch.device(plan.device))
    state = state_bytes(built, layout, plan.accumulation)
    backbone = built.student.backbone
    if cuda and isinstance(backbone, VisionTransformer):
        kept, copies, workspace = _on_a_gpu(plan, built.student, backbone, layout)
        copies += state.lower
    else:  # of a foreign network on a GPU this is what a CPU would keep
        kept, copies = _kept(plan, built)
        workspace = 0.0
    whole, local = 2, plan.local_crops
    patches = build.patch_finder(plan).length / plan.micro_batch  # with those that fill up
    patch_prototypes = (config.ibot_head if built.student.ibot_head else config.head).prototypes
    element = 2 if half and config.train.logits == "auto" else BYTES_F32
    scored = config.loss.dino_weight > 0 and not plan.headless
    cls, patch = config.head.prototypes * scored, patches * patch_prototypes
    logits = element * ((whole + local) * cls + patch)
    targets = element * (whole * cls + patch)
    if (teacher := built.feature_teacher) is not None and (adapter := built.student.adapter):
        side = config.augment.global_size // backbone.patch_size
        learnt = whole * teacher.width * (adapter.cls is not None)
        learnt += whole * side * side * teacher.patch_width * (adapter.patch is not None)
        targets += BYTES_F32 * learnt
        logits += (element + 2 * BYTES_F32) * learnt  # and what their loss keeps in fp32
    if not cuda:
        workspace = BACKWARD * (kept + logits + targets)
    ours = isinstance(backbone, VisionTransformer)
    views = plan.view_bytes * (2 if half and ours else BYTES_F32)
    buckets = 0
    if config.train.reduce == "bfloat16" and plan.workers > 1 and not layout.sharded:
        buckets = strategy.bucket_bytes(built.student) // 2
    return Memory(
        images=plan.micro_batch,
        accumulation=plan.accumulation,
        weights=state.student,
        gradients=state.gradients,
        moments=state.moments,
        teacher=state.teacher + state.frozen,
        copies=copies,
        gathered=state.gathered,
        buckets=buckets,
        activations=kept,
        logits=logits,
        targets=targets,
        targets_at_once=config.loss.centring == "sinkhorn",
        views=views,
        ahead=cuda,
        workspace=workspace,
        libraries=0 if cuda else LIBRARIES,
        context=(CONTEXT + NCCL * (plan.workers > 1)) if cuda else 0,
    )


def _on_a_gpu(
    plan: Plan, student: Encoder, backbone: VisionTransformer, layout: Layout
) -> tuple[float, int, float]:
    """Bytes that our ViT keeps for its backward pass an image, copies of prototypes, and work space
    an image; without what a compiler computes again.

    A branch keeps for each of its rows what its norm is given, and in the type of precision what
    its matrix products are given; the attention also what it gives, and the products what
    LayerScale is given.
    """
    augment, train, half = plan.config.augment, plan.config.train, plan.precision == "bfloat16"
    element = 2 if half else BYTES_F32
    stream = 2 if half and train.residual == "bfloat16" else BYTES_F32
    # blocks before the first that learns keep nothing
    width, depth = backbone.width, len(backbone.blocks) - first_learning(backbone)
    one: Any = backbone.blocks[0]
    hidden = next(_linears(one.mlp)).out_features
    # under stochastic depth eager sums keep what they add; a compiler does not
    added = 2 if backbone.drop_path and not plan.compile else 1
    attention = width * (added * stream + (1 + 3 + 2 + 1) * element)
    # what the first layer gives, and what the second is given: with a gate that is as much
    mlp = width * (added * stream + 2 * element) + 2 * hidden * element
    rows = tokens = 0.0
    for crops, side in ((2, augment.global_size), (plan.local_crops, augment.local_size)):
        if crops:
            views, each = crops * plan.micro_batch, vit_tokens(backbone, side)
            tokens += crops * each
            rows += each * kept_views(views, backbone.drop_path) / plan.micro_batch
    block = rows * (attention + mlp)
    blocks = activations(block, tokens * width * stream, depth, layout)
    scored = 2 + plan.local_crops + masked_patches(plan)
    heads = [head for head in (student.dino_head, student.ibot_head) if head is not None]
    first = _linears(heads[0].mlp) if heads else ()
    inside = sum(layer.in_features + layer.out_features for layer in first)
    # directions over lengths in fp32 and in the type of the products
    prototypes = sum(head.last_layer.weight_v.numel() for head in heads) * (BYTES_F32 + 2 * half)
    # of the widest layer both gradients, and of the stream the old one and the new one
    workspace = rows * 2 * hidden * element + 2 * tokens * width * stream
    return blocks + scored * inside * element, prototypes, workspace


def _kept(plan: Plan, built: Pair) -> tuple[float, int]:
    """Bytes that the student keeps for its backward pass: for each image of a micro batch, and
    whatever their number.
    """
    student, augment = built.student, plan.config.augment
    patches = plan.grid[0] * plan.grid[1]
    masked = round(masked_patches(plan) / 2)
    dtype = torch.bfloat16 if plan.precision == "bfloat16" else None

    def kept(images: int) -> int:
        masks = torch.zeros(2 * images, patches, dtype=torch.bool)
        masks[:, :masked] = True
        places = masks.flatten().nonzero().squeeze(1)

        def forward() -> object:
            channels = plan.config.model.in_channels
            sides = [augment.global_size] * 2, [augment.local_size] * 2
            views = torch.zeros(2 * images, channels, *sides[0])
            crops = torch.zeros(plan.local_crops * images, channels, *sides[1])
            hidden = None if built.frozen or plan.headless else masks
            scores = plan.config.loss.dino_weight > 0
            local_views = crops if len(crops) else None
            return student(views, local_views, hidden, places, scores, None)

        return kept_for_backward(forward, dtype, student.parameters())

    few, many = kept(16), kept(32)
    each = (many - few) / 16
    return each, max(0, round(few - 16 * each))


def _linears(module: Module) -> Iterator[Linear]:
    return (layer for layer in module.modules() if isinstance(layer, Linear))
