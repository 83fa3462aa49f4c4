"""The plain loop that `benchmarks/step.py` compares with: one process, one thread, plain torch.

    python benchmarks/plain_step.py SHARDS NETWORK STEPS [decoded] [half]

The networks, crops, colours and masks are those of the product. All else is written out: dense
float32 targets and losses, `torch.optim.AdamW` in its fused form, `clip_grad_norm_` and a lerp for
the teacher. `decoded`: images are decoded and cut before the clock starts. `half`: a step has half
the batch. Prints the CPU milliseconds of a step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.step import recipe
from pipeline.config.load import load
from pipeline.driver.cluster import cpu_has_bfloat16
from pipeline.model.groups import parameter_groups
from pipeline.model.pair import Pair
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan
from pipeline.shards.shards import ShardSet, open_shards
from pipeline.stream.decoder import make_chunk
from pipeline.stream.reader import read_portions
from pipeline.train import build
from pipeline.train.parallel.strategy import prepare
from pipeline.train.run import plan_for as planned
from pipeline.train.run import reading_for, stream_spec
from pipeline.views.batch import Batch, Views

SETTLED = 10  # steps before the clock starts


def plan_for(network: str, shards: ShardSet, steps: int, half: bool) -> Plan:
    """The recipe for one worker."""
    fields = [f"optim.steps={steps}", "train.workers=1", "data.source=", "data.shards=x"]
    if half:
        whole = load(recipe(network)).optim.global_batch_size
        fields += [f"optim.global_batch_size={whole // 2}"]
    machine = Machine(cpus=2, gpus=0, bfloat16=cpu_has_bfloat16())
    return planned(load(recipe(network, *fields)), shards, machine)


def batches(plan: Plan, shards: ShardSet, steps: int) -> Iterator[Batch]:
    """The images of the run, read, decoded and cut in this process."""
    reading, spec = reading_for(plan, shards), stream_spec(plan, shards, float("inf"))
    size = plan.config.optim.global_batch_size
    tasks = reading.tasks(0, steps)
    for portion in read_portions(tasks, spec.columns, spec.seed, size):
        yield Batch.from_chunk(make_chunk(portion, 0, len(portion), spec))


def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """`[N, K]` to probabilities (SwAV), alternately of equal prototypes and equal rows."""
    q = torch.exp(logits.float() / temperature - logits.float().max() / temperature)
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(0, keepdim=True)
        q /= q.sum(1, keepdim=True)
    return q


def koleo(features: Tensor) -> Tensor:
    x = F.normalize(features.float(), dim=-1)
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-1).argmax(1)
    return -torch.log(F.pairwise_distance(x, x[nearest]) + 1e-8).mean()


class PlainLoop:
    """Networks and optimizer, and the step over them."""

    def __init__(self, plan: Plan, pair: Pair) -> None:
        self.plan, self.loss, (self.student, self.teacher) = plan, plan.config.loss, pair
        groups = parameter_groups(self.student, 1.0, 1.0)
        self.optimizer = torch.optim.AdamW(groups, betas=plan.config.optim.betas, fused=True)

    def step(self, number: int, views: Views) -> None:
        """One update."""
        plan, values, rows = self.plan, self.plan.at(number), len(views.global_views)
        for group in self.optimizer.param_groups:
            group["lr"] = values.lr
            group["weight_decay"] = values.weight_decay * group["weight_decay_multiplier"]
        self.optimizer.zero_grad()
        masked = views.masks.numel() > 0 and self.loss.ibot_weight > 0
        places = views.masks.flatten().nonzero()[:, 0] if masked else None
        local = views.local_views if len(views.local_views) else None
        hidden = views.masks if views.masks.shape[1] else None
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bfloat16"):
            with torch.no_grad():
                told = self.teacher(views.global_views, None, None, places)
            said = self.student(views.global_views, local, hidden, places)
        temperature = values.teacher_temperature
        first, second = sinkhorn(told.dino[:rows], temperature).chunk(2)
        crops = len(views.local_views) // views.images
        log_student = F.log_softmax(said.dino.float() / self.loss.student_temperature, dim=-1)
        pairs = 2 + 2 * crops
        targets = torch.cat([second, first] + [first + second] * crops)
        ends = rows + len(views.local_views)
        total = -(targets * log_student[:ends]).sum() / (views.images * pairs)
        if masked:
            patches = sinkhorn(told.dino[rows:], temperature)
            counts = views.masks.sum(1, keepdim=True).clamp(min=1).expand_as(views.masks)
            weights = 1.0 / counts[views.masks]
            each = (patches * log_student[ends:]).sum(-1)
            total = total - self.loss.ibot_weight * (each * weights).sum() / rows
        for crop in said.cls.chunk(2):
            total = total + self.loss.koleo_weight * koleo(crop)
        total.backward()
        for module in self.student.children():
            torch.nn.utils.clip_grad_norm_(module.parameters(), plan.config.optim.clip)
        self.optimizer.step()
        with torch.no_grad():
            student, teacher = list(self.student.parameters()), list(self.teacher.parameters())
            torch._foreach_lerp_(teacher, student, 1 - values.teacher_momentum)
        if not torch.isfinite(total):
            raise RuntimeError("the loss is not finite")


def main(shards_folder: str, network: str, steps: int, *how: str) -> float:
    """CPU milliseconds a step."""
    torch.set_num_threads(1)
    shards = open_shards(shards_folder)
    plan = plan_for(network, shards, SETTLED + steps, "half" in how)
    pair = build.pair(plan.config)
    prepare(pair, build.layout(plan, torch.device("cpu")))  # channels last, where it is for us
    make = build.view_maker(plan, pair, torch.device("cpu"))
    loop = PlainLoop(plan, pair)
    images = batches(plan, shards, SETTLED + steps)
    if "decoded" in how:
        images = iter(list(images))
    begin = 0.0
    for number in range(SETTLED + steps):
        if number == SETTLED:
            begin = time.process_time()
        loop.step(number, make(next(images)))
    return 1000 * (time.process_time() - begin) / steps


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:]))
