"""A server with passwords (`--app-name basic-auth`): the right one, the wrong one, none."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.track import TrackSettings, open_pipeline, sender
from pipeline.track.endpoint import Remote, find_endpoint
from pipeline.track.sender import sync
from pipeline.track.server import healthy
from tests.mlflow_server import free_port
from tests.track.test_sender import until

PASSWORD = "correct-horse-7261"  # MLflow takes 12 characters or more
NAMES = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the users `admin` and `team`."""
    pytest.importorskip("flask_wtf", reason="needs mlflow[auth]")
    folder = tmp_path_factory.mktemp("guarded")
    port = free_port()
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = MANAGE\ndatabase_uri = sqlite:///auth.db\n"
        f"admin_username = admin\nadmin_password = {PASSWORD}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", "sqlite:///mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    settings = {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of-the-test",
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **settings},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        until(lambda: healthy(uri) or process.poll() is not None, 240)
        assert process.poll() is None, (folder / "log").read_text()
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what the code sets is undone as well
        monkeypatch.delenv(name)
    monkeypatch.setattr(sender, "INTERVAL_S", 0.05)
    monkeypatch.setattr(sender, "LONGEST_WAIT_S", 0.4)
    monkeypatch.setattr(sender, "LONGEST_WAIT_AT_CLOSE_S", 0.4)


def settings(folder: Path, uri: str = "") -> TrackSettings:
    return TrackSettings(run_folder=str(folder), stage="", experiment="guarded", uri=uri)


def ask(uri: str, path: str, password: str = "") -> int:
    request = urllib.request.Request(uri + path)
    if password:
        word = b64encode(f"admin:{password}".encode()).decode()
        request.add_header("Authorization", f"Basic {word}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return int(error.code)


@pytest.mark.slow
def test_a_run_on_a_server_with_passwords(
    guarded: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    search = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    assert ask(guarded, search) == 401 and ask(guarded, search, "wrong-password") == 401
    assert ask(guarded, search, PASSWORD) == 200

    # a wrong password: said once, what to do, nothing raised, everything kept
    caplog.set_level(logging.INFO, "pipeline.track")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-password")
    pipeline = open_pipeline(settings(tmp_path / "run", guarded), "run", wait=1.0)
    tracker = pipeline.stage("pretrain")
    for step in range(50):
        tracker.metrics(step, {"loss/total": step})
    until(lambda: pipeline._sender._failures >= 2)
    pipeline.close(timeout=1.0)
    assert caplog.text.count("user and password are not right") == 1
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in caplog.text
    assert "50 metrics and " in caplog.text and "not sent; later" in caplog.text
    with pytest.raises(PipelineError, match="user and password are not right"):
        sync(tmp_path / "run", guarded)

    # the right one, in the address: it gets out of there and goes on
    for name in NAMES[:2]:
        monkeypatch.delenv(name)
    address = guarded.replace("://", f"://admin:{PASSWORD}@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert sync(tmp_path / "run").metrics == 50
    with open_pipeline(settings(tmp_path / "next"), "next") as second:
        second.stage("pretrain").metrics(0, {"loss/total": 1.0})
        worker = second.worker_settings("pretrain")
    assert second.ids.keys() == {"pipeline", "pretrain"}
    assert os.environ["MLFLOW_TRACKING_URI"] == guarded
    for text in (caplog.text, json.dumps(vars(worker))):
        assert PASSWORD not in text
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes(), path

    from mlflow import MlflowClient

    client = MlflowClient(guarded)
    experiment = client.get_experiment_by_name("guarded")
    runs = client.search_runs([experiment.experiment_id], "tags.stage = 'pretrain'")
    by_name = {run.data.tags["pipeline.name"]: run for run in runs}
    assert by_name.keys() == {"run", "next"}
    points = client.get_metric_history(by_name["run"].info.run_id, "loss/total")
    assert sorted((p.step, p.value) for p in points) == [(s, float(s)) for s in range(50)]
    for run in runs:
        assert PASSWORD not in str(run.to_dictionary())


def test_credentials_leave_the_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann%40x:p%2Fw@team:5000/mlflow")
    assert find_endpoint("", tmp_path) == Remote("https://team:5000/mlflow")
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "ann@x"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "p/w"
    with pytest.raises(PipelineError) as refused:
        find_endpoint("https://ann:secret@team:5000", tmp_path)
    assert "secret" not in str(refused.value) and "PASSWORD" in str(refused.value)
