"""Rank 0's step line and metrics, and what is summed over workers, without Ray."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config.load import load
from pipeline.driver.mailbox import Control
from pipeline.plan.layout import Machine
from pipeline.plan.plan import resolve
from pipeline.shards.bad_table import BadTable
from pipeline.train import loop
from pipeline.train import rank_zero as chiefs
from pipeline.train.bottleneck import Watch
from pipeline.train.clock import Clock
from pipeline.train.rank_zero import Chief
from pipeline.views.batch import Work

BAD = [("0" * 32, "truncated", ""), ("1" * 32, "empty", ""), ("2" * 32, "truncated", "")]


class Tracker:
    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.said: dict[str, str] = {}

    def metrics(self, step: int, values: dict[str, float], send: bool = True) -> None:
        self.rows[step] = values

    def tags(self, values: dict[str, str]) -> None:
        self.said |= values

    def headline(self, step: int, values: dict[str, float]) -> None: ...

    def flush(self, timeout: float) -> None: ...

    def close(self) -> None: ...

    run_id = ""


@pytest.fixture
def chief(tmp_path: Path) -> Chief:
    config = load(["optim.steps=100", "optim.global_batch_size=8", "train.log_every=5"])
    machine = Machine(cpus=2, gpus=0, bfloat16=False)
    plan = resolve(config, images=800, digest="", class_names=(), machine=machine)
    found = object.__new__(Chief)  # its constructor wants a control actor
    found.plan, found.tracker = plan, Tracker()  # type: ignore[assignment]
    found.evaluations = SimpleNamespace(  # type: ignore[assignment]
        note_step=lambda _: None,
        collect=lambda **_: None,
        pending_steps=set,
        best=None,
        alarm_text="",
    )
    found.bad, found.bad_table = Counter(), BadTable(tmp_path / "bad.parquet")
    found.read_retries = 0.0
    found.too_many_bad, found.watch = False, Watch(plan.decode_tasks, True)
    return found


class Timed(Clock):
    """A clock that always says the same of a window."""

    def read(self) -> dict[str, float]:
        return {
            "perf/images_per_s": 120.0,
            "perf/data_wait_fraction": 0.3,
            "perf/step_s": 0.1,
        }


def test_a_line_and_its_metrics(chief: Chief, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"loss/total": 9.0}] * 5
    clock = Timed(0, 100, 8, 1.0, 0.0)
    # 7.5 ms x 120/s: 0.9 of a core
    work = Work(images=40, read_s=0.04, decode_s=0.2, crop_s=0.1, retries=2)
    clock.done = 5
    with caplog.at_level(logging.INFO, logger="pipeline"):
        chief.log(5, rows, clock, [], work)
        assert "| wait 30% | decode 7.5 ms | eta " in caplog.text
        assert "bad" not in caplog.text
        assert "waits for data" not in caplog.text  # the first five steps
        clock.done = 10
        chief.log(10, rows, clock, BAD, work)
        assert "| decode 7.5 ms | 3 (2 truncated, 1 empty) bad | eta " in caplog.text
        clock.done = 15
        chief.log(15, rows, clock, [], work)
    newest = chief.tracker.rows[14]
    assert newest["perf/read_ms"] == pytest.approx(1)
    assert newest["perf/decode_ms"] == pytest.approx(5)
    assert newest["perf/crop_ms"] == pytest.approx(2.5)
    assert newest["data/read_retries"] == 6  # two in each of three windows
    assert newest["data/bad_images"] == 3
    assert (newest["data/bad_truncated"], newest["data/bad_empty"]) == (2, 1)
    assert "data/bad_truncated" not in chief.tracker.rows[4]
    said = [record for record in caplog.records if "waits for data" in record.message]
    assert len(said) == 1 and said[0].levelname == "WARNING"
    assert chief.tracker.said == {"data_limit": said[0].message}
    assert "1 decoder can give at most 133 images/s" in said[0].message


class Disk:
    """Checkpoints of a chief that has a control actor of its own; `full` ones cannot be written."""

    def __init__(self, chief: Chief, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full, self.steps, self.now = True, [10], 0.0
        self.control = Control()
        monkeypatch.setattr(chiefs, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=id))
        monkeypatch.setattr(chiefs.ray, "wait", lambda found, timeout: (found, []))
        monkeypatch.setattr(chiefs.ray, "get", lambda found: found)
        monkeypatch.setattr(chiefs.state, "save", self.save)
        monkeypatch.setattr(chiefs.state, "prune", lambda *given: None)
        chief.control = Remote(self.control)
        chief.wished = self.control.wait_wish(0)
        chief.folder, chief.checkpoints = folder, folder / "checkpoints"
        chief.trainee = SimpleNamespace(state=dict)  # type: ignore[assignment]
        chief.unsaved, chief.alarm_text, chief.saved_step, chief.tried = 0, "", 10, -chiefs.AGAIN_S

    def save(self, place: Path, step: int, tensors: object, meta: object) -> None:
        if self.full:
            raise OSError("No space left on device")
        self.steps.append(step)


class Remote:
    def __init__(self, target: Control) -> None:
        self.target = target

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> Any:
            given = (0,) if name == "wait_wish" else given
            return getattr(self.target, name)(*given)

        return SimpleNamespace(remote=call)


def test_a_group_does_not_move_without_its_checkpoint(
    chief: Chief, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(chief, tmp_path, monkeypatch)
    disk.control.ask("move")
    chief.wish()
    assert chief.wish() == "move"
    assert not chief.save(12) and chief.settled(12) == ""
    assert disk.control.answered() == -1 and disk.control.wait_wish(0) == "move"
    assert chief.wish() == ""  # not at each step
    disk.now += chiefs.AGAIN_S
    assert chief.wish() == "move"
    disk.full = False
    assert chief.save(15) and chief.settled(15) == "move"
    assert disk.control.answered() == 15


def test_a_stop_is_obeyed_between_two_tries(
    chief: Chief, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(chief, tmp_path, monkeypatch)
    disk.control.ask("move")
    chief.save(12)
    assert chief.settled(12) == ""
    disk.control.stop()
    assert chief.wish() == "" and chief.wish() == "stop"
    assert chief.settled(13) == "stop"


@pytest.mark.parametrize("room", [False, True])
def test_a_stop_says_what_is_on_disk(
    chief: Chief, room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(chief, tmp_path, monkeypatch)
    assert not chief.save(22)
    disk.full = not room
    chief.finish({"status": "stopped", "step": 22}, Timed(10, 100, 8, 1.0, 0.0))
    left = json.loads((tmp_path / "pretrain" / "outcome.json").read_text())
    assert left["status"] == "stopped" and left["step"] == disk.steps[-1] == (22 if room else 10)
    if room:
        assert not left["alarm"] and "lost_steps" not in left
    else:
        assert left["lost_steps"] == 12
        assert "checkpoint of step 22 could not be written (No space left" in left["alarm"]


def test_workers_are_summed_in_one_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    others: dict[str, Any] = {"bad": [], "work": Work(3, 0.5, 0.25, 0.125)}

    def all_reduce(x: torch.Tensor) -> None:
        calls.append("reduce")
        x += torch.tensor([len(others["bad"]), *others["work"]], dtype=x.dtype)

    def all_gather_object(parts: list[Any], mine: Any) -> None:
        calls.append("gather")
        parts[:] = [mine, others["bad"]]

    monkeypatch.setattr(loop.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(loop.dist, "all_gather_object", all_gather_object)
    mine, cpu = Work(5, 1.0, 2.0, 4.0), torch.device("cpu")
    both = Work(8, 1.5, 2.25, 4.125)
    assert loop._gathered([], mine, cpu, 2) == ([], both)
    assert calls == ["reduce"]
    others["bad"] = BAD[1:]
    assert loop._gathered(BAD[:1], mine, cpu, 2) == (BAD, both)
    assert calls == ["reduce", "reduce", "gather"]
    assert loop._gathered(BAD, mine, cpu, 1) == (BAD, mine)
    assert len(calls) == 3
