"""The journal against its documented format, torn files, a full disk and several writers."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.track.journal import Journal, read, read_steps
from pipeline.track.mlflow_writer import in_doubt, units, unsent


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "run" / "metrics.jsonl")


def lines(journal: Journal) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.path.read_text().splitlines()]


def no_constants(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_a_line_has_the_documented_shape(journal: Journal) -> None:
    before = time.time_ns() // 1_000_000
    journal.metrics("pretrain", 40, {"loss/total": 9.5, "optim/lr": float("inf")})
    journal.metrics("pretrain", 41, {"eval/knn@20 [top1]": math.nan}, send=False)
    journal.metrics("pretrain", 41, {"eval/knn20_top1": 0.5}, to="pipeline")
    text = journal.path.read_text()
    events = [json.loads(line, parse_constant=no_constants) for line in text.splitlines()]
    assert all(before <= line.pop("ts") <= time.time() * 1000 for line in events)
    assert events == [
        {"run": "pretrain", "step": 40, "metrics": {"loss/total": 9.5, "optim/lr": None}},
        {"run": "pretrain", "step": 41, "metrics": {"eval/knn_20 _top1_": None}, "send": False},
        {"run": "pretrain", "step": 41, "metrics": {"eval/knn20_top1": 0.5}, "to": "pipeline"},
    ]


def test_what_is_not_a_number_is_named_and_left_out(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pipeline.track"):
        journal.metrics("pretrain", 3, {"loss/total": 1, "loss/x": None, "loss/y": "much"})
    assert lines(journal)[0]["metrics"] == {"loss/total": 1.0}
    assert "step 3: loss/x, loss/y" in caplog.text


def test_steps_are_merged_and_a_resume_voids_the_later_ones(journal: Journal) -> None:
    for step in range(6):
        journal.metrics("pretrain", step, {"loss/total": step})
    journal.metrics("pretrain", 5, {"eval/knn20_top1": 0.25})
    journal.metrics("evaluate", 9, {"eval/linear_top1": 0.5})
    journal.metrics("pretrain", 5, {"loss/total": 77.0}, to="pipeline")
    assert journal.steps("pretrain")[5] == {"loss/total": 5.0, "eval/knn20_top1": 0.25}
    journal.resume("pretrain", 3)
    journal.metrics("pretrain", 3, {"loss/total": -3})
    expected = {0: 0.0, 1: 1.0, 2: 2.0, 3: -3.0}
    assert {s: row["loss/total"] for s, row in journal.steps("pretrain").items()} == expected
    assert list(journal.steps("evaluate")) == [9]


def test_attempts_count_the_starts_that_reported(journal: Journal) -> None:
    assert journal.attempt("pretrain") == 1
    journal.append("pretrain", open={}, attempt=1)
    assert journal.resume("pretrain", 0) == 1  # the same start; writes nothing
    assert len(lines(journal)) == 1
    journal.metrics("pretrain", 0, {"loss/total": 1})
    assert journal.resume("pretrain", 0) == 2  # Ray restarted the worker
    assert journal.resume("pretrain", 0) == 2  # it died before its first step
    journal.metrics("pretrain", 0, {"loss/total": 1})
    journal.append("pretrain", open={}, attempt=journal.attempt("pretrain"))  # a new job
    assert lines(journal)[-1]["attempt"] == 3
    assert journal.resume("pretrain", 1) == 3


@pytest.mark.parametrize("torn", [b'{"run": "a", "step": 1, "me', b"\xff\xfe{}", b"[1, 2]", b"{"])
def test_a_torn_last_line_is_skipped_on_reopening(journal: Journal, torn: bytes) -> None:
    journal.metrics("a", 0, {"x": 1})
    journal.close()
    with journal.path.open("ab") as file:
        file.write(torn)
    assert [event["step"] for _, event in read(journal.path)] == [0]
    again = Journal(journal.path)
    again.metrics("a", 1, {"x": 2})
    assert again.steps("a") == {0: {"x": 1.0}, 1: {"x": 2.0}}
    assert [event["step"] for _, event in read(journal.path)] == [0, 1]


def test_offsets_are_those_of_the_lines(journal: Journal) -> None:
    for step in range(20):
        journal.metrics("a", step, {"x": step})
    ends = [end for end, _ in read(journal.path)]
    for i, end in enumerate(ends):
        assert [e["step"] for _, e in read(journal.path, end)] == list(range(i + 1, 20))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said_once_and_does_not_raise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    journal = Journal(path)
    with caplog.at_level(logging.WARNING, "pipeline.track"):
        for step in range(5):
            journal.metrics("a", step, {"x": 1})
    assert len(caplog.records) == 1 and "training goes on" in caplog.text


def test_lines_wait_for_room_and_are_written_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room, then room for half a line, then room: nothing is lost, doubled or out of order."""
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.metrics("a", 0, {"x": 1})
    plain, left = os.write, [0]

    def full(fd: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(28, "No space left on device")
        part = data[: left[0]]
        left[0] -= len(part)
        return plain(fd, part)

    monkeypatch.setattr(os, "write", full)
    with caplog.at_level(logging.WARNING, "pipeline.track"):
        for step in range(1, 4):
            journal.metrics("a", step, {"x": 1})
        left[0] = 30
        journal.metrics("a", 4, {"x": 1})
        assert list(read_steps(journal.path, "a")) == [0]
        left[0] = 10_000
        journal.metrics("a", 5, {"x": 1})
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == [
        f"cannot write {journal.path}",
        f"{journal.path} is written again; 0 lines are lost",
    ]
    steps = [event["step"] for _, event in read(journal.path)]
    assert steps == list(range(6))


def test_lines_that_still_wait_at_the_end_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    journal = Journal(path)
    for step in range(5):
        journal.metrics("a", step, {"x": 1})
    journal.close()
    assert f"5 lines of {path} are lost" in caplog.text


def write_many(path: Path, writer: int) -> None:
    journal = Journal(path)
    for step in range(500):
        journal.metrics(f"w{writer}", step, {"x" * (1 + step % 200): step})


def test_lines_of_several_processes_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(path, i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    events = [json.loads(line) for line in path.read_text().splitlines() if line]
    for i in range(3):
        assert [e["step"] for e in events if e["run"] == f"w{i}"] == list(range(500))


def reference(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is to be sent, found the slow way: by looking ahead from every line."""
    kept = []
    for i, event in enumerate(events):
        later = [e for e in events[i + 1 :] if "resume" in e and e["run"] == event["run"]]
        void = "metrics" in event and any(event["step"] >= e["resume"] for e in later)
        if not void and event.get("send", True):
            kept.append(event)
    return kept


@pytest.mark.parametrize("seed", range(6))
def test_units_keep_order_limits_and_what_is_to_be_sent(journal: Journal, seed: int) -> None:
    rng = random.Random(seed)
    for step in range(80):
        run = rng.choice(["a", "b"])
        if rng.random() < 0.05:
            journal.append(run, resume=rng.randrange(80), attempt=2)
        elif rng.random() < 0.1:
            journal.append(run, tags={"x": "y"})
        else:
            names = {f"m{i}": i for i in range(rng.choice([1, 50, 999, 1000]))}
            journal.metrics(run, step, names, send=rng.random() < 0.7)
    sent, last = [], 0
    for batch, end in units(journal.path, 0):
        others = [event for event in batch if "metrics" not in event]
        assert len(batch) == 1 or not others
        assert sum(len(event.get("metrics", ())) for event in batch) <= 1000
        assert end > last
        last = end
        sent += batch
    assert sent == reference(lines(journal))
    assert last == journal.path.stat().st_size
    count = unsent(journal.path, 0)
    assert count.metrics == sum(len(event.get("metrics", ())) for event in sent)
    assert count.others == sum("metrics" not in event for event in sent)
    assert not unsent(journal.path, last)


def test_an_unfinished_line_is_left_for_later(journal: Journal) -> None:
    journal.metrics("a", 0, {"x": 1})
    whole = journal.path.stat().st_size
    with journal.path.open("ab") as file:
        file.write(b'{"run": "a", "step": 1,')
        file.flush()
        assert [end for _, end in units(journal.path, 0)] == [whole]
        file.write(b' "ts": 1, "metrics": {"x": 2}}\n')
    assert [len(batch) for batch, _ in units(journal.path, whole)] == [1]


def test_rows_of_a_killed_job_wait_until_it_is_known_where_their_stage_goes_on(
    journal: Journal,
) -> None:
    journal.metrics("pretrain", 0, {"x": 1})
    begin = journal.path.stat().st_size

    def doubt(sent: int = 0) -> bool:
        return in_doubt(journal.path, sent, begin)

    assert doubt() and not doubt(sent=begin)  # all was sent: nothing to wait for
    journal.append("pipeline", open={})
    journal.append("pretrain", open={})
    assert doubt()
    journal.append("pretrain", resume=0, attempt=2)
    assert not doubt()


def test_another_stage_says_that_the_killed_one_does_not_go_on(journal: Journal) -> None:
    journal.metrics("pretrain", 0, {"x": 1})
    begin = journal.path.stat().st_size
    journal.append("evaluate", open={})
    assert not in_doubt(journal.path, 0, begin)
