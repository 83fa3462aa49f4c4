"""What a recipe asks of GPUs, network, storage and CPUs, by the number of GPUs: arithmetic.

    python benchmarks/scaling.py [RECIPE...]

Tables of docs/scaling.md. FLOPs and memory are those that a plan says, from the network without its
numbers; rates follow from a share of the peak that is assumed, and times of sums from bandwidths on
paper. Nothing here is measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property

import torch
from cases import IMAGE_BYTES, RECIPES, plan_of
from fake_device import Counter, Fake

from pipeline.model.pair import Pair
from pipeline.plan.plan import Plan
from pipeline.train import build, estimate
from pipeline.train.parallel.memory import FULL, HALF, numbers, state_bytes
from pipeline.train.parallel.shards import products_of
from pipeline.train.speed.peaks import gpu_peak

GIB, GB = 2**30, 1e9
DEVICE = "NVIDIA H100 80GB HBM3"
# Shares of the peak that are assumed; what this project aims at, see docs/scaling.md.
MFU = {"vits16_8gpu": 0.25, "vitb14_8gpu": 0.4}
MFU_OTHERS = 0.5
GPUS_A_NODE = 8
SIZES = (1, 8, 64, 256)
# GB/s each way, from data sheets: of a GPU inside a node; of all adapters of a node together, over
# which its GPUs' rings are spread.
NETWORKS = {
    "NVLink in a node": 450.0,
    "3,200 Gb/s a node": 400.0,
    "400 Gb/s a node": 50.0,
    "100 Gb/s a node": 12.5,
}
CORE_IMAGES_S = 210.0  # that a core reads, decodes and cuts; photos of 0.2 megapixels (loader.py)


@dataclass(frozen=True)
class Asked:
    """What a recipe asks for on so many GPUs."""

    recipe: str
    plan: Plan
    pair: Pair
    gpus: int

    @cached_property
    def cost(self) -> estimate.Cost:
        return estimate.estimated_cost(self.plan, self.pair)

    @property
    def images_s(self) -> float:
        """Of one GPU at the assumed share of its peak."""
        share = MFU.get(self.recipe, MFU_OTHERS)
        return share * gpu_peak(DEVICE, torch.bfloat16) / self.cost.flops_per_image

    @property
    def step_s(self) -> float:
        return self.plan.micro_batch / self.images_s

    @property
    def parameters(self) -> int:
        return numbers(self.pair.student.parameters())

    @property
    def ddp_bytes(self) -> float:
        """Through a GPU inside a node, or through a node, in a step: a sum of all gradients in
        fp32, in a ring. Of few members a little less.
        """
        return 2 * FULL * self.parameters

    @property
    def fsdp_bytes(self) -> float:
        """The same of one micro batch: the student's weights forward and backward, the teacher's
        forward, and the sum of the gradients in fp32.
        """
        products = numbers(products_of(self.pair.student))
        weights = HALF * products + FULL * (self.parameters - products)
        return 3 * weights + FULL * self.parameters


def asked(recipe: str, gpus: int, *fields: str) -> Asked:
    """A recipe at its own micro batch, with a network that has shapes only."""
    plan = plan_of(recipe, RECIPES[recipe], *fields, workers=gpus)
    with Fake(), Counter():
        return Asked(recipe, plan, build.pair(plan.config), gpus)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=list(RECIPES))
    tables = {"compute": compute, "memory": memory, "network": network, "data": data}
    parser.add_argument("--only", choices=tables)
    options = parser.parse_args()
    one = {recipe: asked(recipe, GPUS_A_NODE) for recipe in options.recipes}
    for name, table in tables.items():
        if options.only in (None, name):
            table(one)


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def header(*cells: str) -> None:
    print()
    row(*cells)
    print("|---" * len(cells) + "|")


def compute(recipes: dict[str, Asked]) -> None:
    """One GPU."""
    header("recipe", "parameters, M", "images a GPU", "GFLOPs an image", "images/s", "ms a step",
           "crops, MB an image", "cores that decode")  # fmt: skip
    for name, x in recipes.items():
        row(
            *(name, f"{x.parameters / 1e6:.0f}", x.plan.micro_batch),
            *(f"{x.cost.flops_per_image / 1e9:,.0f}", f"{x.images_s:,.0f}"),
            *(f"{1e3 * x.step_s:.0f}", f"{x.plan.view_bytes / 1e6:.2f}"),
            f"{x.images_s / CORE_IMAGES_S:.1f}",
        )


def memory(recipes: dict[str, Asked]) -> None:
    """GiB of a GPU: state, all, and all where blocks are computed again in the backward pass."""
    cases = (("ddp", 8), ("fsdp", 8), ("fsdp", 64))
    names = [f"{strategy}, {gpus} GPUs" for strategy, gpus in cases]
    header("recipe", "images a GPU", *names)
    for name, x in recipes.items():
        cells = []
        for strategy, gpus in cases:
            fields = f"train.strategy={strategy}", "train.activation_checkpointing=true"
            kept, again = asked(name, gpus, fields[0]), asked(name, gpus, *fields)
            layout = build.layout(kept.plan, torch.device("cuda"))
            state = state_bytes(kept.pair, layout, kept.plan.accumulation).total / GIB
            whole, least = (y.cost.memory_bytes / GIB for y in (kept, again))
            cells.append(f"{state:.1f}, {whole:.0f}, {least:.0f}")
        row(name, x.plan.micro_batch, *cells)


def network(recipes: dict[str, Asked]) -> None:
    """Bytes of a step, and how long they take."""
    header("recipe", "ms a step", "strategy", "GB a step", *NETWORKS)
    for name, x in recipes.items():
        for strategy, sent in (("ddp", x.ddp_bytes), ("fsdp", x.fsdp_bytes)):
            times = (f"{1e3 * sent / GB / speed:.0f} ms" for speed in NETWORKS.values())
            row(name, f"{1e3 * x.step_s:.0f}", strategy, f"{sent / GB:.2f}", *times)


def data(recipes: dict[str, Asked]) -> None:
    """What storage, CPUs and the stream have to give."""
    header("recipe", "GPUs", "images/s", "from storage, GB/s", "crops into a node, GB/s",
           "blocks/s", "cores that decode")  # fmt: skip
    for name, x in recipes.items():
        for gpus in SIZES:
            rate = gpus * x.images_s
            crops = min(gpus, GPUS_A_NODE) * x.images_s * x.plan.view_bytes / GB
            row(
                *(name, gpus, f"{rate:,.0f}", f"{rate * IMAGE_BYTES / GB:.2f}", f"{crops:.2f}"),
                *(f"{rate / x.plan.chunk_images:,.0f}", f"{rate / CORE_IMAGES_S:,.0f}"),
            )


if __name__ == "__main__":
    main()
