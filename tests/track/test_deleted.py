"""Runs and experiments that somebody deleted in the UI, in a database without a server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from pipeline.track import TrackSettings, open_pipeline, sender
from pipeline.track.client import quiet_mlflow


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('database')}/mlflow.db"
    client_of(uri).search_experiments()  # makes the tables, which takes long on a busy machine
    return uri


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sender, "INTERVAL_S", 0.05)
    caplog.set_level(logging.INFO, "pipeline.track")


def client_of(database: str) -> Any:
    quiet_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(database)


def go(folder: Path, database: str, step: int) -> None:
    settings = TrackSettings(str(folder), "", experiment=folder.name, uri=database)
    with open_pipeline(settings, folder.name) as pipeline:
        assert pipeline.worker_settings("pack").uri == "none"  # workers may be on other machines
        pipeline.stage("pack").metrics(step, {"data/images": step})


def values(client: Any, experiment: str) -> dict[str, list[float]]:
    """Of the active runs of an experiment, by stage; children only below an active parent."""
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    ids = {run.info.run_id for run in runs}
    assert all(run.data.tags.get("mlflow.parentRunId", run.info.run_id) in ids for run in runs)
    return {
        run.data.tags["stage"]: [
            m.value for m in client.get_metric_history(run.info.run_id, "data/images")
        ]
        for run in runs
    }


@pytest.mark.long
def test_all_is_in_the_database(
    database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    go(tmp_path / "plain", database, 1)
    go(tmp_path / "plain", database, 2)
    assert values(client_of(database), "plain") == {"pack": [1.0, 2.0], "pipeline": []}
    (line,) = {line for line in caplog.messages if "tracking" in line}
    assert f"{database}  experiment plain; to look at it: mlflow ui --backend" in line
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    place = client_of(database).get_experiment_by_name("plain").artifact_location
    assert place == str(Path(database.removeprefix("sqlite:///")).parent / "mlartifacts")


@pytest.mark.long
@pytest.mark.parametrize("what", [["pack"], ["pipeline"], ["pack", "pipeline"]])
def test_deleted_runs_are_made_anew(
    what: list[str], database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client, name = client_of(database), "-".join(what)
    go(tmp_path / name, database, 1)
    before = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    for run in before:
        if run.data.tags["stage"] in what:
            client.delete_run(run.info.run_id)
    go(tmp_path / name, database, 2)
    expected = [2.0] if "pack" in what else [1.0, 2.0]
    assert values(client, name) == {"pack": expected, "pipeline": []}
    assert caplog.text.count("was deleted on the server: a new one is made") == 1
    assert "not sent" not in caplog.text


@pytest.mark.long
def test_the_runs_of_a_deleted_experiment_go_into_another_one(
    database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = client_of(database)
    for name in ("gone", "gone-2"):
        client.create_experiment(name)
    for name, number in (("gone", 1), ("gone-2", 2)):
        go(tmp_path / "gone", database, number)
        assert values(client, name)["pack"] == [float(number)]
        client.delete_experiment(client.get_experiment_by_name(name).experiment_id)
    caplog.clear()
    go(tmp_path / "gone", database, 3)
    go(tmp_path / "gone", database, 4)
    assert values(client, "gone-3") == {"pack": [3.0, 4.0], "pipeline": []}
    assert caplog.text.count("the MLflow experiment gone was deleted on the server") == 1
    assert "gone-3" in caplog.text and "not sent" not in caplog.text
    assert client.get_experiment_by_name("gone").lifecycle_stage == "deleted"


@pytest.mark.long
def test_a_run_that_is_deleted_while_it_goes_on(
    database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = client_of(database)
    settings = TrackSettings(str(tmp_path / "live"), "", experiment="live", uri=database)
    with open_pipeline(settings, "live") as pipeline:
        tracker = pipeline.stage("pack")
        tracker.metrics(1, {"data/images": 1})
        sending = pipeline._sender
        assert sending
        while (
            len(sending.known.runs) < 2 or sending.known.sent < tracker.journal.path.stat().st_size
        ):
            pass
        client.delete_run(sending.known.runs["pack"])
        tracker.metrics(2, {"data/images": 2})
        tracker.params({"a": 1})
    assert values(client, "live") == {"pack": [2.0], "pipeline": []}
    assert caplog.text.count("was deleted on the server") == 1 and "not sent" not in caplog.text
