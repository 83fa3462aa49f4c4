"""Faults of training on one machine: signals, a full disk, damaged checkpoints, a step of NaN."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import consumed, training
from tests.cluster.figures import record
from tests.cluster.small_disk import small_disk

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def notes(tmp_path: Path) -> dict[str, str]:
    """Environment of a job with a Ray of its own that notes which images it takes."""
    return training.alone() | consumed.environment(tmp_path / "notes") | {"STEP_S": "0.1"}


def ray_of(pid: int) -> list[int]:
    return [found for word in ("raylet", "gcs_server") for found in training.pids(word, below=pid)]


def wait_until_gone(pids: list[int], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.2)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["sigterm", "ctrl-c"]
)
def test_a_signal_to_the_whole_group_of_a_job(
    number: signal.Signals, code: int, shards: Path, notes: dict[str, str], tmp_path: Path
) -> None:
    """As a terminal, `timeout` and schedulers send it; Ray runs in the job's own processes."""
    job = training.start(tmp_path, shards, notes, group=True)
    try:
        job.until(r"step 1[2-4]/40 ")
        started = ray_of(job.process.pid)
        assert started
        os.killpg(job.process.pid, number)
        at = time.time()
        assert job.finish() == code, job.text
        stopped = time.time() - at
        assert "writing a checkpoint, then ending" in job.text
        step = int(job.until(r"stopped     at step (\d+);")[1])
        assert training.checkpoints(tmp_path)[-1] == step
        assert sorted(training.journal(tmp_path)) == list(range(step))
        wait_until_gone(started)
        job = training.start(tmp_path, shards, notes, group=True)
        assert job.finish() == 0, job.text
        assert f"resumed     from the checkpoint at step {step}" in job.text
    finally:
        training.end(job)
    found = consumed.consumed(notes)
    training.assert_all_images_once(found, 40)
    name = "sigterm-to-job" if number == signal.SIGTERM else "ctrl-c"
    record(
        name,
        lost_steps=found.taken - 40,
        recovery_s=stopped,
        repeated=found.repeated(training.PASS),
        lost=found.lost(training.PASS, training.IMAGES),
        metrics_lost=training.missing_steps(tmp_path, 40),
        note="seconds from the signal to the end of the job with its checkpoint written",
    )


def test_a_second_ctrl_c_ends_at_once(shards: Path, notes: dict[str, str], tmp_path: Path) -> None:
    job = training.start(tmp_path, shards, notes | {"STEP_S": "20"}, group=True)
    try:
        job.until(r"evaluated   step 0")  # the first step has begun and takes its time
        started = ray_of(job.process.pid)
        os.kill(job.process.pid, signal.SIGINT)
        job.until(r"Ctrl-C      writing a checkpoint")
        os.kill(job.process.pid, signal.SIGINT)
        assert job.finish() == 130, job.text
    finally:
        training.end(job)
    assert "interrupted; the same command goes on" in job.text and "Traceback" not in job.text
    assert not training.checkpoints(tmp_path)
    wait_until_gone(started)


