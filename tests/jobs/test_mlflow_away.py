"""A training job whose MLflow server is away at the start, in the middle or at the end: a real
server, killed by its process id and started again on the same data.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.track.journal import read_steps
from tests.cluster.figures import record
from tests.jobs.conftest import ROOT, runner
from tests.mlflow_server import TestServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 300
HEAD = "loss/total"


def points(mlflow_server: TestServer, name: str) -> list[tuple[int, float]]:
    run = mlflow_server.runs("away", name)["pretrain"]
    return mlflow_server.points(run.info.run_id, HEAD)


@pytest.fixture(scope="module")
def shards(
    images: Path, recipe: Path, cluster_environment: dict[str, str], tmp_path_factory: Any
) -> str:
    folder = tmp_path_factory.mktemp("packed") / "shards"
    shown = runner(cluster_environment)(
        "pack", recipe, f"data.source={images}/train", f"data.shards={folder}",
        f"run.folder={folder.parent}/runs",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return str(folder)


class Training:
    """`jobs/pretrain.py` in the background, with what it says."""

    def __init__(self, env: dict[str, str], arguments: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "jobs" / "pretrain.py"), *arguments],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def until(self, words: str) -> None:
        while words not in self.text:
            assert self.process.poll() is None, self.text
            time.sleep(0.05)

    def finish(self) -> str:
        code = self.process.wait(600)
        self.reader.join(30)
        assert code == 0, self.text
        return self.text


@pytest.fixture
def train(
    recipe: Path,
    shards: str,
    cluster_environment: dict[str, str],
    tmp_path: Path,
    mlflow_server: TestServer,
) -> Iterator[Any]:
    started: list[Training] = []

    def start(name: str) -> Training:
        started.append(
            Training(
                cluster_environment | {"MLFLOW_TRACKING_URI": mlflow_server.info.uri},
                [
                    *(str(recipe), f"run.name={name}", f"data.shards={shards}"),
                    *(f"run.folder={tmp_path}/runs", "track.enabled=true"),
                    *("track.experiment=away", f"optim.steps={STEPS}", "train.save_every=100"),
                    "train.eval_every=300",
                ],
            )
        )
        return started[-1]

    yield start
    for training in started:
        if training.process.poll() is None:
            training.process.kill()
        training.process.wait()


def expected(folder: Path) -> list[tuple[int, float]]:
    """What the journal says that each step lost."""
    rows = read_steps(folder / "metrics.jsonl", "pretrain")
    found = [(step, row[HEAD]) for step, row in rows.items() if HEAD in row]
    assert [step for step, _ in found] == list(range(STEPS))
    return found


def assert_all_sent(mlflow_server: TestServer, folder: Path) -> int:
    """MLflow has what the journal of the run has, and it is not open; gives what it lacks."""
    there = points(mlflow_server, folder.name)
    assert there == expected(folder)
    runs = mlflow_server.runs("away", folder.name).values()
    assert {run.info.status for run in runs} == {"FINISHED"}
    return STEPS - len(there)


def test_down_at_the_start(mlflow_server: TestServer, train: Any, tmp_path: Path) -> None:
    mlflow_server.kill()
    training = train("start")
    training.until("step 005/300")
    assert "MLflow at" in training.text and "the run goes on" in training.text
    mlflow_server.restart()
    up = time.monotonic()
    said = training.finish()
    if "not sent; later: python jobs/sync.py" in said:  # training ended before the server was up
        synced(mlflow_server, tmp_path / "runs" / "start")
    metrics_lost = assert_all_sent(mlflow_server, tmp_path / "runs" / "start")
    record(
        "mlflow-down-at-start",
        lost_steps=0,
        recovery_s=time.monotonic() - up,
        metrics_lost=metrics_lost,
        note="from the server's first answer to the end of the job, which has sent all",
    )


def test_killed_in_the_middle(mlflow_server: TestServer, train: Any, tmp_path: Path) -> None:
    training = train("middle")
    training.until("step 040/300")
    mlflow_server.kill()
    killed = time.monotonic()
    training.until("step 080/300")  # it goes on without
    mlflow_server.restart()
    said = training.finish()
    assert said.count("the run goes on") <= 1  # it may not have noticed
    if "not sent; later: python jobs/sync.py" in said:
        synced(mlflow_server, tmp_path / "runs" / "middle")
    metrics_lost = assert_all_sent(mlflow_server, tmp_path / "runs" / "middle")
    record(
        "mlflow-killed-in-the-middle",
        lost_steps=0,
        recovery_s=time.monotonic() - killed,
        metrics_lost=metrics_lost,
        note="from the kill to the end of the job, which has sent all; no step waited",
    )


def test_gone_at_the_end(mlflow_server: TestServer, train: Any, tmp_path: Path) -> None:
    training = train("end")
    training.until("step 200/300")
    mlflow_server.kill()
    said = training.finish()
    assert "finished at step 300/300" in said
    assert "not sent; later: python jobs/sync.py" in said
    begin = time.monotonic()
    mlflow_server.restart()
    stale = mlflow_server.runs("away", "end")
    assert stale["pretrain"].info.status == "RUNNING"  # nobody could tell it
    folder = tmp_path / "runs" / "end"
    assert "nothing" not in synced(mlflow_server, folder)
    metrics_lost = assert_all_sent(mlflow_server, folder)
    there, runs = points(mlflow_server, "end"), mlflow_server.runs("away", "end")
    seconds = time.monotonic() - begin
    # a second time there is nothing; once more from the beginning nothing doubles
    assert "nothing sent" in synced(mlflow_server, folder)
    again = synced(mlflow_server, folder, "--again")
    assert again.count("mlflow      http") == 1  # the links, once
    assert points(mlflow_server, "end") == there
    assert {k: r.info.run_id for k, r in mlflow_server.runs("away", "end").items()} == {
        k: r.info.run_id for k, r in runs.items()
    }
    record(
        "mlflow-gone-at-the-end",
        lost_steps=0,
        recovery_s=seconds,
        metrics_lost=metrics_lost,
        note="the server's start and jobs/sync.py; sent again from the beginning: no duplicates",
    )


def synced(mlflow_server: TestServer, folder: Path, *flags: str) -> str:
    gone = {"RAY_ADDRESS", "PYTHONPATH"}
    env = {k: v for k, v in os.environ.items() if k not in gone}
    shown = runner(env | {"MLFLOW_TRACKING_URI": mlflow_server.info.uri})("sync", folder, *flags)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return shown.stdout
