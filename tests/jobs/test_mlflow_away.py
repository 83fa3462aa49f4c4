"""A training job whose MLflow server is away at the start, in the middle or at the end: a real
server, killed by its process id and started again on the same data.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.track import server
from pipeline.track.journal import read_steps
from tests.cluster.figures import record
from tests.cluster.nodes import free_port
from tests.jobs.conftest import ROOT, runner
from tests.mlflow_server import answering

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 300
HEAD = "loss/total"


class Mlflow:
    """A server, its folder, and when it was away."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        info = server.start(self.folder, self.port)
        assert info.port == self.port
        assert answering(self.folder, 240) == self.uri

    def kill(self) -> None:
        info = server.running(self.folder)
        assert info
        os.killpg(info.pid, signal.SIGKILL)

    def runs(self, name: str) -> dict[str, Any]:
        """The MLflow runs of a run, by stage; each exists once."""
        from mlflow import MlflowClient

        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name("away")
        found = client.search_runs([experiment.experiment_id], f"tags.`pipeline.name` = '{name}'")
        assert len({run.data.tags["stage"] for run in found}) == len(found)
        return {run.data.tags["stage"]: run for run in found}

    def points(self, name: str) -> list[tuple[int, float]]:
        from mlflow import MlflowClient

        run = self.runs(name)["pretrain"]
        found = MlflowClient(self.uri).get_metric_history(run.info.run_id, HEAD)
        return sorted((p.step, p.value) for p in found)


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    made = Mlflow(tmp_path_factory.mktemp("away") / "mlflow")
    yield made
    server.stop(made.folder)


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
    recipe: Path, shards: str, cluster_environment: dict[str, str], tmp_path: Path, mlflow: Mlflow
) -> Iterator[Any]:
    started: list[Training] = []

    def start(name: str) -> Training:
        started.append(
            Training(
                cluster_environment | {"MLFLOW_TRACKING_URI": mlflow.uri},
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


def assert_all_sent(mlflow: Mlflow, folder: Path) -> int:
    """MLflow has what the journal of the run has, and it is not open; gives what it lacks."""
    there = mlflow.points(folder.name)
    assert there == expected(folder)
    assert {run.info.status for run in mlflow.runs(folder.name).values()} == {"FINISHED"}
    return STEPS - len(there)


def test_down_at_the_start(mlflow: Mlflow, train: Any, tmp_path: Path) -> None:
    training = train("start")
    training.until("step 005/300")
    assert "MLflow at" in training.text and "the run goes on" in training.text
    mlflow.start()
    up = time.monotonic()
    said = training.finish()
    if "not sent; later: python jobs/sync.py" in said:  # training ended before the server was up
        synced(mlflow, tmp_path / "runs" / "start")
    metrics_lost = assert_all_sent(mlflow, tmp_path / "runs" / "start")
    record(
        "mlflow-down-at-start",
        lost_steps=0,
        recovery_s=time.monotonic() - up,
        metrics_lost=metrics_lost,
        note="from the server's first answer to the end of the job, which has sent all",
    )


def test_killed_in_the_middle(mlflow: Mlflow, train: Any, tmp_path: Path) -> None:
    if server.running(mlflow.folder) is None:
        mlflow.start()
    training = train("middle")
    training.until("step 040/300")
    mlflow.kill()
    killed = time.monotonic()
    training.until("step 080/300")  # it goes on without
    mlflow.start()
    said = training.finish()
    assert said.count("the run goes on") <= 1  # it may not have noticed
    if "not sent; later: python jobs/sync.py" in said:
        synced(mlflow, tmp_path / "runs" / "middle")
    metrics_lost = assert_all_sent(mlflow, tmp_path / "runs" / "middle")
    record(
        "mlflow-killed-in-the-middle",
        lost_steps=0,
        recovery_s=time.monotonic() - killed,
        metrics_lost=metrics_lost,
        note="from the kill to the end of the job, which has sent all; no step waited",
    )


def test_gone_at_the_end(mlflow: Mlflow, train: Any, tmp_path: Path) -> None:
    if server.running(mlflow.folder) is None:
        mlflow.start()
    training = train("end")
    training.until("step 200/300")
    mlflow.kill()
    said = training.finish()
    assert "finished at step 300/300" in said
    assert "not sent; later: python jobs/sync.py" in said
    begin = time.monotonic()
    mlflow.start()
    stale = mlflow.runs("end")
    assert stale["pretrain"].info.status == "RUNNING"  # nobody could tell it
    folder = tmp_path / "runs" / "end"
    assert "nothing" not in synced(mlflow, folder)
    metrics_lost = assert_all_sent(mlflow, folder)
    there, runs = mlflow.points("end"), mlflow.runs("end")
    seconds = time.monotonic() - begin
    # a second time there is nothing; once more from the beginning nothing doubles
    assert "nothing sent" in synced(mlflow, folder)
    again = synced(mlflow, folder, "--again")
    assert again.count("tracking   http") == 1  # the links, once
    assert mlflow.points("end") == there
    assert {k: r.info.run_id for k, r in mlflow.runs("end").items()} == {
        k: r.info.run_id for k, r in runs.items()
    }
    record(
        "mlflow-gone-at-the-end",
        lost_steps=0,
        recovery_s=seconds,
        metrics_lost=metrics_lost,
        note="the server's start and jobs/sync.py; sent again from the beginning: no duplicates",
    )


def synced(mlflow: Mlflow, folder: Path, *flags: str) -> str:
    gone = {"RAY_ADDRESS", "PYTHONPATH"}
    env = {k: v for k, v in os.environ.items() if k not in gone}
    shown = runner(env | {"MLFLOW_TRACKING_URI": mlflow.uri})("sync", folder, *flags)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return shown.stdout
