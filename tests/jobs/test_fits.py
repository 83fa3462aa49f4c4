"""Memory, disk and time of a plan beside what the machine has: the numbers, and the way out."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.config.load import load
from pipeline.doctor import fits
from pipeline.plan.layout import Machine
from pipeline.plan.nodes import Node
from pipeline.plan.plan import Plan, SetFacts, resolve
from pipeline.train import build, estimate

GIB = 2**30


def machine(gib: float, nodes: int = 1) -> Machine:
    rooms = tuple(Node(4, 0, i == 0, gib * GIB) for i in range(nodes))
    return Machine(cpus=4 * nodes, gpus=0, bfloat16=False, nodes=rooms)


def planned(recipe: Path, where: Machine, *overrides: str) -> Plan:
    config = load([str(recipe), "train.workers=2", *overrides])
    return resolve(config, SetFacts(160, "x"), machine=where)


def test_memory_is_held_against_the_machine_with_values_that_fit(
    recipe: Path, capture: Callable[[], list[str]]
) -> None:
    plan = planned(recipe, machine(64), "optim.global_batch_size=32")
    built = build.pair(plan.config)
    cost = estimate.estimated_cost(plan, built)
    each = cost.memory_bytes + fits.PROCESS
    copy = cost.checkpoint_bytes  # worker 0 writes checkpoints from one
    fits.say_memory(plan, cost, machine((2 * each + copy) / GIB / fits.ROOM * 1.01))
    assert capture() == []
    # so little that the same workers need smaller micro batches
    state = cost.memory.state + cost.memory.libraries + fits.PROCESS
    there = machine((2 * state + copy + 1.2 * (each - state)) / GIB / fits.ROOM)
    fits.say_memory(plan, cost, there)
    (line,) = capture()
    assert f"{(2 * each + copy) / GIB:.1f} GiB of memory for 2 workers" in line
    assert f"{there.rooms[0].memory / GIB:.1f} GiB" in line
    field, _, value = next(word for word in line.split() if "=" in word).partition("=")
    assert field == "train.accumulation"
    lighter = planned(recipe, there, "optim.global_batch_size=32", f"{field}={value}")
    less = estimate.estimated_cost(lighter, built).memory_bytes + fits.PROCESS
    assert 2 * less + copy <= fits.ROOM * there.rooms[0].memory < 2 * each + copy
    # so little that nothing of the kind helps
    fits.say_memory(plan, cost, machine(state / GIB / 10))
    (line,) = capture()
    assert "head.prototypes=16" in line and "augment.local_crops=1" in line


def test_memory_counts_node_by_node(recipe: Path) -> None:
    there = machine(3, nodes=2)
    plan = planned(recipe, there, "resources.cpus_per_worker=3")
    cost = estimate.estimated_cost(plan, build.pair(plan.config))
    assert fits.memory_of(plan, cost, there) == (
        cost.memory_bytes + fits.PROCESS + cost.checkpoint_bytes,
        3 * GIB,
    )  # one each
    split = planned(recipe, there, "resources.cpus_per_worker=3", "train.strategy=fsdp")
    assert fits.memory_of(split, cost, there)[0] == (
        cost.memory_bytes + fits.PROCESS + cost.checkpoint_bytes / 2  # each copies its slices
    )
    unknown = machine(0)
    assert fits.memory_of(planned(recipe, unknown), cost, unknown)[1] == 0


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_disks_are_added_up_and_held_against_what_is_free(
    tmp_path: Path, capture: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(100 * GIB, 0, 10 * GIB))
    needs = [
        ("data.shards", f"{tmp_path}/shards", 6.0 * GIB),
        ("run.folder", f"{tmp_path}/runs/x", 3.0 * GIB),
        ("run.folder", "s3://bucket/runs", 900.0 * GIB),
    ]
    fits.say_disk(needs)
    (line,) = capture()
    assert "about 9.00 GiB" in line and "(data.shards and run.folder), 10.0 GiB free" in line
    fits.say_disk([*needs, ("run.folder", str(tmp_path), 2.5 * GIB)])
    line, warning = capture()
    assert "about 11.50 GiB" in line
    assert "1.50 GiB are missing" in warning and "data.shards and run.folder" in warning


def test_time_is_said_in_plain_units_and_a_long_run_gets_a_word(
    recipe: Path, capture: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [(0, "1 second"), (89, "89 seconds"), (600, "10 minutes"), (33 * 3600, "33 hours")]
    for seconds, text in [*said, (5.1 * 86400, "5 days")]:
        assert fits.in_words(seconds) == text
    where = machine(64)
    plan = planned(recipe, where)
    cost = estimate.estimated_cost(plan, build.pair(plan.config))
    for hours, lines in ((3, 1), (33, 2)):
        monkeypatch.setattr(fits, "seconds_of", lambda *_, hours=hours: hours * 3600.0)
        fits.say_time(plan, cost, where)
        shown = capture()
        assert f"about {hours} hours of training on this machine, with 2 cpu workers" in shown[0]
        assert len(shown) == lines
    assert f"optim.steps={int(plan.steps * 24 / 33)} is a day of it" in shown[1]


@pytest.fixture
def capture() -> Callable[[], list[str]]:
    """The lines said since the last call."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("pipeline")
    logger.setLevel(logging.INFO)
    logger.handlers[:] = [Lines()]

    def taken() -> list[str]:
        said, lines[:] = lines[:], []
        return said

    return taken
