"""The local server is started once, found again, and never confused with another process."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.errors import PipelineError
from pipeline.track import TrackSettings, open_pipeline, server
from pipeline.track.endpoint import LocalServer, Remote, find_endpoint, links


def start_and_tell(folder: Path, port: int, answers: Any) -> None:
    answers.put(server.start(folder, port).pid)


def test_two_jobs_start_one_server(tmp_path: Path) -> None:
    with socket.socket() as taken:  # its port is passed over
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        jobs = [context.Process(target=start_and_tell, args=(tmp_path, port, answers))] * 1
        jobs += [context.Process(target=start_and_tell, args=(tmp_path, port, answers))]
        for job in jobs:
            job.start()
        first, second = answers.get(timeout=30), answers.get(timeout=30)
        for job in jobs:
            job.join()
        try:
            assert first == second
            found = server.running(tmp_path)
            assert found and found.pid == first and found.port > port
            assert os.getsid(first) == first  # a session of its own: the job's end spares it
            below = psutil.Process().children(recursive=True)
            assert first not in {process.pid for process in below}  # and so does `ray job stop`
        finally:
            assert server.stop(tmp_path)
    assert server.running(tmp_path) is None
    assert not server.stop(tmp_path)


def test_the_pid_of_another_process_is_not_taken_for_the_server(tmp_path: Path) -> None:
    info = {"pid": os.getpid(), "created": 1.0, "port": 5000, "uri": "http://127.0.0.1:5000"}
    (tmp_path / "server.json").write_text(json.dumps(info))
    assert server.running(tmp_path) is None
    assert not server.stop(tmp_path)  # and it is not ended
    (tmp_path / "server.json").write_text("{half")
    assert server.running(tmp_path) is None


def test_a_job_finds_the_server_and_reports_to_it(
    tmp_path: Path,
    mlflow_server: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    caplog.set_level("INFO", "pipeline")
    settings = TrackSettings(
        run_folder=str(tmp_path / "run"),
        stage="",
        experiment="local",
        server_folder=str(mlflow_server.folder),
    )
    with open_pipeline(settings, "run") as pipeline:
        pipeline.stage("pack").metrics(0, {"data/images": 3})
        worker = pipeline.worker_settings("pack")
    assert worker.uri == "local"
    assert mlflow_server.points(pipeline.ids["pack"], "data/images") == [(0, 3.0)]
    link = f"/runs/{pipeline.ids['pipeline']}?workflowType=machine_learning"
    assert sum(line.endswith(link) for line in caplog.messages) == 1


def test_where_to_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert isinstance(find_endpoint("", tmp_path), LocalServer)
    assert find_endpoint("none", tmp_path) is None
    assert find_endpoint("", tmp_path, nodes=3) is None  # loopback would be another machine
    assert "3 nodes" in caplog.text and "MLFLOW_TRACKING_URI" in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://team:5000/")
    assert find_endpoint("", tmp_path, nodes=3) == Remote("http://team:5000")
    assert find_endpoint("http://other:1", tmp_path) == Remote("http://other:1")
    with pytest.raises(PipelineError, match="not a server"):
        find_endpoint("sqlite:///mlflow.db", tmp_path)


def test_without_a_server_the_journal_has_everything(tmp_path: Path) -> None:
    settings = TrackSettings(run_folder=str(tmp_path / "run"), stage="", uri="none")
    with open_pipeline(settings, "run") as pipeline:
        tracker = pipeline.stage("pretrain")
        tracker.metrics(0, {"loss/total": 1.0})
    assert tracker.journal.steps("pretrain") == {0: {"loss/total": 1.0}}
    assert pipeline.ids == {} and not (tmp_path / "run" / "track.json").exists()


def test_links_before_the_run_is_made() -> None:
    assert links("", "exp", "", "") == ["tracking   MLflow is starting  experiment exp"]


def test_the_server_is_on_loopback_only(mlflow_server: Any) -> None:
    tree = [psutil.Process(mlflow_server.info.pid)]
    tree += tree[0].children(recursive=True)
    listening = {
        c.laddr.ip for p in tree for c in p.net_connections() if c.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_a_server_that_dies_is_given_up_after_a_few_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[Path] = []
    monkeypatch.setattr(server, "start", started.append)
    caplog.set_level(logging.WARNING, "pipeline.track")
    local = LocalServer(tmp_path)
    assert [local.uri() for _ in range(6)] == [None] * 6
    assert len(started) == 3 and caplog.text.count("does not start") == 1
