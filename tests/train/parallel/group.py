"""Two workers over gloo that train a small network by one strategy; what each of them ends with."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional

from pipeline.model.encoders.module import ModuleSpec
from pipeline.model.encoders.source import Name, read_source
from pipeline.model.foreign import TimmSpec
from pipeline.model.groups import parameter_groups
from pipeline.model.pair import HeadSpec, Pair, build_pair
from pipeline.model.vit import BackboneSpec
from pipeline.schedule import StepValues
from pipeline.train.objective import Objective, ObjectiveSpec
from pipeline.train.parallel import strategy
from pipeline.train.parallel.strategy import Layout
from pipeline.train.step import train_step
from tests.train.small_run import HEAD, OTHER_HEAD, SPEC, split, views

SMALL = "module:pipeline.model.encoders.residual:small"
STEPS = 12
IMAGES = 4  # of a worker in a step


@dataclass(frozen=True)
class Case:
    """One run of a group."""

    strategy: Any = "ddp"
    centring: Any = "softmax"
    accumulation: int = 1
    checkpointing: bool = False
    compile: bool = False
    ibot: HeadSpec | None = OTHER_HEAD
    drop_path: float = 0.3
    precision: torch.dtype | None = None
    reduce: torch.dtype = torch.float32
    residual: torch.dtype = torch.float32
    steps: int = STEPS
    options: dict[str, Any] = field(default_factory=dict)  # of the backbone
    timm: str = ""  # a foreign backbone instead of ours
    norm: Any = "none"  # in the heads and on the feature
    residual_network: bool = False  # instead of our backbone: convolutions with BatchNorm

    def layout(self, workers: int) -> Layout:
        return Layout(
            workers,
            torch.device("cpu"),
            self.strategy,
            self.precision,
            self.reduce,
            self.residual,
            self.compile,
            self.checkpointing,
        )


def values(step: int) -> StepValues:
    """The last layer is frozen at first, then the backbone is, then all learn."""
    frozen_backbone = 0.0 if 2 <= step < 4 else None
    return StepValues(1e-3, 0.04, 0.9, 0.05, 0.0 if step < 2 else 1e-3, backbone_lr=frozen_backbone)


def build(case: Case) -> Pair:
    spec: BackboneSpec | TimmSpec = replace(SPEC, drop_path=case.drop_path, **case.options)
    if case.timm:
        spec = TimmSpec(case.timm, image_size=32, patch_size=16, drop_path=case.drop_path)
    if case.residual_network:
        text = read_source(Name.of(SMALL))["pipeline/model/encoders/residual.py"]
        files = {"residual_small.py": text.replace("(64, 128, 256)", "(8, 16, 24)")}
        network = ModuleSpec("residual_small:small", image_size=28, files=files)
        return build_pair(network, normed(HEAD, case), None, seed=0)
    ibot = case.ibot and normed(case.ibot, case)
    return build_pair(spec, normed(HEAD, case), ibot, seed=0)


def normed(head: HeadSpec, case: Case) -> HeadSpec:
    return replace(head, norm=case.norm, input_norm=case.norm)


def train(case: Case, rank: int, workers: int) -> dict[str, Any]:
    """Whole weights, centres and the numbers of each step. One worker alone takes the micro batches
    of two.
    """
    layout = case.layout(workers)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pair = build(case)
    patches = 0.0 if case.residual_network else 1.0
    spec = ObjectiveSpec(centring=case.centring, clip=0.5, ibot_weight=patches)
    objective = Objective.for_pair(spec, pair)
    with aot_eager():
        strategy.prepare(pair, layout)
    groups = parameter_groups(pair.student, layerwise_decay=0.8)
    optimizer = torch.optim.AdamW(groups, lr=0.0, eps=1e-4)
    forward = strategy.student_forward(pair, layout)
    steps = []
    for step in range(case.steps):
        parts, generators = [], []
        for worker in [rank] if workers > 1 else [0, 1]:
            mine = views(IMAGES, seed=100 * step + worker)
            if case.timm:  # whose patches have 16 pixels
                mine = replace(
                    mine,
                    global_views=functional.interpolate(mine.global_views, (32, 32)),
                    local_views=functional.interpolate(mine.local_views, (16, 16)),
                )
            parts += split(mine, case.accumulation)
            generators += [
                torch.Generator().manual_seed(1000 * step + 10 * worker + part)
                for part in range(case.accumulation)
            ]
        result = train_step(
            forward,
            pair,
            parts,
            optimizer,
            values(step),
            objective,
            autocast_dtype=case.precision,
            generator=generators,
        )
        steps.append({name: float(x) for name, x in result.scalars.items()})
    moments = {
        f"{name}.{key}": strategy.shards.whole(optimizer.state[parameter][key]).clone()
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for key in ("exp_avg", "exp_avg_sq")
    }
    return {
        "student": strategy.whole_weights(pair.student, keep=True),
        "teacher": strategy.whole_weights(pair.teacher, keep=True),
        "moments": moments,
        "centres": {
            "dino": objective.dino_centre.use(),
            "ibot": objective.ibot_centre.use(),
        },
        "steps": steps,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        "names": [group["names"] for group in optimizer.param_groups],
        "held": sum(x.numel() for x in strategy.local_parts(list(pair.student.parameters()))),
    }


@contextmanager
def aot_eager() -> Iterator[None]:
    """What is compiled inside is traced, forward and backward, and run as it is."""
    compiled = nn.Module.compile
    with mock.patch.object(
        nn.Module, "compile", lambda self, **options: compiled(self, backend="aot_eager", **options)
    ):
        yield


def _member(
    rank: int, folder: str, workers: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    # Meeting over a file: a free port may be taken by the time it is used.
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=workers)
    try:
        out = [function(argument, rank, workers) for argument in arguments]
        torch.save(out, Path(folder) / f"{rank}.pt")
    except Exception:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


def in_group(
    folder: Path, function: Callable[..., Any], *arguments: Any, workers: int = 2
) -> list[list[Any]]:
    """What `function(argument, rank, workers)` gives for each argument: a list for each rank."""
    mp.spawn(_member, (str(folder), workers, function, arguments), nprocs=workers)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(workers)]
