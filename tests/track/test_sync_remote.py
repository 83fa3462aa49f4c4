"""The rest of a journal is sent from a run folder in a bucket, by a machine that has only that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PipelineError
from pipeline.stages.sync import sync_run
from pipeline.storage.mirror import mirrored
from pipeline.storage.run_folder import RunFolder
from pipeline.track import TrackSettings, open_pipeline
from tests.s3 import S3


@pytest.mark.slow
def test_a_run_in_a_bucket_is_sent_from_elsewhere(
    s3: S3,
    mlflow_server: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    s3.make("synced")
    place = "s3://synced/runs/offline"
    monkeypatch.setenv("RAYDINO_HOME", str(tmp_path / "here"))
    folder = RunFolder.of("s3://synced/runs", "offline")
    settings = TrackSettings(
        run_folder=str(folder.path), stage="", uri="http://127.0.0.1:9", shown=str(folder)
    )
    with mirrored(folder):
        pipeline = open_pipeline(settings, "offline", wait=0.1)
        tracker = pipeline.stage("pretrain")
        for step in range(20):
            tracker.metrics(step, {"loss/total": step})
        pipeline.close(timeout=0.5)
    assert f"not sent; later: python jobs/sync.py {place}" in caplog.text

    monkeypatch.setenv("RAYDINO_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    assert sync_run(place).metrics == 20
    known = json.loads(s3.read("synced", "runs/offline/track.json"))["servers"][mlflow_server.uri]
    points = mlflow_server.points(known["runs"]["pretrain"], "loss/total")
    assert points == [(step, float(step)) for step in range(20)]
    # a third machine learns from the bucket that all is there
    monkeypatch.setenv("RAYDINO_HOME", str(tmp_path / "third"))
    assert not sync_run(place)
    with pytest.raises(PipelineError, match=r"no metrics.jsonl in s3://synced/runs/none"):
        sync_run("s3://synced/runs/none")
