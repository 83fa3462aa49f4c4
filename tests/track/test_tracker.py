"""The tracker never raises, the silent one takes the same calls, and nothing loads MLflow early."""

from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.track import ModelCard, NullTracker, Tracker, TrackSettings, tracker_from
from pipeline.track.journal import now_ms
from pipeline.track.system import SystemMetrics, sample

ROOT = Path(__file__).resolve().parents[2]


def settings(folder: Path, **options: Any) -> TrackSettings:
    return TrackSettings(run_folder=str(folder), stage="pretrain", uri="none", **options)


def test_no_report_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(settings(tmp_path / "run"))
    tracker.picture("crops", 0, "not pixels")
    tracker.picture("crops", 0, np.zeros((3, 3, 7), np.float64))
    tracker.table("t", {"a": [1], "b": [1, 2]})
    tracker.artifact(tmp_path / "missing")
    tracker.metrics(0, None)  # type: ignore[arg-type]
    tracker.params(3)  # type: ignore[arg-type]
    tracker.model(tmp_path / "missing", ModelCard())
    tracker.close()
    tracker.metrics(1, {"loss/total": 1.0})  # after the end: said, not raised
    assert len(caplog.records) == 8
    assert "tracking: picture failed" in caplog.text


def test_the_silent_tracker_takes_every_call(tmp_path: Path) -> None:
    silent = tracker_from(settings(tmp_path), rank=1)
    assert isinstance(silent, NullTracker) and isinstance(tracker_from(None), NullTracker)
    for name, _ in inspect.getmembers(Tracker, inspect.isfunction):
        if not name.startswith("_"):
            assert getattr(silent, name)(1, key=2) is None
    assert silent.run_id == "" and not list(tmp_path.iterdir())
    with pytest.raises(AttributeError):
        silent.metric(0, {})  # type: ignore[attr-defined]


def test_settings_travel_to_a_worker(tmp_path: Path) -> None:
    known = settings(tmp_path, run_id="abc")
    assert pickle.loads(pickle.dumps(known)) == known
    assert tracker_from(known).run_id == "abc"


def test_the_journal_of_another_run_with_this_name_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "track.json").write_text(json.dumps({"key": "old", "servers": {}}))
    (tmp_path / "metrics.jsonl").write_text('{"run": "pretrain", "step": 9, "metrics": {}}\n')
    tracker = Tracker(settings(tmp_path, key="new"))
    assert tracker.journal.steps("pretrain") == {}
    assert len(list(tmp_path.glob("metrics.jsonl.*"))) == 1


def test_system_metrics_have_their_own_lines(tmp_path: Path) -> None:
    tracker = Tracker(settings(tmp_path))
    sampler = SystemMetrics(tracker._write, now_ms, interval=0.02)
    while tracker.journal.path.read_text().count("\n") < 2:
        pass
    sampler.close()
    line = json.loads(tracker.journal.path.read_text().splitlines()[0])
    assert set(line) == {"run", "step", "ts", "system"}
    assert all(name.startswith("system/") for name in line["system"])
    assert 0 < sample()["system_memory_usage_percentage"] < 100
    assert tracker.journal.steps("pretrain") == {}


def test_importing_and_help_load_no_mlflow() -> None:
    code = (
        "import sys, pipeline.track, pipeline.track.sender, pipeline.track.embedder, "
        "pipeline.report.page; heavy = {'mlflow', 'torch', 'ray', 'pandas', 'numpy', 'PIL'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def sync_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/sync.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.long
def test_the_sync_job_explains_itself(tmp_path: Path) -> None:
    helped = sync_job("--help")
    assert helped.returncode == 0 and "runs/<name>" in helped.stdout
    assert sync_job().returncode == 2
    missing = sync_job(str(tmp_path))
    assert missing.returncode == 2 and "no metrics.jsonl" in missing.stderr
    assert "Traceback" not in missing.stderr


@pytest.mark.slow
def test_the_sync_job_sends_a_run(tmp_path: Path, mlflow_server: Any) -> None:
    tracker = Tracker(settings(tmp_path / "run"))
    spec = {"name": "n", "pipeline": "synced", "experiment": "tests"}
    tracker._write(open=spec, attempt=1)
    tracker.metrics(3, {"loss/total": 2.0})
    environment = {"MLFLOW_TRACKING_URI": mlflow_server.uri, "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "jobs/sync.py", str(tmp_path / "run")]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    experiment = mlflow_server.client.get_experiment_by_name("tests").experiment_id
    where = "tags.`pipeline.name` = 'synced'"
    (run,) = mlflow_server.client.search_runs([experiment], where)
    assert run.info.status == "KILLED"  # its process did not say how it ended
    assert mlflow_server.points(run.info.run_id, "loss/total") == [(3, 2.0)]
