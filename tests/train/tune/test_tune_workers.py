"""Two workers over gloo that train a part of the weights: ddp and fsdp do the same, and a
checkpoint of either goes on in the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.load import load
from pipeline.model.groups import parameter_groups
from pipeline.model.low_rank import merged_state
from pipeline.train import build
from pipeline.train.checkpoint import restore, saving
from pipeline.train.checkpoint.names import divided
from pipeline.train.objective import Objective, ObjectiveSpec
from pipeline.train.parallel.strategy import Layout, prepare, student_forward, whole_weights
from pipeline.train.start import TrainState
from pipeline.train.step import train_step
from pipeline.train.tune.choose import frozen_names, tuned
from tests.train.parallel.group import aot_eager, in_group
from tests.train.small_run import VALUES, views
from tests.train.test_start import SMALL

pytestmark = pytest.mark.long
CPU = torch.device("cpu")
TUNES = ("last_blocks=1", "lora(rank=3)", "heads")


@dataclass(frozen=True)
class Case:
    tune: str
    strategy: Any
    folder: str  # of checkpoints
    save: bool = False  # in the middle; else it begins with what is there
    checkpointing: bool = False
    compile: bool = False


def run(case: Case, rank: int, workers: int) -> dict[str, Any]:
    """Four steps with a checkpoint after the second one, or the last two from it."""
    recipe = load(
        [*SMALL, f"train.tune={case.tune}", "model.init=x", "model.drop_path=0.3"]
        + [f"run.seed={0 if case.save else 5}", "model.layer_scale=0.5"]
    )
    pair = tuned(build.pair(recipe), recipe)
    layout = Layout(
        workers, CPU, case.strategy, compile=case.compile, checkpointing=case.checkpointing
    )
    objective = Objective.for_pair(ObjectiveSpec(), pair)
    with aot_eager():
        prepare(pair, layout)
    groups = parameter_groups(pair.student, 0.8)
    optimizer = torch.optim.AdamW(groups, lr=0.0, eps=1e-4, fused=layout.sharded or None)
    state = TrainState(pair, objective, optimizer)
    if not case.save:
        source = restore.newest(Path(case.folder), layout.sharded)
        assert source is not None
        source.into(state, CPU)
    forward = student_forward(pair, layout)
    if isinstance(forward, DistributedDataParallel):
        assert not forward.find_unused_parameters
    for number in range(0 if case.save else 2, 4):
        batch = [views(4, seed=100 * number + rank)]
        generator = torch.Generator().manual_seed(10 * number + rank)
        train_step(forward, pair, batch, optimizer, VALUES, objective, generator=generator)
        if case.save and number == 1:
            group = saving.writers(layout.sharded)
            if rank == 0 or group is not None:
                writing = saving.Saving(Path(case.folder), group)
                writing.begin(2, state.state(), {"plan": {}})
                assert writing.ended(wait=True) == saving.Written(2)
            torch.distributed.barrier()
    tensors = {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).clone()
        for name, x in divided(state.state())[0].items()
    }
    student, teacher = (whole_weights(encoder, keep=True) for encoder in pair)
    frozen = frozen_names(pair.student)
    assert frozen
    for name in frozen:
        assert torch.equal(student[name], teacher[name]), name
    return {
        "tensors": tensors,
        "frozen": {name: student[name] for name in frozen},
        "merged": merged_state(whole_weights(pair.teacher.backbone, keep=True)),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank ends with, by tune and name of the case."""
    root, cases = tmp_path_factory.mktemp("tune"), {}
    for number, tune in enumerate(TUNES):
        ddp, fsdp = (str(root / f"{number}-{x}" / "checkpoints") for x in ("ddp", "fsdp"))
        cases |= {
            f"{tune} ddp": Case(tune, "ddp", ddp, save=True),
            f"{tune} fsdp": Case(tune, "fsdp", fsdp, save=True),
            f"{tune} ddp on": Case(tune, "ddp", ddp),
            f"{tune} fsdp on": Case(tune, "fsdp", fsdp),
            f"{tune} ddp from fsdp": Case(tune, "ddp", fsdp),
            f"{tune} fsdp from ddp": Case(tune, "fsdp", ddp),
            f"{tune} again": Case(tune, "ddp", ddp, checkpointing=True),
        }
        if "lora" in tune:
            cases[f"{tune} compiled"] = Case(tune, "ddp", ddp, compile=True)
    ranks = in_group(root, run, *cases.values())
    return [dict(zip(cases, each, strict=True)) for each in ranks]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("tune", TUNES)
def test_both_strategies_do_the_same_and_go_on_from_each_other(
    tune: str, runs: list[dict[str, Any]]
) -> None:
    one, other = (
        {n.removeprefix(f"{tune} "): x for n, x in each.items() if n.startswith(tune)}
        for each in runs
    )
    for name, state in one.items():
        same(state, other[name], 0.0)
    same(one["ddp"], one["ddp on"], 0.0)  # to the bit
    same(one["ddp"], one["again"], 0.0)
    same(one["fsdp"], one["fsdp on"], 0.0)
    for name in {"fsdp", "ddp from fsdp", "fsdp from ddp", "compiled"} & one.keys():
        same(one["ddp"], one[name], 1e-5)
    names = set(one["ddp"]["tensors"])
    assert {name.split("/")[1] for name in names if name.startswith("optimizer/")} == {
        name.removeprefix("student/") for name in names if name.startswith("student/")
    }


def same(a: dict[str, Any], b: dict[str, Any], atol: float) -> None:
    for part, tensors in a.items():
        assert tensors.keys() == b[part].keys()
        for name, x in tensors.items():
            if "qkv.bias" in name and atol:
                continue  # the key bias has a gradient of round-off alone
            torch.testing.assert_close(
                x, b[part][name], rtol=atol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )
