"""What a step asks of a GPU, counted without one: bytes, operations, FLOPs, graphs, recompiles.

    python benchmarks/counts.py [--only steps|graphs] [RECIPE...]

A step runs once on fake tensors, which have shapes and no contents, at the size of a recipe's own
micro batch: each aten operation that it hands to the device is counted with the bytes that it reads
and writes and with its FLOPs. Losses and targets are counted by themselves too. Graphs are counted
by dynamo on a network that is narrow and has all blocks, over 50 steps with other masks.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from cases import RECIPES, VALUES, encodings, narrow, plan_of, views_of
from fake_device import Counter, as_on_a_gpu
from torch import Tensor, nn

from pipeline.model.groups import parameter_groups
from pipeline.model.pair import Pair
from pipeline.plan.plan import Plan
from pipeline.train import build, estimate
from pipeline.train.objective import Answer, Objective
from pipeline.train.parallel.strategy import Layout, prepare, student_forward
from pipeline.train.step import train_step
from pipeline.views.batch import Views
from pipeline.views.masked import Masked

GB = 1e9
WARM_UP, STEPS = 2, 50


@dataclass(frozen=True)
class StepCounts:
    """Of one step, on one worker of eight."""

    images: int
    masked: int  # patches that are scored, without padding
    whole: Counter
    eager: Counter  # targets, losses and their gradient at the logits in plain torch
    fused: Counter  # the same by kernels; a part of `whole`
    said_flops: float  # an image, by `estimate.flops_per_image`


def step_counts(plan: Plan) -> StepCounts:
    """One step of a plan's micro batch."""
    config = plan.config
    with as_on_a_gpu():
        with Counter():  # initialisation asks whether all numbers are in range
            pair = build.pair(config)
        objective = build.objective(config, pair)
        groups = parameter_groups(pair.student, config.optim.layerwise_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.optim.betas, fused=True)
        views = fake_views(plan)

        def step() -> None:
            generator = torch.Generator().manual_seed(0)
            train_step(
                pair.student, pair, [views], optimizer, VALUES, objective,
                autocast_dtype=torch.bfloat16, generator=generator,
            )  # fmt: skip

        with Counter():
            step()  # makes the optimizer's state
        with Counter() as whole:
            step()
        fused = loss_counts(plan, pair, objective, views)
        objective.spec = replace(objective.spec, kernels="eager")
        eager = loss_counts(plan, pair, objective, views)
    said = estimate.flops_per_image(plan, pair)
    return StepCounts(plan.micro_batch, views.masked.rows, whole, eager, fused, said)


def fake_views(plan: Plan) -> Views:
    """The views of a micro batch, without contents, as they reach the step."""
    images, augment = plan.micro_batch, plan.config.augment
    rows = round(images * estimate.masked_patches(plan))
    places = torch.zeros(build.patch_finder(plan).length, dtype=torch.long)
    return Views(
        torch.zeros(2 * images, 3, *[augment.global_size] * 2, dtype=torch.bfloat16),
        torch.zeros(
            augment.local_crops * images, 3, *[augment.local_size] * 2, dtype=torch.bfloat16
        ),
        torch.zeros(2 * images, plan.grid[0] * plan.grid[1], dtype=torch.bool),
        images,
        masked=Masked(places, rows),
    )


def loss_counts(plan: Plan, pair: Pair, objective: Objective, views: Views) -> Counter:
    """Targets, losses, their gradient at the logits, and the centres."""
    teacher, student = encodings(plan, pair, views)
    with Counter() as counter:
        patches = objective.masked(views)
        answer = Answer(teacher, patches.rows)
        targets = next(objective.targets(iter([answer]), VALUES.teacher_temperature))
        terms = objective.losses(student, targets, views, patches, overwrite=True)
        terms.total.backward()
        objective.commit()
    return counter


