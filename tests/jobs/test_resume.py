"""The chain end to end, and a run that is stopped, killed or repeated, against one that is not."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import job
from pipeline.track.journal import read, read_steps
from tests.cluster.figures import record
from tests.jobs.conftest import ROOT, Job, runner
from tests.jobs.running import finish, held, terminate_held, training_workers
from tests.tiny import STEPS

pytestmark = pytest.mark.timeout(900)  # seconds; half a minute each where nobody else works
STAGES = ["pack", "pretrain", "evaluate", "export"]
LOSSES = ["loss/total", "loss/dino_global", "loss/dino_local", "loss/ibot", "loss/koleo"]
# The contract of metric names, as far as every step has them
EVERY_STEP = [
    *LOSSES,
    "optim/lr",
    "optim/weight_decay",
    "optim/teacher_momentum",
    "optim/teacher_temperature",
    "optim/grad_norm",
    "health/teacher_entropy",
    "health/student_teacher_kl",
    "health/prototypes_used",
]


def arguments(images: Path, recipe: Path, folder: Path) -> list[str]:
    return [
        str(recipe),
        f"data.source={images}/train",
        f"evaluate.queries={images}/test",
        f"run.folder={folder}",
    ]


def journal(folder: Path) -> dict[int, dict[str, float]]:
    """Metrics of training steps; evaluations come at steps too, after the last one as well."""
    rows = read_steps(folder / "tiny" / "metrics.jsonl", "pretrain")
    return {step: row for step, row in rows.items() if "loss/total" in row}


def assert_same_run(folder: Path, whole: Path) -> None:
    """No step is missing, and each has the losses of the run that was left alone."""
    mine, expected = journal(folder), journal(whole)
    assert list(mine) == list(range(STEPS))
    for step, row in expected.items():
        for name in [*LOSSES, "optim/grad_norm"]:
            assert mine[step][name] == pytest.approx(row[name], rel=1e-6), (step, name)


@pytest.fixture(scope="module")
def whole(
    images: Path,
    recipe: Path,
    cluster_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    """(folder, console) of a chain in one go."""
    folder = tmp_path_factory.mktemp("whole")
    shown = runner(cluster_environment)("run", *arguments(images, recipe, folder))
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return folder, shown.stdout


@pytest.mark.chain
def test_the_chain_in_one_go(whole: tuple[Path, str], images: Path) -> None:
    folder, console = whole
    run = folder / "tiny"
    lines = console.splitlines()
    assert not any("Traceback" in line for line in lines)
    for stage in STAGES:
        assert any(line.startswith(stage) for line in lines), console
        assert json.loads((run / stage / "_done.json").read_text())["result"]

    # pack: in = packed + duplicates + bad, as planted
    assert "train: 82 in = 80 packed + 1 byte duplicates + 1 bad (1 not_an_image)" in console
    bad = pq.read_table(run / "pack" / "bad_images_train.parquet").to_pylist()
    assert [(Path(row["source"]).name, row["reason"]) for row in bad] == [
        ("broken.png", "not_an_image")
    ]

    # pretrain: every step once, with the metrics of the contract, all of them numbers
    rows = journal(folder)
    assert list(rows) == list(range(STEPS))
    for step, row in rows.items():
        assert set(EVERY_STEP) <= set(row), step
        assert all(math.isfinite(row[name]) for name in EVERY_STEP), step
    newest = rows[STEPS - 1]
    assert newest["data/images_seen"] == STEPS * 16
    assert newest["data/pass"] == STEPS / 5
    assert newest["data/bad_images"] == 0
    assert {"perf/images_per_s", "perf/data_wait_fraction", "perf/step_s"} <= set(newest)
    for row in rows.values():  # summed over the workers; a PNG of noise takes its time
        assert row["perf/read_ms"] > 0 and 0.01 < row["perf/decode_ms"] < 1000
        assert 0.01 < row["perf/crop_ms"] < 1000
    assert not [name for name in newest if name.startswith("data/bad_") and name[9:] != "images"]
    steps = [line for line in lines if re.match(r"step \d\d/40 ", line)]
    assert len(steps) == STEPS
    assert all(re.search(r"\| wait \d+% \| decode [\d.]+ ms \| eta ", line) for line in steps)
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert kept[-1] == f"step-{STEPS:08d}"
    assert len(kept) <= 3  # the last two and the best
    evaluated = read_steps(run / "metrics.jsonl", "pretrain")
    assert [s for s, row in evaluated.items() if "eval/knn20_top1" in row] == [0, 20, 40]

    # evaluate and export: weights of another file format that load back
    from pipeline.model.weights import load_backbone

    final = json.loads((run / "evaluate" / "_done.json").read_text())["result"]
    assert {"trained", "step0", "raw_pixels"} <= set(final)
    backbone, spec = load_backbone(run / "weights" / "dinov2")
    assert spec.width == 32
    for name in ("dinov2", "huggingface", "timm"):
        assert (run / "weights" / name / "config.json").is_file()
    with torch.no_grad():
        assert backbone.eval()(torch.zeros(2, 3, 16, 16)).shape == (2, 32)
    assert (run / "report.html").stat().st_size > 1000
    assert (run / "plan.yaml").is_file()
    assert list((run / "pictures").rglob("crops-*.png"))


@pytest.mark.chain
def test_a_finished_run_is_not_run_again(
    whole: tuple[Path, str], images: Path, recipe: Path, without_ray: Job
) -> None:
    before = (whole[0] / "tiny" / "metrics.jsonl").read_bytes()
    shown = without_ray("run", *arguments(images, recipe, whole[0]))
    assert shown.returncode == 0, shown.stderr
    lines = [line for line in shown.stdout.splitlines() if not line.startswith("still ")]
    first, *rest = lines  # a busy machine may take seconds to load the libraries, and says so
    assert first.startswith("run ")
    stages, closing = rest[: len(STAGES)], rest[len(STAGES) :]
    assert [line.split()[0] for line in stages] == STAGES
    assert all(re.search(r"up to date \([0-9a-f]{4}\), skipped$", line) for line in stages)
    assert [line.split()[0] for line in closing] == ["report", "weights", "next", "verdict"]
    assert (whole[0] / "tiny" / "metrics.jsonl").read_bytes() == before


@pytest.mark.chain
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_by_itself_knows_what_the_chain_did(
    stage: str,
    whole: tuple[Path, str],
    images: Path,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, where a second Ray cannot start: it would fail if it had to run."""
    job.main([stage], "", arguments(images, recipe, whole[0]))
    shown = capsys.readouterr().out.splitlines()
    first, second, *last = [line for line in shown if not line.startswith("still ")]
    assert [line.split()[0] for line in last] == ["verdict"] * (stage == "evaluate")
    assert first.startswith("run ")
    assert re.fullmatch(rf"{stage:<11} up to date \([0-9a-f]{{4}}\), skipped", second)