@pytest.fixture
def checkpoints_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB for checkpoints, of which one of the tiny run takes 0.6 MiB."""
    with small_disk(tmp_path / "runs" / "fault" / "checkpoints", 4) as place:
        yield place


def test_a_full_disk_costs_checkpoints_and_nothing_else(
    checkpoints_disk: Path, shards: Path, notes: dict[str, str], tmp_path: Path
) -> None:
    """ENOSPC from the kernel: training goes on, says so, and writes the next one when it can."""
    runs = tmp_path / "runs"
    job = training.start(runs, shards, notes | {"STEP_S": "0.3"})
    try:
        job.until(r"step 11/40 ")
        filler = checkpoints_disk / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == 28
        kept = training.checkpoints(runs)
        job.until(r"checkpoint of step 15 could not be written \(.*\); going on, 1 in a row")
        assert training.checkpoints(runs) == kept  # what was there is there, and nothing half
        assert not list(checkpoints_disk.glob(".step-*"))
        job.until(r"checkpoint of step 20 could not be written \(.*\); going on, 2 in a row")
        at = time.time()
        filler.unlink()
        job.until(r"checkpoint of step \d+ is written again")
        recovered = time.time() - at
        assert job.finish() == 0, job.text
    finally:
        training.end(job)
    found = consumed.consumed(notes)
    training.assert_all_images_once(found, 40)
    assert found.taken == 40
    assert training.checkpoints(runs)[-1] == 40
    failed = {
        step: row["health/checkpoints_failed"]
        for step, row in training.journal(runs).items()
        if "health/checkpoints_failed" in row
    }
    assert failed[9] == 0 and failed[14] == 1 and failed[19] == 2 and failed[39] == 0
    lines = (runs / "fault" / "metrics.jsonl").read_text()
    assert '"alarm": "checkpoint of step 15' in lines
    record(
        "checkpoint-disk-full",
        lost_steps=0,
        recovery_s=recovered,
        repeated=found.repeated(training.PASS),
        lost=found.lost(training.PASS, training.IMAGES),
        metrics_lost=training.missing_steps(runs, 40),
        note="until the next checkpoint after there is room; a kill before it would cost the "
        "steps since the last good one",
    )


def test_a_disk_that_stays_full_does_not_end_in_success(
    checkpoints_disk: Path, shards: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    (checkpoints_disk / "filler").write_bytes(bytes(4 * 2**20 - 64 * 2**10))
    job = training.start(
        runs, shards, training.alone(), "optim.steps=6", "train.workers=1", "evaluate.queries="
    )
    try:
        assert job.finish() == 2, job.text
    finally:
        training.end(job)
    assert "all 6 steps are done, but their checkpoint could not be written" in job.text
    assert not (runs / "fault" / "pretrain" / "_done.json").exists()


def test_damaged_checkpoints_are_passed_over(
    shards: Path, notes: dict[str, str], tmp_path: Path
) -> None:
    """One cut short, one of the right length with other bytes: the one before them is used."""
    job = training.start(tmp_path, shards, notes, "train.keep_last=4")
    try:
        job.until(r"step 2[1-3]/40 ")
        os.kill(job.process.pid, signal.SIGTERM)
        assert job.finish() == 143, job.text
        *_, good, flipped, short = training.checkpoints(tmp_path)
        folder = tmp_path / "fault" / "checkpoints"
        state = folder / f"step-{flipped:08d}" / "rank-00000.safetensors"
        size = state.stat().st_size
        with state.open("r+b") as file:
            file.seek(size // 2)
            byte = file.read(1)
            file.seek(size // 2)
            file.write(bytes([byte[0] ^ 0xFF]))
        state = folder / f"step-{short:08d}" / "rank-00000.safetensors"
        os.truncate(state, state.stat().st_size // 2)
        at = time.time()
        job = training.start(tmp_path, shards, notes, "train.keep_last=4")
        assert job.finish() == 0, job.text
    finally:
        training.end(job)
    assert f"step-{short:08d} is cut short" in job.text
    assert f"step-{flipped:08d} is damaged" in job.text
    assert f"resumed     from the checkpoint at step {good}" in job.text
    found = consumed.consumed(notes)
    training.assert_all_images_once(found, 40)
    record(
        "checkpoint-damaged",
        lost_steps=found.taken - 40,
        recovery_s=training.recovery(found, at),
        repeated=found.repeated(training.PASS),
        lost=found.lost(training.PASS, training.IMAGES),
        metrics_lost=training.missing_steps(tmp_path, 40),
        note="the newest cut short, the one before with a flipped byte; seconds from the start",
    )


def test_nan_stops_before_the_update(shards: Path, notes: dict[str, str], tmp_path: Path) -> None:
    """A NaN in the pixels of step 7 on one of two workers stops both, by name."""
    job = training.start(tmp_path, shards, notes | {"NAN_STEP": "7"})
    try:
        assert job.finish() == 2, job.text
    finally:
        training.end(job)
    assert "step 7: not finite: " in job.text and "loss/" in job.text
    assert "stopped before the update" in job.text and "Traceback" not in job.text
    assert training.checkpoints(tmp_path) == [5]
    rows = training.journal(tmp_path)
    assert sorted(rows) == list(range(7))
    record(
        "nan",
        lost_steps=2,
        repeated=0,
        lost=0,
        metrics_lost=0,
        note="ends with the term and the step; the last checkpoint is as it was",
    )