@dataclass(frozen=True)
class Graphs:
    """Of the blocks of student and teacher."""

    warm_up: int  # in the first steps
    later: int  # new ones in the 50 steps after them
    bad: int  # new ones in a step with an image that cannot be decoded
    breaks: int


class Backend:
    """Of `torch.compile`: counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return module.forward


@contextmanager
def counted_graphs() -> Iterator[Backend]:
    """What is compiled inside is counted instead."""
    backend, compile_module = Backend(), nn.Module.compile

    def counted(module: nn.Module, **options: Any) -> None:
        compile_module(module, **{**options, "backend": backend})

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with mock.patch.object(nn.Module, "compile", counted):
        yield backend


def graphs(recipe: str, steps: int = STEPS, images: int = 4) -> Graphs:
    """Steps with other masks and other draws of stochastic depth each."""
    plan = plan_of(recipe, images, *narrow(recipe))
    with counted_graphs() as backend:
        pair = prepare(build.pair(plan.config), Layout(1, torch.device("cpu"), compile=True))
        objective = build.objective(plan.config, pair)
        optimizer = torch.optim.AdamW(parameter_groups(pair.student), lr=0.0)

        def run(step: int, views: Views) -> int:
            train_step(
                pair.student, pair, [views], optimizer, VALUES, objective,
                autocast_dtype=torch.bfloat16, generator=torch.Generator().manual_seed(step),
            )  # fmt: skip
            return backend.graphs

        seen = [run(step, views_of(plan, step)) for step in range(WARM_UP + steps)]
        bad = run(0, replace(views_of(plan, 0), weights=(torch.arange(images) > 0).float()))
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    warm = seen[WARM_UP - 1]
    return Graphs(warm, seen[-1] - warm, bad - seen[-1], breaks)


def ddp_graphs(recipe: str, steps: int = 3, images: int = 2) -> int:
    """Graphs of a block of the recipe's own width in a group of workers, and of the teacher's.

    There are two where no block is split at the bounds of DDP's buckets.
    """
    fields = [f for f in narrow(recipe) if not f.startswith("model.")]
    plan = plan_of(recipe, images, "model.depth=2", *fields)
    with counted_graphs() as backend, alone():
        layout = Layout(2, torch.device("cpu"), compile=True)
        pair = prepare(build.pair(plan.config), layout)
        objective = build.objective(plan.config, pair)
        optimizer = torch.optim.AdamW(parameter_groups(pair.student), lr=0.0)
        student = student_forward(pair, layout)
        for step in range(steps):
            train_step(
                student, pair, [views_of(plan, step)], optimizer, VALUES, objective,
                autocast_dtype=torch.bfloat16, generator=torch.Generator().manual_seed(step),
            )  # fmt: skip
    return backend.graphs


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--only", choices=("steps", "graphs"))
    options = parser.parse_args()
    if options.only != "graphs":
        print(
            "| recipe | images | masked patches | loss, GB: eager | fused | operations: eager "
            "| fused | of a step | waits | GFLOPs an image | plan says |"
        )
        print("|---" * 11 + "|", flush=True)
        for recipe in options.recipes:
            x = step_counts(plan_of(recipe, RECIPES[recipe], workers=8))
            print(
                f"| {recipe} | {x.images} | {x.masked:,} | {x.eager.bytes / GB:.1f} "
                f"| {x.fused.bytes / GB:.1f} | {x.eager.operations} | {x.fused.operations} "
                f"| {x.whole.operations:,} | {x.whole.waits} "
                f"| {x.whole.flops / x.images / 1e9:,.1f} | {x.said_flops / 1e9:,.1f} |",
                flush=True,
            )
    if options.only != "steps":
        print(f"\n| recipe | graphs | new in {STEPS} steps | with a bad image | breaks | in DDP |")
        print("|---" * 6 + "|", flush=True)
        for recipe in options.recipes:
            g = graphs(recipe)
            inside = ddp_graphs(recipe)
            cells = (recipe, g.warm_up, g.later, g.bad, g.breaks, inside)
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
