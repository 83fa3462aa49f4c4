"""What the parts of `gpu.py` are made of: a run without its stream, clocks, the machine."""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch._dynamo  # here, so that every part begins with it
import torch.distributed as dist
from cases import RECIPES, VALUES, narrow, plan_of, views_of
from fake_device import Counter, Fake

from pipeline.plan.plan import Plan
from pipeline.train import build, estimate, start
from pipeline.train.parallel.strategy import Layout, student_forward
from pipeline.train.speed.peaks import peak_flops
from pipeline.train.start import TrainState
from pipeline.train.step import train_step
from pipeline.views.batch import Batch, Views
from pipeline.views.photometric import PHOTOMETRIC_DRAWS, draw_photometric

GIB = 2**30
MASKS = 4  # steps with masks of their own; then they come again
ROUNDS = 3


@dataclass(frozen=True)
class Size:
    """On what a part runs: a GPU, or tiny on a CPU."""

    small: bool
    seconds: float = 0.0  # that are left to this part

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.small else "cuda")

    def plan(self, recipe: str, images: int, *fields: str) -> Plan:
        """Of a recipe as it is, or narrow."""
        if self.small:
            extra = (*narrow(recipe), "model.depth=2", "train.compile=false")
            return plan_of(recipe, min(images, 4), *extra, *fields, gpus=0)
        return plan_of(recipe, images, *fields)

    def wait(self) -> None:
        """Until the device has done all that it was asked for."""
        if not self.small:
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], object], times: int = 1) -> float:
        """Seconds of one call, on average."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(times):
            call()
        self.wait()
        return (time.perf_counter() - begin) / times

    def median(self, call: Callable[[], object], times: int) -> tuple[float, float, float]:
        """Seconds of one call: median, least and most of three rounds of so many."""
        rounds = [self.timed(call, 1 if self.small else times) for _ in range(ROUNDS)]
        return statistics.median(rounds), min(rounds), max(rounds)


@dataclass
class Trainee:
    """A run of a recipe without its stream: networks, optimizer, and views of noise."""

    size: Size
    recipe: str
    plan: Plan
    layout: Layout
    state: TrainState
    student: torch.nn.Module
    expected: estimate.Cost
    views: list[Views] = field(default_factory=list)
    steps: int = 0
    first_step_s: float = 0.0

    @classmethod
    def of(
        cls,
        size: Size,
        recipe: str,
        plan: Plan,
        layout: Layout | None = None,
        split_graphs: bool = False,
    ) -> Trainee:
        """As a worker builds it (`train/worker.py`), after its first step.

        `split_graphs`: let dynamo cut the graphs of blocks at the bounds of DDP's buckets.
        """
        pair = start.networks(plan, resumed=False)
        expected = estimate.estimated_cost(plan, pair)
        layout = layout or build.layout(plan, size.device)
        state = start.train_state(plan, pair, layout, resumed=False)
        made = cls(size, recipe, plan, layout, state, student_forward(pair, layout), expected)
        first = views_of(plan, 0, size.device)
        crops = (first.global_views, first.local_views)
        made.views = [views_of(plan, step, size.device, crops) for step in range(MASKS)]
        if not size.small:  # as `ViewMaker` does on a GPU
            ones = torch.ones(first.images, device=size.device)
            made.views = [replace(views, weights=ones) for views in made.views]
        torch._dynamo.config.optimize_ddp = split_graphs
        made.first_step_s = size.timed(made.step)
        return made

    def step(self, views: Views | None = None) -> None:
        """One update."""
        train_step(
            self.student,
            self.state.pair,
            [views or self.views[self.steps % MASKS]],
            self.state.optimizer,
            VALUES,
            self.state.objective,
            autocast_dtype=self.layout.precision,
            generator=torch.Generator().manual_seed(self.steps),
        )
        self.steps += 1

    def measured(self, times: int = 8) -> dict[str, Any]:
        """Seconds of the first step, which compiles, and what the later ones take."""
        for _ in range(2):
            self.step()
        if not self.size.small:
            torch.cuda.reset_peak_memory_stats()
        middle, least, most = self.size.median(self.step, times)
        images = self.plan.micro_batch
        peak = peak_flops(self.size.device.type, self.layout.precision or torch.float32, 1)
        flops_s = images / middle * self.expected.flops_per_image
        figures = {
            "recipe": self.recipe,
            "images": images,
            "first_step_s": round(self.first_step_s, 1),
            "step_ms": round(1e3 * middle, 1),
            "spread_ms": [round(1e3 * least, 1), round(1e3 * most, 1)],
            "images_s": round(images / middle, 1),
            "mfu": round(flops_s / peak, 3) if peak else "unknown",
        }
        plan_gib = round(self.expected.memory_bytes / GIB, 1)
        return figures | memory() | {"plan_gib": plan_gib}

    def with_a_bad_image(self) -> Views:
        """The views of a step in which one image could not be decoded."""
        views = self.views[0]
        weights = (torch.arange(views.images) > 0).float()
        masked = build.patch_finder(self.plan)(views.masks.cpu(), weights).to(self.size.device)
        return replace(views, weights=weights.to(self.size.device), masked=masked)


def fitting(size: Size, recipe: str) -> Trainee:
    """A trainee with the largest micro batch that fits: twice the recipe's own, or a half of that
    again and again, where the plan's estimate or the device says that it is too much.
    """
    images = 2 * RECIPES[recipe]
    while True:
        plan = size.plan(recipe, images)
        if size.small or _fits(plan):
            try:
                return Trainee.of(size, recipe, plan)
            except torch.OutOfMemoryError:
                torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
        if images == 1:
            raise RuntimeError(f"{recipe} does not fit with one image")
        images //= 2


def _fits(plan: Plan) -> bool:
    with Fake(), Counter():
        pair = build.pair(plan.config)
    return estimate.estimated_cost(plan, pair).memory_bytes < 0.95 * torch.cuda.mem_get_info()[1]


def memory() -> dict[str, Any]:
    """GiB at the peak, of tensors and of what was taken for them."""
    if not torch.cuda.is_initialized():
        return {}
    return {
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 1),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 1),
    }


def chunk(plan: Plan, images: int, seed: int) -> Batch:
    """Crops of noise as they come from the stream."""
    rng = np.random.default_rng(seed)
    augment, patches = plan.config.augment, plan.grid[0] * plan.grid[1]

    def crops(count: int, side: int) -> np.ndarray:
        one = rng.integers(0, 256, (1, count, side, side, 3), np.uint8)
        return np.repeat(one, images, 0)

    draws = rng.random((images, 2 + augment.local_crops, PHOTOMETRIC_DRAWS))
    columns = {
        "image_ids": np.zeros((images, 16), np.uint8),
        "global_crops": crops(2, augment.global_size),
        "local_crops": crops(augment.local_crops, augment.local_size),
        "photometric": draw_photometric(draws, build.photometric_spec(plan.config)),
        "masks": rng.random((images, 2, patches)) < 0.15,
        "labels": np.full(images, -1),
        "valid": np.ones(images, bool),
    }
    return Batch.from_chunk(columns)


@contextmanager
def process_group(size: Size) -> Iterator[None]:
    """Of this process alone, over NCCL or gloo."""
    backend = "gloo" if size.small else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def machine(size: Size) -> dict[str, Any]:
    """What the figures are of."""
    try:
        import triton

        compiler = {"triton": triton.__version__}
    except ImportError:
        compiler = {"triton": None}
    compiler["cc"] = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if size.small:
        return {"gpu": None, "torch": torch.__version__, "cpus": os.cpu_count(), **compiler}
    smi = shutil.which("nvidia-smi")
    query = [smi, "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True).stdout.strip() if smi else None
    return {
        "gpu": torch.cuda.get_device_name(),
        "memory_gib": round(torch.cuda.mem_get_info()[1] / GIB, 1),
        "driver_power_clock": said,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        **compiler,
    }