@pytest.fixture
def started(
    images: Path, recipe: Path, cluster_environment: dict[str, str], tmp_path: Path
) -> Iterator[Any]:
    """Starts the chain in the background; what still runs at the end is ended."""
    running: list[subprocess.Popen[str]] = []

    def start(*extra: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-u", ROOT / "jobs" / "run.py"]
            + [*arguments(images, recipe, tmp_path), *extra],
            env=cluster_environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextmanager
def held_midway(running: subprocess.Popen[str], folder: Path) -> Iterator[list[psutil.Process]]:
    """Inside, the training workers stand still, somewhere after step 10.

    Step lines come to the console when others find the time: a run of 40 steps may be over when the
    line of its twelfth is read. So these look at the disk, and hold the workers meanwhile.
    """
    late = folder / "tiny" / "checkpoints"
    while not list(late.glob("step-000000[1-4]*")):
        assert running.poll() is None, finish(running)[1]
        time.sleep(0.01)
    with held(2) as workers:
        newest = max(path.name for path in late.glob("step-*"))
        assert newest < f"step-{STEPS:08d}", f"{newest} came before the workers could be held"
        yield workers


def stop_midway(running: subprocess.Popen[str], folder: Path) -> tuple[int, str]:
    """SIGTERM to the driver between two steps; its exit code and its console."""
    with held_midway(running, folder):
        console = terminate_held(running)
    code, rest = finish(running)
    return code, console + rest


@pytest.mark.slow
def test_stopped_by_sigterm_and_started_again(
    whole: tuple[Path, str], started: Any, tmp_path: Path, without_ray: Job, images: Path,
    recipe: Path,
) -> None:  # fmt: skip
    code, rest = stop_midway(started(), tmp_path)
    assert code == 143, rest
    assert "SIGTERM     writing a checkpoint, then ending" in rest
    stopped = re.search(r"stopped     at step (\d+); the same command goes on from there", rest)
    assert stopped, rest
    step = int(stopped[1])
    assert 10 <= step < STEPS
    assert list(journal(tmp_path)) == list(range(step))
    assert (tmp_path / "tiny" / "checkpoints" / f"step-{step:08d}").is_dir()
    assert not (tmp_path / "tiny" / "pretrain" / "_done.json").exists()

    code, console = finish(started())
    assert code == 0, console
    assert "pack        up to date" in console
    assert f"resumed     from the checkpoint at step {step}" in console
    assert_same_run(tmp_path, whole[0])

    again = without_ray("run", *arguments(images, recipe, tmp_path))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("up to date") == len(STAGES)


def note(name: str, folder: Path, at: float, remark: str) -> None:
    """The figures of a fault at a time, from the journal: every step that was done is in it."""
    steps: list[int] = []
    first_after = 0.0
    for _, event in read(folder / "tiny" / "metrics.jsonl"):
        if event["run"] != "pretrain":
            continue
        if "resume" in event:
            first_after = 0.0
        elif "metrics" in event and "loss/total" in event["metrics"] and "to" not in event:
            steps.append(event["step"])
            first_after = first_after or event["ts"] / 1000
    record(
        name,
        lost_steps=len(steps) - len(set(steps)),
        recovery_s=first_after - at,
        repeated=0,  # assert_same_run: each step has the losses of the run that was left alone
        lost=0,
        metrics_lost=STEPS - len(set(steps)),
        note=remark,
    )


@pytest.mark.slow
def test_a_killed_worker_is_replaced(whole: tuple[Path, str], started: Any, tmp_path: Path) -> None:
    """Killed in the middle of a pass: the group starts again from the last checkpoint."""
    running = started()
    with held_midway(running, tmp_path) as workers:
        os.kill(workers[1].pid, signal.SIGKILL)
        at = time.time()
    code, rest = finish(running)
    assert code == 0, rest
    resumed = re.search(r"resumed     from the checkpoint at step (\d+)", rest)
    assert resumed, rest
    assert int(resumed[1]) >= 10
    assert_same_run(tmp_path, whole[0])
    note(
        "worker-killed", tmp_path, at, "SIGKILL in the middle of a pass; a checkpoint each 5 steps"
    )


@pytest.mark.slow
def test_a_killed_driver_leaves_a_run_that_goes_on(
    whole: tuple[Path, str], started: Any, tmp_path: Path
) -> None:
    first = started()
    with held_midway(first, tmp_path):
        first.kill()
        at = time.time()
    code, _ = finish(first)
    assert code == -signal.SIGKILL
    ended = time.monotonic() + 60
    while training_workers() and time.monotonic() < ended:  # Ray takes them away with their driver
        time.sleep(0.2)
    assert not training_workers()
    code, console = finish(started())
    assert code == 0, console
    assert "resumed     from the checkpoint at step" in console
    assert_same_run(tmp_path, whole[0])
    note("driver-killed", tmp_path, at, "SIGKILL, then the same command again")


@pytest.mark.slow
def test_one_worker_goes_on_where_two_stopped(
    whole: tuple[Path, str], started: Any, tmp_path: Path
) -> None:
    """Another number of workers sees the same images; sums are rounded otherwise, no more."""
    code, rest = stop_midway(started(), tmp_path)
    assert code == 143, rest
    code, console = finish(started("train.workers=1", "train.accumulation=2"))
    assert code == 0, console
    assert "changed     train.workers: 2 -> 1" in console
    mine, expected = journal(tmp_path), journal(whole[0])
    assert list(mine) == list(range(STEPS))
    assert mine[STEPS - 1]["data/images_seen"] == expected[STEPS - 1]["data/images_seen"]
    assert (mine[0]["perf/workers"], mine[STEPS - 1]["perf/workers"]) == (2, 1)
    for step, row in expected.items():  # the same micro batches: KoLeo and iBOT's centre as well
        for name in LOSSES:
            assert mine[step][name] == pytest.approx(row[name], rel=1e-3), (step, name)
