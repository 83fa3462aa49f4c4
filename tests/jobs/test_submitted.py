"""What a job does differently when Ray started it, as far as it shows without a cluster; on a real
one: tests/cluster/test_submit.py.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import cluster
from pipeline.job import main
from pipeline.track import TrackSettings, open_pipeline
from pipeline.track.journal import read

WITH_COPY = {
    "runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip", "env_vars": {}},
    "metadata": {"job_submission_id": "vits14-1", "job_name": "vits14-1", "stage": "run"},
}


def submitted(monkeypatch: pytest.MonkeyPatch, config: object) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))


def test_who_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert cluster.submission() == {} and not cluster.uploaded()
    submitted(monkeypatch, WITH_COPY)
    assert cluster.submission() == {"ray.submission_id": "vits14-1", "ray.stage": "run"}
    assert cluster.uploaded()
    submitted(monkeypatch, {"runtime_env": {"env_vars": {}}, "metadata": {}})
    assert not cluster.uploaded()  # the code is in the image


@pytest.mark.parametrize(
    ("stage", "given", "field"),
    [
        ("pack", [], "run.folder=runs"),
        ("pretrain", ["run.folder=./here"], "run.folder=./here"),
        ("pack", ["run.folder=s3://b/r", "data.shards=out"], "data.shards=out"),
        ("curate", ["run.folder=/shared", "curate.shards=kept"], "curate.shards="),
    ],
)
def test_outputs_in_the_copy_are_refused(
    stage: str,
    given: list[str],
    field: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quiet_log: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    submitted(monkeypatch, WITH_COPY)
    with pytest.raises(SystemExit) as ended:
        main([stage], "", ["data.source=s3://b/photos", *given])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert field in said and "is in the copy of the project that Ray made" in said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def handler() -> Iterator[None]:
    before = cluster._exit_at_sigterm()
    yield
    signal.signal(signal.SIGTERM, before)


def test_sigterm_ends_the_runs_as_killed(tmp_path: Path, handler: None) -> None:
    settings = TrackSettings(run_folder=str(tmp_path / "run"), stage="", uri="none")
    with pytest.raises(SystemExit) as ended, open_pipeline(settings, "run") as pipeline:
        pipeline.stage("pack").metrics(0, {"data/images": 1})
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    assert ended.value.code == 143
    events = [event for _, event in read(tmp_path / "run" / "metrics.jsonl")]
    ends = {event["run"]: event["end"] for event in events if "end" in event}
    assert ends == {"pack": "KILLED", "pipeline": "KILLED"}
