"""Features learnt by two workers, ddp and fsdp: the steps of one worker with the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from pipeline.model.groups import parameter_groups
from pipeline.train.parallel.shards import whole
from pipeline.train.parallel.strategy import Layout, prepare, student_forward
from tests.train.distil.test_learn_features import Run
from tests.train.small_run import assert_same, split, views

pytestmark = pytest.mark.long
STEPS = 3


def weights(run: Run) -> dict[str, Tensor]:
    """Whole, of student and average, without the key bias, whose gradient is round-off."""
    return {
        f"{role}.{name}": whole(x).detach().clone()
        for role in ("student", "teacher")
        for name, x in getattr(run.pair, role).named_parameters()
        if not name.endswith("qkv.bias")
    }


def steps(strategy: Any, rank: int) -> dict[str, Any]:
    run = Run()
    layout = Layout(workers=2, device=torch.device("cpu"), strategy=strategy)
    prepare(run.pair, layout)
    run.optimizer = torch.optim.AdamW(parameter_groups(run.pair.student), foreach=False)
    student = student_forward(run.pair, layout)
    for seed in range(STEPS):
        mine = split(views(8, seed), 4)[2 * rank : 2 * rank + 2]
        scalars = run.step(*mine, forward=student).scalars
    features = run.objective.state_dict()["features"]
    return {"weights": weights(run), "scalars": scalars, "features": features}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    try:
        out = {strategy: steps(strategy, rank) for strategy in ("ddp", "fsdp")}
        torch.save(out, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=2)
    yield [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_are_one(ranks: list[dict[str, Any]], strategy: str) -> None:
    a, b = (each[strategy] for each in ranks)
    assert_same(a["weights"], b["weights"], atol=0)
    alone = Run()
    for seed in range(STEPS):
        scalars = alone.step(views(8, seed)).scalars
    assert_same(a["weights"], weights(alone), atol=2e-5)
    for name in ("loss/total", "loss/distil_cls", "loss/distil_patch"):
        torch.testing.assert_close(a["scalars"][name], scalars[name], rtol=1e-4, atol=1e-5)
    for term, state in alone.objective.state_dict()["features"].items():
        for name, value in state.items():
            torch.testing.assert_close(a["features"][term][name], value)
