"""The local server is started once, found again, and never confused with another process."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import socket
import sqlite3
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.errors import PipelineError
from pipeline.track import TrackSettings, open_pipeline, server
from pipeline.track import server as database
from pipeline.track.endpoint import Database, LocalServer, Remote, find_endpoint, links
from pipeline.track.sender import sync
from tests.jobs.test_loopback import listening


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
        first, second = answers.get(timeout=240), answers.get(timeout=240)
        for job in jobs:
            job.join()
        try:
            assert first == second
            known = server.running(tmp_path)
            assert known and known.pid == first and known.port > port
            assert os.getsid(first) == first  # a session of its own: the job's end spares it
            below = psutil.Process().children(recursive=True)
            assert first not in {process.pid for process in below}  # and so does `ray job stop`
        finally:
            assert server.stop(tmp_path)
    assert server.running(tmp_path) is None
    assert not server.stop(tmp_path)


def test_the_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("kept")
    folder = tmp_path / "mlflow"
    folder.mkdir()
    (folder / "server.log").symlink_to(precious)
    with pytest.raises(PipelineError, match=r"server\.log cannot be written") as refused:
        server.start(folder)
    assert "link" in str(refused.value.hint) and precious.read_text() == "kept"
    assert server.running(folder) is None


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
    assert find_endpoint("HTTPS://Team:5000/", tmp_path) == Remote("https://Team:5000")
    with pytest.raises(PipelineError, match="not a server"):
        find_endpoint("postgresql://host/mlflow", tmp_path)
    with pytest.raises(PipelineError, match="did you mean http://host:5000"):
        find_endpoint("host:5000", tmp_path)


def test_databases_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    absolute = Database(f"sqlite:///{tmp_path}/a b.db")
    for uri in ("sqlite:///a b.db", f"sqlite:///{tmp_path}/a b.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert find_endpoint("", tmp_path, nodes=3) == find_endpoint(uri, tmp_path) == absolute
    assert absolute.uri() == absolute.id and not (tmp_path / "a b.db").exists()
    for uri, said in (
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///no/a.db", f"{tmp_path}/no/a.db cannot be written"),
        ("file:mlruns", f"sqlite:///{tmp_path}/mlruns/mlflow.db"),
        ("./mlruns", f"track.uri=sqlite:///{tmp_path}/mlruns/mlflow.db"),
    ):
        with pytest.raises(PipelineError) as caught:
            find_endpoint(uri, tmp_path)
        assert said in str(caught.value) and "track.uri=" in str(caught.value)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for uri in ("file:mlruns", "./mlruns", f"file://{tmp_path}/mlruns"):
        assert find_endpoint(uri, tmp_path) == Database(f"file://{tmp_path}/mlruns")


def test_a_secret_in_the_address_gets_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for uri, shown in (
        ("http://user:pa/hush@host:5000", "http://host:5000"),
        ("http://user:p@hush@host", "http://host"),
        ("HTTP://user:hush@host", "http://host"),
        ("https://host/?token=hush", ""),
        ("https://host#hush=hush", ""),
        ("postgresql://user:hush@host/db", ""),
        ("user:hush@host:5000", ""),
        ("sqlite+pysqlcipher://:hush@/a.db", ""),
    ):
        for name in ("USERNAME", "PASSWORD", "URI"):
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
            monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        if shown:
            assert find_endpoint("", tmp_path) == Remote(shown)
            assert "hush" in os.environ["MLFLOW_TRACKING_PASSWORD"]
            assert "hush" not in os.environ["MLFLOW_TRACKING_URI"]
        else:
            with pytest.raises(PipelineError, match="password or a key") as caught:
                find_endpoint("", tmp_path)
            assert "hush" not in repr(caught.value) and "MLFLOW_TRACKING_URI" in str(caught.value)


def test_a_database_of_another_mlflow_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For the local server as for a database in the address; the job does not wait for either."""
    path = tmp_path / "mlflow" / "mlflow.db"
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as opened, opened:
        opened.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        opened.execute("INSERT INTO alembic_version VALUES ('867495a8f9d4')")
    for number, uri in enumerate(("", f"sqlite:///{path}")):
        caplog.clear()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        settings = TrackSettings(run_folder=str(tmp_path / f"run{number}"), stage="")
        begin = time.monotonic()
        with open_pipeline(settings, "run") as pipeline:
            pipeline.stage("pack").metrics(0, {"data/images": 3})
        assert time.monotonic() - begin < 50  # of the 60 s that it would wait for a server
        said = f"older MLflow: make a copy of it, then run `mlflow db upgrade sqlite:///{path}`"
        assert (
            caplog.text.count(said) == 1 and "not sent; later: python jobs/sync.py" in caplog.text
        )
        with pytest.raises(PipelineError, match="mlflow db upgrade"):
            sync(tmp_path / f"run{number}", server_folder=path.parent)
    with contextlib.closing(sqlite3.connect(path)) as opened, opened:
        opened.execute("UPDATE alembic_version SET version_num = 'f00d'")
    assert "newer MLflow" in database.mismatch(path)
    assert database.mismatch(tmp_path / "none.db") == ""
    (tmp_path / "text.db").write_text("no database " * 100)
    assert "no SQLite database" in database.mismatch(tmp_path / "text.db")


def test_without_a_server_the_journal_has_everything(tmp_path: Path) -> None:
    settings = TrackSettings(run_folder=str(tmp_path / "run"), stage="", uri="none")
    with open_pipeline(settings, "run") as pipeline:
        tracker = pipeline.stage("pretrain")
        tracker.metrics(0, {"loss/total": 1.0})
    assert tracker.journal.steps("pretrain") == {0: {"loss/total": 1.0}}
    assert pipeline.ids == {} and not (tmp_path / "run" / "track.json").exists()


def test_links_before_the_run_is_made() -> None:
    assert links("", "exp", "", "") == ["tracking    MLflow is starting  experiment exp"]


def test_the_server_is_on_loopback_only(mlflow_server: Any) -> None:
    found = listening(psutil.Process(mlflow_server.info.pid))
    assert {address for _, address, _ in found} == {"127.0.0.1"}


def test_a_server_that_dies_is_given_up_after_a_few_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[Path] = []
    monkeypatch.setattr(server, "start", started.append)
    caplog.set_level(logging.WARNING, "pipeline.track")
    local = LocalServer(tmp_path)
    assert [local.uri() for _ in range(6)] == [None] * 6
    assert len(started) == 3 and caplog.text.count("does not start") == 1
