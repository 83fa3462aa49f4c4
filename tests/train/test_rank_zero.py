"""Rank 0's step line and metrics, and what is summed over workers, without Ray."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config.load import load
from pipeline.driver.mailbox import Mailbox
from pipeline.plan.layout import Machine
from pipeline.plan.plan import SetFacts, resolve
from pipeline.stream.bad_table import BadTable
from pipeline.train import other_rank
from pipeline.train import rank_zero as rank_zeros
from pipeline.train.checkpoint import state, tensor_file
from pipeline.train.checkpoint.saving import Saving
from pipeline.train.rank_zero import RankZero
from pipeline.train.speed import bottleneck
from pipeline.train.speed.bottleneck import BottleneckWatch, Clock, Window
from pipeline.views.batch import Spent
from tests.standins import Handle

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
def rank_zero(tmp_path: Path) -> RankZero:
    config = load(["optim.steps=100", "optim.global_batch_size=8", "train.log_every=5"])
    machine = Machine(cpus=2, gpus=0, bfloat16=False)
    plan = resolve(config, SetFacts(800, ""), machine=machine)
    duties = object.__new__(RankZero)  # its constructor wants a mailbox actor
    duties.plan, duties.tracker = plan, Tracker()  # type: ignore[assignment]
    duties.evaluations = SimpleNamespace(  # type: ignore[assignment]
        note_step=lambda _: None,
        collect=lambda: None,
        wait=lambda seconds: None,
        pending_steps=set,
        counts={},
        said=str,
        best_summary=None,
        alarm_text="",
    )
    duties.bad, duties.bad_table = Counter(), BadTable(tmp_path / "bad.parquet")
    duties.read_retries = 0.0
    duties.saving = None
    duties.too_many_bad, duties.watch = False, BottleneckWatch(plan.decode_tasks, True)
    return duties


class Timed(Clock):
    """A clock that always says the same of a window."""

    def read(self) -> dict[str, float]:
        return {
            "perf/images_per_s": 120.0,
            "perf/data_wait_fraction": 0.3,
            "perf/step_s": 0.1,
        }


def test_a_line_and_its_metrics(rank_zero: RankZero, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"loss/total": torch.tensor(9.0)}] * 5
    clock = Timed(0, 100, 8, 1.0, 0.0)
    # 7.5 ms x 120/s: 0.9 of a core
    spent = Spent(images=40, read_s=0.04, decode_s=0.2, crop_s=0.1, retries=2)
    clock.done = 5
    with caplog.at_level(logging.INFO, logger="pipeline"):
        rank_zero.log(5, Window(rows, [], spent), clock)
        assert "| wait 30% | decode 7.5 ms | eta " in caplog.text
        assert "bad" not in caplog.text
        assert "waits for data" not in caplog.text  # the first five steps
        clock.done = 10
        rank_zero.log(10, Window(rows, BAD, spent), clock)
        assert "| decode 7.5 ms | 3 (2 truncated, 1 empty) bad | eta " in caplog.text
        clock.done = 15
        rank_zero.log(15, Window(rows, [], spent), clock)
    newest = rank_zero.tracker.rows[14]
    assert newest["perf/read_ms"] == pytest.approx(1)
    assert newest["perf/decode_ms"] == pytest.approx(5)
    assert newest["perf/crop_ms"] == pytest.approx(2.5)
    assert newest["data/read_retries"] == 6  # two in each of three windows
    assert newest["data/bad_images"] == 3
    assert (newest["data/bad_truncated"], newest["data/bad_empty"]) == (2, 1)
    assert "data/bad_truncated" not in rank_zero.tracker.rows[4]
    said = [record for record in caplog.records if "waits for data" in record.message]
    assert len(said) == 1 and said[0].levelname == "WARNING"
    assert rank_zero.tracker.said == {"data_limit": said[0].message}
    assert "1 decoder can give at most 133 images/s" in said[0].message


class Asked(Mailbox):
    def wait_request(self, timeout: float = 0.0) -> str:
        return super().wait_request(0.0)


class Disk:
    """A disk for the checkpoints of a rank 0 that has a mailbox of its own. While it is `full`
    nothing can be written; while it is not `ready` writes take their time.
    """

    def __init__(self, rank_zero: RankZero, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full, self.now = True, 0.0
        self.ready = threading.Event()
        self.ready.set()
        self.mailbox = Asked()
        write = tensor_file.write

        def guarded(path: Path, tensors: Any) -> int:
            assert self.ready.wait(60)
            if self.full:
                raise OSError(28, "No space left on device")
            return write(path, tensors)

        monkeypatch.setattr(tensor_file, "write", guarded)
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=id)
        monkeypatch.setattr(rank_zeros, "time", clock)
        monkeypatch.setattr(other_rank, "time", clock)
        monkeypatch.setattr(rank_zeros.ray, "wait", lambda reference, timeout: (reference, []))
        monkeypatch.setattr(rank_zeros.ray, "get", lambda reference: reference)
        rank_zero.mailbox = Handle(self.mailbox)
        rank_zero.requested = self.mailbox.wait_request(0)
        rank_zero.folder, rank_zero.checkpoints = folder, folder / "checkpoints"
        held = {"student": {"w": torch.ones(2)}}
        rank_zero.train_state = SimpleNamespace(state=lambda: held)  # type: ignore[assignment]
        rank_zero.saving = Saving(rank_zero.checkpoints)
        self.folder = rank_zero.checkpoints
        rank_zero.unsaved, rank_zero.alarm_text, rank_zero.saved_step, rank_zero.tried = (
            0,
            "",
            10,
            -rank_zeros.AGAIN_S,
        )

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints that are there."""
        return [saved.step for saved in state.checkpoints(self.folder)]


