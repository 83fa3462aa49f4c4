"""`benchmarks/gpu.py` in small form on a CPU: every part runs, and a part that fails is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
from gpu_trainee import Size

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> tuple[list[dict[str, object]], str]:
    """Lines of JSON and the table."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", "--small", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines, table = done.stdout.split("\n\n", 1)
    return [json.loads(line) for line in lines.splitlines()], table


@pytest.mark.long
def test_every_part_runs_and_is_in_the_table():
    lines, table = run("--without", "job")
    parts = {line["part"] for line in lines}
    assert parts == {part.name for part in gpu.PARTS} - {"job"}
    assert not any("failed" in line or "skipped" in line for line in lines)
    steps = [line for line in lines if "step_ms" in line]
    assert len(steps) == 3 + 3  # sizes, strategies
    assert all(line["images_s"] > 0 for line in steps)
    assert all(line["ratio"] > 0 for line in lines if "reference_ms" in line)
    assert next(line for line in lines if "new_graphs" in line)["new_graphs"] == 0
    assert table.count("\n| ") >= len(lines)


@pytest.mark.jobs
@pytest.mark.slow
def test_the_job_says_how_long_it_waited():
    (line,), _ = run("--only", "job")
    assert line["exit_code"] == 0 and line["steps"] == 8
    assert 0 <= line["data_wait_fraction"] <= 1


def fails(size):
    yield {"before": 1}
    raise ValueError("as it is meant to\nand more")


def sleeps(size):
    yield {"before": 1}
    time.sleep(60)


def dies(size):
    yield {"before": 1}
    os._exit(7)


@pytest.mark.parametrize(
    ("part", "allowed_s", "said"),
    [
        (fails, 30, "ValueError: as it is meant to"),
        pytest.param(sleeps, 5, "the time was over", marks=pytest.mark.long),
        (dies, 30, "ended with code 7"),
    ],
)
def test_a_part_that_fails_keeps_what_it_had(part, allowed_s, said, capsys):
    lines = gpu.measured(gpu.Part("x", part, 0), Size(small=True), time.monotonic() + allowed_s)
    assert [line.get("before") for line in lines] == [1, None]
    assert lines[1]["failed"] == said
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_what_the_time_does_not_allow_is_skipped():
    (line,) = gpu.measured(gpu.Part("x", fails, 9), Size(small=False), time.monotonic() + 3)
    assert line["skipped"].endswith("s are left, and it takes 9")
