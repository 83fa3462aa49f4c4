"""What the plan says of a frozen teacher."""

from __future__ import annotations

import time

import torch

from pipeline.model.encoders.frozen import FeatureTeacher
from pipeline.model.pair import Pair
from pipeline.plan.plan import Plan
from pipeline.uri import public

TIMED = 2  # images, once to warm up and once by the clock


def objective_line(plan: Plan) -> str:
    """What is optimised."""
    config, loss = plan.config, plan.config.loss
    ours = (
        f"{config.objective}: DINO {loss.dino_weight:g}, iBOT {loss.ibot_weight:g}, "
        f"KoLeo {loss.koleo_weight:g}; {loss.centring} centring"
    )
    if plan.headless:
        return (
            "the teacher's features alone (distill.objective=false): no heads are built, no local "
            "crops cut; loss.*, head.* and ibot_head.* are not used"
        )
    return ours + "; beside it the teacher's features" * plan.learns_features


def teacher_lines(plan: Plan, built: Pair) -> list[str]:
    """Which teacher, what is learnt of it, what it sees and what it costs; none without one."""
    place = public(plan.frozen_teacher)
    if built.frozen is not None:
        size = sum(p.numel() for p in built.frozen.parameters()) / 1e6
        return [
            f"teacher     {place}, frozen, {size:.1f} M parameters; targets over its prototypes"
        ]
    teacher = built.feature_teacher
    if teacher is None:
        return []
    learnt = f"{plan.distil_loss} to its features"
    learnt += f" ({plan.distil_reason})" * bool(plan.distil_reason)
    return [
        f"teacher     {place}, frozen, {_size(teacher)}; {learnt}",
        f"            {_learnt(plan, built, teacher)}",
        f"            {_seen(plan, teacher)}",
        *_outside(plan, teacher),
    ]


def _size(teacher: FeatureTeacher) -> str:
    if teacher.outside:
        return f"{teacher.weight_bytes / 2**20:.1f} MiB of ONNX"
    return f"{sum(p.numel() for p in teacher.network.parameters()) / 1e6:.1f} M parameters"


def _learnt(plan: Plan, built: Pair, teacher: FeatureTeacher) -> str:
    adapter, settings = built.student.adapter, plan.config.distill
    backbone = built.student.backbone
    assert adapter is not None
    terms = []
    if adapter.cls is not None:
        terms.append(f"CLS {settings.cls_weight:g} ({backbone.width} to {teacher.width} wide)")
    if adapter.patch is not None:
        side = plan.config.augment.global_size // backbone.patch_size
        grid = f"{side} x {side}"
        if teacher.grid != (side, side):
            grid = f"{teacher.grid[0]} x {teacher.grid[1]} resampled to {grid}"
        terms.append(f"patches {settings.patch_weight:g} ({grid})")
    elif settings.patch_weight:
        lacking = "the teacher" if backbone.has_patches else "the student"
        terms.append(f"no patches: {lacking} has none")
    return ", ".join(terms)


def _seen(plan: Plan, teacher: FeatureTeacher) -> str:
    size = plan.config.augment.global_size
    resized = f"resized from {size} to" if teacher.size != size else "of"
    return (
        f"it sees the student's global crops, {resized} {teacher.size} pixels, normalised as its "
        "own images were"
    )


def _outside(plan: Plan, teacher: FeatureTeacher) -> list[str]:
    """Where ONNX computes, and what an image costs there: two global crops."""
    if not teacher.outside:
        return []
    if plan.device == "cuda":
        return [
            "            onnxruntime computes it, on the GPU where it has its CUDA provider, else "
            "on the CPU; its FLOPs are not counted"
        ]
    side = plan.config.augment.global_size
    x = torch.zeros(2 * TIMED, plan.config.model.in_channels, side, side)
    teacher(x, None)
    began = time.perf_counter()
    teacher(x, None)
    cost = 1000 * (time.perf_counter() - began) / TIMED
    return [
        f"            onnxruntime computes it on the CPU of each worker, about {cost:.1f} ms an "
        "image here; its FLOPs are not counted"
    ]
