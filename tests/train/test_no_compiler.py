"""A run on GPUs whose nodes cannot compile stops at its start, on all ranks, with one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import load
from pipeline.errors import TrainError
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan, SetFacts, resolve
from pipeline.storage.run_folder import RunFolder
from pipeline.train import run, worker


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def plan_of(*overrides: str, gpus: int = 2) -> Plan:
    config = load(["optim.steps=1", *overrides])
    machine = Machine(cpus=8, gpus=gpus, bfloat16=True)
    return resolve(config, SetFacts(100_000, ""), machine=machine)


@pytest.mark.parametrize(
    ("overrides", "gpus", "asked"),
    [([], 2, True), (["train.compile=false"], 2, True), (["train.loss_kernels=eager"], 2, True),
     (["train.compile=false", "train.loss_kernels=eager"], 2, False), ([], 0, False)],
)  # fmt: skip
def test_where_it_matters(overrides: list[str], gpus: int, asked: bool) -> None:
    """Compiled blocks and the kernels of the losses both use Triton, which uses the compiler."""
    missing = worker.uncompilable_somewhere(plan_of(*overrides, gpus=gpus))
    assert missing.endswith(": no C compiler") if asked else missing == ""


def test_all_ranks_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 lacks one; rank 0, which tells the driver, has one."""
    plan = plan_of()
    assert plan.workers == 2

    def gather(into: list[Any], own: str) -> None:
        into[:] = [own, "node b: no C compiler"]

    monkeypatch.setattr(worker, "uncompilable", lambda: "")
    monkeypatch.setattr(worker.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(worker.dist, "all_gather_object", gather)
    assert worker.uncompilable_somewhere(plan) == "node b: no C compiler"


def test_the_sentence(tmp_path: Path) -> None:
    left = {"status": "no_compiler", "detail": "node b: no C compiler"}
    with pytest.raises(TrainError) as raised:
        run._outcome(plan_of(), RunFolder.of(str(tmp_path), "one"), left)
    assert raised.value.what == "networks cannot be compiled: node b: no C compiler"
    assert "gcc python3-dev" in raised.value.hint
    assert "train.compile=false train.loss_kernels=eager" in raised.value.hint
