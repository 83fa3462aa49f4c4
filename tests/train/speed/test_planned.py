"""The plan's memory against a device that is too small, and against what a process takes."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pipeline.train import build, estimate
from pipeline.train.speed import planned
from pipeline.train.speed.cost import GIB
from pipeline.train.speed.planned import MemoryWatch
from tests.train.speed.test_cost import plan

SCRIPT = """
import sys, torch
from types import SimpleNamespace
from pipeline.train.speed.planned import MemoryWatch
watch = MemoryWatch(torch.device("cpu"))
if int(sys.argv[1]):
    torch.ones(int(sys.argv[1]), 2**18)  # MiB, and gone again
torch.ones(8, 2**18)
print(watch.taken() / 2**20)
"""


def test_what_a_process_took_for_a_moment_is_counted() -> None:
    def taken(mib: int) -> float:
        command = [sys.executable, "-c", SCRIPT, str(mib)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    little = taken(0)
    assert 600 < taken(640) - little < 680


def test_far_apart_is_said_and_near_is_not() -> None:
    assert planned.difference(4 * GIB, 4.9 * GIB) == ""
    assert planned.difference(0.1 * GIB, 0.3 * GIB) == ""  # Python's own
    line = planned.difference(4 * GIB, 5.5 * GIB)
    assert "4.00 GiB" in line and "5.50 GiB" in line
    assert planned.difference(4 * GIB, 2 * GIB)


def test_a_gpu_that_is_too_small_is_said_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpus = {"device": "cuda", "workers": 4, "gpus_per_worker": 0.5}
    of = plan("train.accumulation=2", "optim.global_batch_size=24").model_copy(update=gpus)
    memory = estimate.memory_of(of, build.pair(of.config))
    card = SimpleNamespace(total_memory=2 * memory.total / planned.HEADROOM + 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    watch = MemoryWatch(torch.device("cuda", 0))
    caplog.clear()
    watch.plan(memory, 0, of.gpus_per_worker, estimate.lighter(of))
    assert not caplog.records
    card.total_memory /= 1.1
    watch.plan(memory, 0, of.gpus_per_worker, estimate.lighter(of))
    assert (
        "take train.accumulation=4 or train.activation_checkpointing=true or train" in caplog.text
    )
    assert f"{memory.total / GIB:.1f} GiB of a GPU (weights" in caplog.text


def test_the_end_of_a_run_compares(caplog: pytest.LogCaptureFixture) -> None:
    of = plan()
    memory = estimate.memory_of(of, build.pair(of.config))
    watch = MemoryWatch(torch.device("cpu"))
    watch.close()  # no plan: another rank
    watch.plan(memory, 0, 1.0, "")
    with caplog.at_level(logging.WARNING, "pipeline.train"):
        watch.taken = lambda: memory.allocated  # type: ignore[method-assign]
        watch.close()
        assert not caplog.records
        watch.taken = lambda: memory.allocated + GIB  # type: ignore[method-assign]
        watch.close()
    assert "the plan said" in caplog.text