def test_a_group_does_not_move_without_its_checkpoint(
    rank_zero: RankZero, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(rank_zero, tmp_path, monkeypatch)
    disk.mailbox.request("move")
    rank_zero.request()
    assert rank_zero.request() == "move"
    rank_zero.save(12)
    assert rank_zero.confirmed(12) == "" and rank_zero.unsaved == 1
    assert disk.mailbox.acknowledged() == -1 and disk.mailbox.wait_request(0) == "move"
    assert rank_zero.request() == ""  # not at each step
    disk.now += rank_zeros.AGAIN_S
    assert rank_zero.request() == "move"
    disk.full = False
    rank_zero.save(15)
    assert rank_zero.confirmed(15) == "move" and disk.steps == [15]
    assert disk.mailbox.acknowledged() == 15


def test_a_stop_is_obeyed_between_two_tries(
    rank_zero: RankZero, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(rank_zero, tmp_path, monkeypatch)
    disk.mailbox.request("move")
    rank_zero.save(12)
    assert rank_zero.confirmed(12) == ""
    disk.mailbox.stop()
    assert rank_zero.request() == "" and rank_zero.request() == "stop"
    assert rank_zero.confirmed(13) == "stop"


@pytest.mark.parametrize("room", [False, True])
def test_a_stop_says_what_is_on_disk(
    rank_zero: RankZero, room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(rank_zero, tmp_path, monkeypatch)
    rank_zero.save(22)
    rank_zero.settle(wait=True)
    assert rank_zero.unsaved == 1
    disk.full = not room
    left = rank_zero.finish({"status": "stopped", "step": 22}, Timed(10, 100, 8, 1.0, 0.0))
    assert left["status"] == "stopped" and left["step"] == (22 if room else 10)
    assert disk.steps == ([22] if room else [])
    if room:
        assert not left["alarm"] and "lost_steps" not in left
    else:
        assert left["lost_steps"] == 12
        assert (
            "checkpoint of step 22 could not be written ([Errno 28] No space left" in left["alarm"]
        )


def test_no_step_waits_for_the_disk(
    rank_zero: RankZero, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known of a checkpoint before it is complete: nothing."""
    disk = Disk(rank_zero, tmp_path, monkeypatch)
    collected: list[bool] = []
    rank_zero.evaluations.collect = lambda: collected.append(rank_zero.busy)  # type: ignore[method-assign]
    disk.full = False
    disk.ready.clear()
    rank_zero.save(12)
    weights = rank_zero.train_state.state()["student"]["w"]
    weights += 1  # the next step moves them
    clock = Timed(0, 100, 8, 1.0, 0.0)
    rows = [{"loss/total": torch.tensor(9.0)}]
    for step in (13, 14):
        assert rank_zero.request() == ""
        rank_zero.log(step, Window(rows, [], Spent(images=8)), clock)
    assert rank_zero.busy and disk.steps == [] and disk.mailbox.saved() == -1
    assert not collected  # a score of step 12 would find no checkpoint
    assert rank_zero.saved_step == 10
    disk.ready.set()
    rank_zero.settle(wait=True)
    assert disk.steps == [12] and disk.mailbox.saved() == 12 and rank_zero.saved_step == 12
    rank_zero.log(15, Window(rows, [], Spent(images=8)), clock)
    assert collected == [False]
    saved = state.latest(disk.folder)
    assert saved is not None and saved.load()["student"]["w"].tolist() == [1.0, 1.0]


def test_the_next_checkpoint_and_the_end_wait_for_the_last(
    rank_zero: RankZero, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(rank_zero, tmp_path, monkeypatch)
    disk.full = False
    disk.ready.clear()
    rank_zero.save(12)
    threading.Timer(0.2, disk.ready.set).start()
    rank_zero.save(13)
    assert 12 in disk.steps
    disk.ready.clear()
    threading.Timer(0.2, disk.ready.set).start()
    left = rank_zero.finish({"status": "stopped", "step": 13}, Timed(10, 100, 8, 1.0, 0.0))
    assert left["step"] == 13 and disk.steps == [12, 13] and not left["alarm"]


def test_a_bug_while_writing_ends_the_run(
    rank_zero: RankZero, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what storage does wrong is an alarm."""
    Disk(rank_zero, tmp_path, monkeypatch)
    monkeypatch.setattr(tensor_file, "write", lambda *_: 1 / 0)
    rank_zero.save(12)
    with pytest.raises(ZeroDivisionError):
        rank_zero.settle(wait=True)


def test_workers_are_summed_in_one_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    others: dict[str, Any] = {"bad": [], "spent": Spent(3, 0.5, 0.25, 0.125)}

    def all_reduce(x: torch.Tensor) -> None:
        calls.append("reduce")
        x += torch.tensor([len(others["bad"]), *others["spent"]], dtype=x.dtype)

    def all_gather_object(parts: list[Any], mine: Any) -> None:
        calls.append("gather")
        parts[:] = [mine, others["bad"]]

    monkeypatch.setattr(bottleneck.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(bottleneck.dist, "all_gather_object", all_gather_object)
    mine, cpu = Spent(5, 1.0, 2.0, 4.0), torch.device("cpu")
    both = Spent(8, 1.5, 2.25, 4.125)
    assert Window([], [], mine).gathered(cpu, 2) == Window([], [], both)
    assert calls == ["reduce"]
    others["bad"] = BAD[1:]
    assert Window([], BAD[:1], mine).gathered(cpu, 2) == Window([], BAD, both)
    assert calls == ["reduce", "reduce", "gather"]
    assert Window([], BAD, mine).gathered(cpu, 1) == Window([], BAD, mine)
    assert len(calls) == 3
