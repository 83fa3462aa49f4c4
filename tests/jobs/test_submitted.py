"""What a job does differently when Ray started it, as far as it shows without a cluster; on a real
one: tests/cluster/test_submit.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import environment
from pipeline.driver.mailbox import ENDING
from pipeline.driver.signals import ended_by_sigterm
from pipeline.job import main
from pipeline.track import TrackSettings, open_pipeline
from pipeline.track.journal import read
from tests.jobs.conftest import ROOT

WITH_COPY = {
    "runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip", "env_vars": {}},
    "metadata": {"job_submission_id": "vits14-1", "job_name": "vits14-1", "stage": "run"},
}


def submitted(monkeypatch: pytest.MonkeyPatch, config: object) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))


def test_who_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert environment.submission() == {} and not environment.uploaded()
    submitted(monkeypatch, WITH_COPY)
    assert environment.submission() == {"ray.submission_id": "vits14-1", "ray.stage": "run"}
    assert environment.uploaded()
    submitted(monkeypatch, {"runtime_env": {"env_vars": {}}, "metadata": {}})
    assert not environment.uploaded()  # the code is in the image


SHARED = ["run.folder=/shared", "curate.preset=dedup"]


@pytest.mark.parametrize(
    ("stage", "given", "field"),
    [
        ("pack", [], "run.folder=runs"),
        ("pretrain", ["run.folder=./here"], "run.folder=./here"),
        ("pack", ["run.folder=s3://b/r", "data.shards=out"], "data.shards=out"),
        ("curate", [*SHARED, "curate.shards=kept"], "curate.shards="),
    ],
)
def test_outputs_in_the_copy_are_refused(
    stage: str,
    given: list[str],
    field: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    submitted(monkeypatch, WITH_COPY)
    with pytest.raises(SystemExit) as ended:
        main([stage], "", ["data.source=s3://b/photos", *given])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert field in said and "is in the copy of the project that Ray made" in said
    assert not list(tmp_path.iterdir())


def test_sigterm_ends_the_runs_as_killed(tmp_path: Path) -> None:
    settings = TrackSettings(run_folder=str(tmp_path / "run"), stage="", uri="none")
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(SystemExit) as ended,
        ended_by_sigterm(),
        open_pipeline(settings, "run") as pipeline,
    ):
        pipeline.stage("pack").metrics(0, {"data/images": 1})
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    assert ended.value.code == 143
    events = [event for _, event in read(tmp_path / "run" / "metrics.jsonl")]
    ends = {event["run"]: event["end"] for event in events if "end" in event}
    assert ends == {"pack": "KILLED", "pipeline": "KILLED"}
    assert signal.getsignal(signal.SIGTERM) == before and not ENDING.number


def test_what_ray_makes_of_the_exit_is_put_right() -> None:
    closed = False
    with pytest.raises(SystemExit) as ended, ended_by_sigterm(), ended_by_sigterm():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        except SystemExit:
            sys.exit(1)  # as Ray does in `ray.wait`
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # `timeout` sends it twice
            time.sleep(0.01)
            closed = True
    assert ended.value.code == 143 and closed
    with pytest.raises(SystemExit) as ended, ended_by_sigterm():
        sys.exit(1)
    assert ended.value.code == 1  # nobody sent a signal: a bug


JOB = """
import sys, time
sys.path.insert(0, {root!r})
import ray
from pipeline import job
from pipeline.curate.steps.steps import Steps
from pipeline.stages import pack

def sleeps(out, item):
    time.sleep(600)
    return {{}}

def say_folder():
    print("FOLDER", ray._private.worker._global_node.get_session_dir_path(), flush=True)

def run(context, tracker):
    say_folder()
    return Steps(context.folder.path).run("slow", sleeps, {{"a": 0, "b": 1}})

def init(**options):
    real_init(**options)
    if {early}:
        say_folder()
        time.sleep(600)

def shutdown():
    time.sleep(4)  # Ray's core would abort a second before
    real_shutdown()

real_init, real_shutdown = ray.init, ray.shutdown
ray.init, ray.shutdown, pack.run = init, shutdown, run
job.main(["pack"], "", sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True], ids=["wait", "init"])
def test_sigterm_while_the_job_waits_for_ray(
    early: bool, images: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """As curate and evaluate do: most of the time they are in `ray.wait` or `ray.get`."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            JOB.format(root=str(ROOT), early=early),
            f"data.source={images}/train",
        ]
        + [f"run.folder={tmp_path}", "track.enabled=false", "resources.cpus=2"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout
        lines = iter(process.stdout.readline, "")
        said = [next(line for line in lines if line.startswith("FOLDER "))]
        folder = Path(said[0].split()[1]).parent
        assert folder.is_dir()
        time.sleep(3)  # now it waits
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        said += lines
        assert process.wait(300) == 143, "".join(said)
    finally:
        process.kill()
        process.wait()
    assert not folder.exists()
    if early:
        return  # no runs yet
    events = [event for _, event in read(tmp_path / "pack" / "metrics.jsonl")]
    ends = {event["run"]: event["end"] for event in events if "end" in event}
    assert ends == {"pack": "KILLED", "pipeline": "KILLED"}
