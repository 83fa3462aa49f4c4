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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from cases import RECIPES, VALUES, narrow, plan_of, views_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from pipeline.model import block
from pipeline.model.groups import parameter_groups
from pipeline.model.pair import Encoded, Pair
from pipeline.plan.plan import Plan
from pipeline.train import build, estimate
from pipeline.train.parallel.strategy import Layout, prepare, student_forward
from pipeline.train.step import Objective, train_step
from pipeline.views.batch import Views

aten = torch.ops.aten
GB = 1e9
WARM_UP, STEPS = 2, 50

OVERWRITTEN = {aten.copy_.default, aten.fill_.Scalar, aten.zero_.default}  # before it is read
PICKED = {  # of their first argument they read as much as they give
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.embedding.default,
}
# What stands for a GPU's attention on fake tensors of the CPU; the counter of torch lacks them.
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Fake(FakeTensorMode):
    """Fake tensors that are copied with the modules that hold them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Fake:
        return self


class Counter(TorchDispatchMode):
    """Counts what passes through it; answers what the host asks the device for.

    Args:
        masked: masked patches, where the host asks for their places.
    """

    def __init__(self, masked: int = 0) -> None:
        super().__init__()
        self.masked = masked
        self.operations = self.bytes = self.flops = self.waits = 0
        self._reading = False

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if operation is aten._local_scalar_dense.default:
            self.waits += not self._reading  # a list is read at once
            self._reading = True
            return 0.0
        if operation is aten.nonzero.default:
            self.waits += 1
            self.operations += 1
            return args[0].new_empty((self.masked, args[0].ndim), dtype=torch.long)
        result = operation(*args, **kwargs)
        if not _is_free(operation):
            self._reading = False
            self.operations += 1
            self.bytes += moved(operation, args, kwargs, result)
            self.flops += _flops(operation, args, kwargs, result)
        return result


def _is_free(operation: Any) -> bool:
    """Whether it does nothing on a device: views, questions, memory that is not filled."""
    name = operation._schema.name
    views = any(r.alias_info and not r.alias_info.is_write for r in operation._schema.returns)
    others = ("aten::_unsafe_view", "aten::detach", "aten::lift_fresh")
    return views or name in others or name.startswith(("prim::", "profiler::")) or "empty" in name


def moved(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes that an operation reads and writes, each number once."""
    read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    if not written and operation._schema.name.endswith("_"):  # a list, in place
        written = [x for x in tree_leaves(args[0]) if isinstance(x, Tensor)]
    if operation in OVERWRITTEN:
        read = read[1:]
    elif operation in PICKED:
        read = read[1:] + written
    return sum(x.numel() * x.element_size() for x in read + written)


