"""The documented commands against a real head with a token: submit, stop, submit again; and what
somebody without the token gets.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.pack.demo.tiles import make_demo
from pipeline.track import server
from pipeline.track.journal import read_steps
from tests.cluster.figures import record
from tests.cluster.nodes import RAY, ROOT, Cluster, cluster, free_port, token, wait_for
from tests.cluster.submit import Job
from tests.mlflow_server import answering

pytestmark = pytest.mark.slow
STEPS = 600
RECIPE = f"""\
# Tests of submitting: tiles of the demo, seconds of training.
data: {{shuffle_images: 32, row_group_images: 16}}
augment: {{global_size: 16, local_size: 8, local_crops: 2}}
model: {{width: 32, depth: 2, heads: 2, patch_size: 4, registers: 1}}
head: {{prototypes: 64, bottleneck: 16, hidden: 32}}
optim: {{steps: {STEPS}, global_batch_size: 16}}
train: {{workers: 2, log_every: 5, save_every: 500, eval_every: 600, precision: float32}}
resources: {{cpus_per_worker: 0.5, threads: 1}}
"""


class Place:
    """A head with a token, an MLflow server whose address its nodes know, and images."""

    def __init__(self, head: Cluster, folder: Path, mlflow: str) -> None:
        self.cluster, self.folder, self.mlflow = head, folder, mlflow
        self.runs = folder / "runs"

    def submit(self, name: str, *entrypoint: str) -> Job:
        """As documented. `exec`, since the shell dies of the stop signal before the job, and
        nobody in a test's cluster reaps orphans, for whose end Ray would wait.
        """
        command = [
            *(RAY, "job", "submit", "--working-dir", "."),
            *("--runtime-env", "cluster/runtime-env.yaml", "--submission-id", name),
            *("--metadata-json", json.dumps({"stage": "run", "recipe": "small"}), "--"),
            "exec",
            *entrypoint,
        ]
        return Job(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.cluster.env | {"RAY_API_SERVER_ADDRESS": self.cluster.dashboard},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )

    def job(self, name: str) -> Any:
        """What the head knows of a job."""
        return self.ask(name)

    def ask(self, path: str, body: bytes | None = None) -> Any:
        """Asks the jobs API, with the token."""
        request = urllib.request.Request(
            f"{self.cluster.dashboard}/api/jobs/{path}",
            body,
            {"Authorization": f"Bearer {self.cluster.env['RAY_AUTH_TOKEN']}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def arguments(self) -> list[str]:
        return [
            f"{self.folder}/small.yaml",
            f"data.source={self.folder}/images/train",
            f"run.folder={self.runs}",
            "track.experiment=submit",
        ]

    def tracked(self, stage: str) -> Any:
        """The MLflow run of a stage."""
        from mlflow import MlflowClient

        client = MlflowClient(self.mlflow)
        experiment = client.get_experiment_by_name("submit")
        if experiment is None:
            return None
        found = client.search_runs([experiment.experiment_id], f"tags.stage = '{stage}'")
        assert len(found) <= 1, f"{len(found)} runs of {stage}"
        return found[0] if found else None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("submit")
    server.start(folder / "mlflow", free_port())
    try:
        make_demo(folder / "demo")
        (folder / "images").mkdir()
        for kind in sorted((folder / "demo" / "train").iterdir())[:2]:
            target = folder / "images" / "train" / kind.name
            target.mkdir(parents=True)
            for path in sorted(kind.glob("tile_*"))[:40]:
                path.rename(target / path.name)
        (folder / "small.yaml").write_text(RECIPE)
        address = answering(folder / "mlflow", 180)
        with cluster(env=token() | {"MLFLOW_TRACKING_URI": address}) as head:
            head.head(cpus=3)
            yield Place(head, folder, address)
    finally:
        server.stop(folder / "mlflow")


def test_stopped_by_ray_and_submitted_again(place: Place) -> None:
    first = place.submit("first", "python", "jobs/run.py", *place.arguments())
    first.until(r"^step 0*[1-9]\d*/")
    wait_for(lambda: place.tracked("pretrain"), "the run of pretrain in MLflow")
    asked = time.time()
    place.ask("first/stop", b"")  # as `ray job stop`, which takes seconds to start
    assert first.finish(120) == 0  # Ray's answer for a stopped job
    assert place.job("first")["status"] == "STOPPED"
    stopped = re.search(r"stopped     at step (\d+); the same command goes on", first.text)
    assert stopped, first.text
    step = int(stopped[1])
    assert 0 < step < STEPS and step % 500  # not one of those that are written anyway
    kept = place.runs / "small" / "checkpoints" / f"step-{step:08d}"
    assert (kept / "meta.json").is_file()
    for stage in ("pipeline", "pretrain"):
        run = place.tracked(stage)
        assert run.info.status == "KILLED", (stage, first.text)
    tags = place.tracked("pipeline").data.tags
    assert tags["ray.submission_id"] == "first" and tags["ray.recipe"] == "small"
    metadata = place.job("first")["metadata"]
    assert metadata["stage"] == "run" and metadata["recipe"] == "small"

    second = place.submit("second", "python", "jobs/run.py", *place.arguments())
    second.until(rf"resumed     from the checkpoint at step {step}$")
    gone_on = time.time()
    second.until(r"^step ")
    both = ("pipeline", "pretrain")
    wait_for(
        lambda: {place.tracked(stage).info.status for stage in both} == {"RUNNING"},
        "MLflow to say that the runs are running again",
    )
    assert second.process.poll() is None  # which the job said, and not only its end
    assert second.finish(400) == 0, second.text
    assert place.job("second")["status"] == "SUCCEEDED"
    for stage in ("pipeline", "pretrain"):
        assert place.tracked(stage).info.status == "FINISHED"  # the same runs: there is one each
    assert place.tracked("pipeline").data.tags["ray.submission_id"] == "second"
    steps = read_steps(place.runs / "small" / "metrics.jsonl", "pretrain")
    trained = [number for number, row in steps.items() if "loss/total" in row]
    assert trained == list(range(STEPS))
    record(
        "job-stop",
        lost_steps=0,
        recovery_s=gone_on - asked,
        metrics_lost=STEPS - len(trained),
        note="ray job stop, submitted again at once; from the stop to the resumed worker",
    )


def test_exit_codes_and_outputs_in_the_uploaded_copy(place: Place) -> None:
    typo = place.submit("typo", "python", "jobs/pretrain.py", "optim.lrr=1")
    lost = place.submit("lost", "python", "jobs/run.py", "configs/demo.yaml")
    assert typo.finish(200) == 1  # of the command line, for whatever fails
    assert place.job("typo")["driver_exit_code"] == 2
    assert "optim.lrr: no such field; did you mean optim.lr?" in typo.text
    assert lost.finish(200) == 1
    assert place.job("lost")["driver_exit_code"] == 2
    assert "run.folder=runs is in the copy of the project that Ray made" in lost.text
    assert "Traceback" not in typo.text + lost.text


@pytest.mark.parametrize("given", [None, "0" * 48], ids=["no token", "another token"])
def test_without_the_token(place: Place, given: str | None, tmp_path: Path) -> None:
    """Neither submit nor read: by the command line, by HTTP, by joining as a driver."""
    env = {k: v for k, v in place.cluster.env.items() if k != "RAY_AUTH_TOKEN"}
    env |= {"HOME": str(tmp_path), "RAY_API_SERVER_ADDRESS": place.cluster.dashboard}
    env |= {"RAY_ADDRESS": place.cluster.address}
    env |= {"RAY_AUTH_TOKEN": given} if given else {"RAY_AUTH_MODE": "disabled"}
    mark = tmp_path / "mark"
    commands = {
        "submit": ["job", "submit", "--", "touch", str(mark)],
        "list": ["job", "list"],
        "logs": ["job", "logs", "first"],
        "stop": ["job", "stop", "first"],
    }
    begun = {
        name: subprocess.Popen(
            [RAY, *command],
            env=env,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, command in commands.items()
    }
    code = f"import ray; ray.init('{place.cluster.address}'); print('JOINED', ray.nodes())"
    begun["join"] = subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for name, process in begun.items():
        said, _ = process.communicate(timeout=180)
        assert process.returncode != 0, (name, said)
        assert re.search("authenticat|unauthori|token", said, re.IGNORECASE), (name, said)
        assert "JOINED" not in said and "PRETRAIN" not in said.upper(), (name, said)
    assert not mark.exists()
    header = {"Authorization": f"Bearer {given}"} if given else {}
    for path, body in (
        ("/api/jobs/", None),
        ("/api/jobs/", b'{"entrypoint": "id"}'),
        ("/api/jobs/first/logs", None),
        ("/api/v0/nodes", None),
        ("/api/cluster_status", None),
        ("/logs/", None),
        ("/nodes?view=summary", None),
    ):
        request = urllib.request.Request(place.cluster.dashboard + path, body, header)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert refused.value.code in (401, 403), path


def test_the_token_is_in_no_command_line_and_no_log(place: Place) -> None:
    secret = place.cluster.env["RAY_AUTH_TOKEN"]
    for process in place.cluster.nodes[0].processes():
        with contextlib.suppress(psutil.Error):  # ended meanwhile
            assert secret not in " ".join(process.cmdline()), process
    for path in (place.cluster.folder).rglob("*"):
        if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
            assert secret.encode() not in path.read_bytes(), path