def _flops(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    if operation is ATTENTION:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    if operation is ATTENTION_BACKWARD:  # five products instead of two
        return sdpa_flop_count(*(x.shape for x in args[1:4])) * 5 // 2
    count = flop_registry.get(operation._overloadpacket)
    return count(*args, **kwargs, out_val=result) if count else 0


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Fake tensors of the CPU, on which what depends on the device is as on a GPU.

    Those of a GPU cannot go backward on a machine without one.
    """
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(block, "_attend", F.scaled_dot_product_attention))
        clip = torch.nn.utils.clip_grad
        stack.enter_context(mock.patch.object(clip, "_has_foreach_support", lambda *_: True))
        stack.enter_context(Fake())
        yield


@dataclass(frozen=True)
class StepCounts:
    """Of one step, on one worker."""

    images: int
    masked: int  # patches, padding included
    whole: Counter
    loss: Counter  # targets, losses and their gradient at the logits; a part of `whole`
    said_flops: float  # an image, by `estimate.flops_per_image`


def step_counts(plan: Plan) -> StepCounts:
    """One step of a plan's micro batch."""
    config = plan.config
    masked = masked_rows(plan)
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

        with Counter(masked):
            step()  # makes the optimizer's state
        with Counter(masked) as whole:
            step()
        loss = loss_counts(plan, pair, objective, views)
    said = estimate.flops_per_image(plan, pair)
    return StepCounts(plan.micro_batch, masked, whole, loss, said)


def masked_rows(plan: Plan) -> int:
    """Masked patches of a micro batch on average."""
    loss, patches = plan.config.loss, plan.grid[0] * plan.grid[1]
    share = loss.mask_probability * sum(loss.mask_ratio) / 2
    return round(2 * plan.micro_batch * patches * share)


def fake_views(plan: Plan) -> Views:
    """The views of a micro batch, without contents."""
    images, augment = plan.micro_batch, plan.config.augment
    return Views(
        torch.zeros(2 * images, 3, *[augment.global_size] * 2),
        torch.zeros(augment.local_crops * images, 3, *[augment.local_size] * 2),
        torch.zeros(2 * images, plan.grid[0] * plan.grid[1], dtype=torch.bool),
        images,
    )


def loss_counts(plan: Plan, pair: Pair, objective: Objective, views: Views) -> Counter:
    """Targets, losses, their gradient at the logits, and the centres."""
    counter = Counter(masked_rows(plan))
    images, crops = plan.micro_batch, plan.config.augment.local_crops
    with counter:
        patches = objective.masked(views)
        rows = len(patches.places)

        def encoded(cls_rows: int, learns: bool) -> Encoded:
            heads = pair.student.dino_head, pair.student.ibot_head
            widths = [len(head.last_layer.weight_g) for head in heads if head is not None]
            counts = [cls_rows, rows] if len(widths) == 2 else [cls_rows + rows]
            logits = [
                torch.empty(n, k, dtype=torch.bfloat16, requires_grad=learns)
                for n, k in zip(counts, widths, strict=True)
            ]
            width = plan.config.model.dimensions[0]
            cls = torch.empty(2 * images, width, dtype=torch.bfloat16, requires_grad=learns)
            return Encoded(cls, logits[0], logits[1] if len(logits) == 2 else None)

        teacher, student = encoded(2 * images, False), encoded((2 + crops) * images, True)
        targets = next(objective.targets(iter([(teacher, patches.rows)]), 0.05))
        objective.losses(student, targets, views, patches).total.backward()
        objective.commit()
    return counter


@dataclass(frozen=True)
class Graphs:
    """Of the blocks of student and teacher."""

    warm_up: int  # in the first steps
    later: int  # new ones in the 50 steps after them
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
        warm = 0
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                warm = backend.graphs
            train_step(
                pair.student, pair, [views_of(plan, step)], optimizer, VALUES, objective,
                autocast_dtype=torch.bfloat16, generator=torch.Generator().manual_seed(step),
            )  # fmt: skip
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return Graphs(warm, backend.graphs - warm, breaks)


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
            "| recipe | images | masked patches | loss, GB | loss, operations | step, operations "
            "| waits | GFLOPs an image | plan says |"
        )
        print("|---" * 9 + "|", flush=True)
        for recipe in options.recipes:
            x = step_counts(plan_of(recipe, RECIPES[recipe]))
            print(
                f"| {recipe} | {x.images} | {x.masked} | {x.loss.bytes / GB:.1f} "
                f"| {x.loss.operations} | {x.whole.operations} | {x.whole.waits} "
                f"| {x.whole.flops / x.images / 1e9:.1f} | {x.said_flops / 1e9:.1f} |",
                flush=True,
            )
    if options.only != "steps":
        print(f"\n| recipe | graphs | new ones in {STEPS} steps | graph breaks | graphs in DDP |")
        print("|---" * 5 + "|", flush=True)
        for recipe in options.recipes:
            g = graphs(recipe)
            inside = ddp_graphs(recipe)
            print(f"| {recipe} | {g.warm_up} | {g.later} | {g.breaks} | {inside} |", flush=True)


if __name__ == "__main__":
    main()
