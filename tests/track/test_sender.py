"""Nothing lost and nothing doubled while the server is away, dies, or loses its answers."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.track import Pipeline, TrackSettings, open_pipeline, sender, tracker_from
from pipeline.track.client import NotReadyError, explain, is_final
from pipeline.track.sender import sync


def settings(folder: Path, uri: str) -> TrackSettings:
    return TrackSettings(run_folder=str(folder), stage="", experiment="tests", uri=uri)


def opened(folder: Path, uri: str, **options: Any) -> Pipeline:
    return open_pipeline(settings(folder, uri), folder.name, **options)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "INTERVAL_S", 0.05)
    monkeypatch.setattr(sender, "LONGEST_WAIT_S", 0.4)
    monkeypatch.setattr(sender, "LONGEST_WAIT_AT_CLOSE_S", 0.4)


def until(condition: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def test_all_of_it_arrives(tmp_path: Path, mlflow_server: Any) -> None:
    import mlflow

    folder = tmp_path / "everything"
    folder.mkdir()
    (folder / "plan.yaml").write_text("optim:\n  lr: 0.001\n")
    (tmp_path / "outside.md").write_text("# table")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    long = {"long": "x" * 9000}
    with opened(folder, mlflow_server.uri, tags={"recipe": "demo"}) as pipeline:
        pipeline.tracker.params(long)
        pipeline.tracker.artifact(folder / "plan.yaml")
        tracker = pipeline.stage("pretrain", params={f"p{i}": i for i in range(12)})
        for step in range(5):
            tracker.metrics(step, {"loss/total": 1.0 / (1 + step), "loss/bad": math.inf})
            tracker.metrics(step, {"perf/hidden": 1.0}, send=False)
        tracker.headline(4, {"loss/total": 0.2})
        tracker.picture("crops", 3, pixels)
        tracker.table("neighbours", {"id": ["a", "b"], "cosine": [np.float32(0.5), 1]})
        tracker.artifact(tmp_path / "outside.md", "notes")
        tracker.dataset("cifar", "d" * 64, "s3://bucket/shards", "training", images=50_000)
        tracker.note("**k-NN 91 %**\n\nmore")
        tracker.tags({"alarm": "none"})
        ids = {**pipeline.ids}
    client, ids = mlflow_server.client, ids | pipeline.ids
    run, parent = client.get_run(ids["pretrain"]), client.get_run(ids["pipeline"])
    assert (run.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.tags["recipe"] == "demo" and run.data.tags["stage"] == "pretrain"
    assert run.data.tags["mlflow.note.content"].startswith("**k-NN")
    assert run.data.tags["attempt"] == "1" and run.data.tags["alarm"] == "none"
    assert len(run.data.params) == 8
    assert parent.data.params["long"].endswith("[cut, 9,000 characters]")
    points = mlflow_server.points
    assert points(ids["pretrain"], "loss/total") == [(s, 1.0 / (1 + s)) for s in range(5)]
    assert all(math.isnan(value) for _, value in points(ids["pretrain"], "loss/bad"))
    assert "perf/hidden" not in run.data.metrics
    assert points(ids["pipeline"], "loss/total") == [(4, 0.2)]  # the parent has the headline
    dataset = run.inputs.dataset_inputs[0]
    assert dataset.dataset.name == "cifar" and "s3://bucket" in dataset.dataset.source
    assert {tag.key: tag.value for tag in dataset.tags}["images"] == "50000"
    files = {f.path for f in client.list_artifacts(ids["pretrain"])}
    assert files == {"images", "tables", "notes"}
    assert [f.path for f in client.list_artifacts(ids["pipeline"])] == ["plan.yaml"]
    mlflow.set_tracking_uri(mlflow_server.uri)
    table = client.load_table(run.info.experiment_id, "tables/neighbours.json", [ids["pretrain"]])
    assert table["cosine"].tolist() == [0.5, 1.0]
    pictures = [f.path for f in client.list_artifacts(ids["pretrain"], "images")]
    png = next(path for path in pictures if path.endswith(".png"))
    assert "pictures~crops+step+3" in png
    from PIL import Image

    local = client.download_artifacts(ids["pretrain"], png, str(tmp_path))
    assert np.array_equal(np.asarray(Image.open(local)), pixels)


def test_an_outage_and_lost_answers_lose_and_double_nothing(
    tmp_path: Path, mlflow_server: Any, wire: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipeline.track")
    wire.set("open")
    pipeline = opened(tmp_path / "outage", wire.uri)
    tracker = pipeline.stage("pretrain")
    until(lambda: "pretrain" in pipeline.ids)
    for step in range(300):
        tracker.metrics(step, {"loss/total": step, "loss/ibot": -step})
        if step == 60:
            wire.set("lossy")  # the server takes the request, we never hear
            until(lambda: wire.lost_answers >= 2)
        if step == 120:
            wire.set("cut")
            until(lambda: pipeline._sender._failures >= 3)
        if step == 240:
            wire.set("open")
    pipeline.close()
    run_id = pipeline.ids["pretrain"]
    assert mlflow_server.points(run_id, "loss/total") == [(s, float(s)) for s in range(300)]
    assert mlflow_server.points(run_id, "loss/ibot") == [(s, -float(s)) for s in range(300)]
    assert caplog.text.count("the run goes on") == 1
    assert caplog.text.count("answers again") == 1
    assert "not sent" not in caplog.text
    # The whole journal once more: nothing doubles.
    assert sync(tmp_path / "outage", mlflow_server.uri, again=True).metrics == 600
    assert len(mlflow_server.points(run_id, "loss/total")) == 300
    runs = mlflow_server.client.search_runs(
        [pipeline._sender.known.experiment_id], "tags.`pipeline.name` = 'outage'"
    )
    assert len(runs) == 2  # no second pair of runs either


def test_a_closed_port_delays_nothing_and_sync_sends_it_later(
    tmp_path: Path,
    mlflow_server: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "offline"
    begin = time.monotonic()
    pipeline = opened(folder, "http://127.0.0.1:9")
    tracker = pipeline.stage("pretrain", tags={"recipe": "r"})
    slowest = 0.0
    for step in range(156):
        before = time.monotonic()
        tracker.metrics(step, {"loss/total": step, "optim/lr": 0.1})
        slowest = max(slowest, time.monotonic() - before)
    assert slowest < 2.0  # one MLflow call would wait for its time limit, or for its tries
    tracker.picture("crops", 0, np.zeros((8, 8, 3), np.uint8))
    pipeline.close("FAILED", timeout=1.0)
    assert time.monotonic() - begin < 20.0
    assert "312 metrics and " in caplog.text
    assert "not sent; later: python jobs/sync.py offline" in caplog.text
    assert pipeline.ids == {}

    sent = sync(folder, mlflow_server.uri)
    assert sent.metrics == 312
    client = mlflow_server.client
    experiment = client.get_experiment_by_name("tests").experiment_id
    runs = client.search_runs([experiment], "tags.`pipeline.name` = 'offline'")
    by_stage = {run.data.tags["stage"]: run for run in runs}
    assert len(runs) == 2 and by_stage["pretrain"].info.status == "FAILED"
    assert by_stage["pretrain"].data.tags["recipe"] == "r"
    parent = by_stage["pipeline"].info.run_id
    assert by_stage["pretrain"].data.tags["mlflow.parentRunId"] == parent
    points = mlflow_server.points(by_stage["pretrain"].info.run_id, "loss/total")
    assert points == [(s, float(s)) for s in range(156)]
    assert not sync(folder, mlflow_server.uri)


def test_resume_continues_the_run_and_drops_what_was_not_sent(
    tmp_path: Path, mlflow_server: Any, wire: Any
) -> None:
    folder = tmp_path / "resumed"
    wire.set("open")
    first = opened(folder, wire.uri)
    tracker = first.stage("pretrain", params={"lr": 1})
    for step in range(10):
        tracker.metrics(step, {"loss/total": step})
    until(lambda: len(first.ids) == 2 and first._sender.known.sent == size(folder))
    wire.set("cut")
    for step in range(10, 20):  # never sent; then the job is killed
        tracker.metrics(step, {"loss/total": step})
    first._sender.close(0.0)
    first._sender.join()
    killed = mlflow_server.client.get_run(first.ids["pretrain"])
    assert killed.info.status == "RUNNING"

    wire.set("open")
    with opened(folder, wire.uri) as second:
        tracker = second.stage("pretrain", params={"lr": 2})
        tracker.resume(8)
        for step in range(8, 12):
            tracker.metrics(step, {"loss/total": 100.0 + step})
        ids = second.ids
    assert first.ids.items() <= {**ids, **second.ids}.items()  # the same runs
    run = mlflow_server.client.get_run(second.ids["pretrain"])
    assert (run.info.status, run.data.tags["attempt"]) == ("FINISHED", "2")
    assert run.data.params["lr"] == "1" and run.data.tags["config.changed"] == "lr: 1 -> 2"
    sent_before = [(s, float(s)) for s in range(10)]  # 8 and 9 stay: MLflow takes nothing back
    sent_after = [(s, 100.0 + s) for s in range(8, 12)]
    points = mlflow_server.points(run.info.run_id, "loss/total")
    assert points == sorted(sent_before + sent_after)
    assert mlflow_server.points(run.info.run_id, "data/attempt") == [(8, 2.0)]
    assert list(tracker.journal.steps("pretrain")) == list(range(12))


def size(folder: Path) -> int:
    return (folder / "metrics.jsonl").stat().st_size


def test_a_worker_on_another_machine_reports_to_the_same_run(
    tmp_path: Path, mlflow_server: Any
) -> None:
    pipeline = opened(tmp_path / "there", mlflow_server.uri)
    pipeline.stage("pretrain")
    until(lambda: len(pipeline.ids) == 2)
    known = pipeline.worker_settings("pretrain")
    without_id = TrackSettings(**{**vars(known), "run_id": "", "pipeline_run_id": ""})
    for i, worker in enumerate((known, without_id)):
        elsewhere = TrackSettings(**{**vars(worker), "run_folder": str(tmp_path / f"node{i}")})
        tracker = tracker_from(elsewhere)
        tracker.resume(0)
        tracker.metrics(i, {"loss/total": 7.0})
        tracker.headline(i, {"loss/total": 7.0})
        tracker.close()
    pipeline.close()
    assert mlflow_server.points(pipeline.ids["pretrain"], "loss/total") == [(0, 7.0), (1, 7.0)]
    assert mlflow_server.points(pipeline.ids["pipeline"], "loss/total") == [(0, 7.0), (1, 7.0)]


def test_two_processes_of_one_folder_send_once(tmp_path: Path, mlflow_server: Any) -> None:
    pipeline = opened(tmp_path / "shared", mlflow_server.uri)
    pipeline.stage("pretrain")
    worker = tracker_from(pipeline.worker_settings("pretrain"))
    for step in range(50):
        worker.metrics(step, {"loss/total": step})
        worker.picture("crops", step, np.zeros((4, 4, 3), np.uint8)) if step == 9 else None
    worker.close()  # the driver holds the lock and sends
    pipeline.close("KILLED")
    run_id = pipeline.ids["pretrain"]
    assert len(mlflow_server.points(run_id, "loss/total")) == 50
    assert len(mlflow_server.client.list_artifacts(run_id, "images")) == 2  # full and thumbnail
    assert mlflow_server.client.get_run(run_id).info.status == "KILLED"


def test_what_the_server_refuses_does_not_block_the_rest(
    tmp_path: Path, mlflow_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path / "refused", mlflow_server.uri) as pipeline:
        tracker = pipeline.stage("pretrain")
        tracker._write(dataset={"name": "", "digest": "", "source": "", "context": "", "images": 0})
        tracker._write(artifact={"file": "gone.txt", "folder": ""})
        tracker._write(something_new={})
        tracker.metrics(0, {"loss/total": 1.0})
    assert mlflow_server.points(pipeline.ids["pretrain"], "loss/total") == [(0, 1.0)]
    assert "not sent to MLflow: artifact of pretrain" in caplog.text


def test_an_exception_ends_the_runs_as_failed(tmp_path: Path, mlflow_server: Any) -> None:
    with pytest.raises(RuntimeError), opened(tmp_path / "fails", mlflow_server.uri) as pipeline:
        pipeline.stage("pretrain")
        raise RuntimeError
    runs = [mlflow_server.client.get_run(run_id) for run_id in pipeline.ids.values()]
    assert [run.info.status for run in runs] == ["FAILED", "FAILED"]


@pytest.mark.slow
def test_a_killed_and_restarted_server_has_every_point(tmp_path: Path, mlflow_server: Any) -> None:
    pipeline = opened(tmp_path / "killed", mlflow_server.uri)
    tracker = pipeline.stage("pretrain")
    until(lambda: "pretrain" in pipeline.ids)
    for step in range(600):
        tracker.metrics(step, {"loss/total": step})
        time.sleep(0.002)
        if step == 100:
            mlflow_server.kill()
        if step == 300:
            mlflow_server.restart()
    pipeline.close(timeout=120.0)
    expected = [(step, float(step)) for step in range(600)]
    assert mlflow_server.points(pipeline.ids["pretrain"], "loss/total") == expected
    sync(tmp_path / "killed", mlflow_server.uri, again=True)
    assert mlflow_server.points(pipeline.ids["pretrain"], "loss/total") == expected


def test_which_errors_are_tried_again() -> None:
    import requests
    from mlflow.exceptions import MlflowException, RestException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

    again = [
        MlflowException("API request to http://x failed with exception …"),
        MlflowException("403", error_code=PERMISSION_DENIED),
        RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": ""}),
        RestException({"error_code": "REQUEST_LIMIT_EXCEEDED", "message": ""}),
        requests.HTTPError("502"),
        requests.ConnectTimeout(),
        ConnectionResetError(),
        TimeoutError(),
        NotReadyError(),
    ]
    assert not any(map(is_final, again))
    final = [
        RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": ""}),
        RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": ""}),
        FileNotFoundError("report.html"),
        ValueError("bad key"),
        ImportError("cannot import name"),  # one bug must not hold up all that follows
    ]
    assert all(map(is_final, final))


def test_known_traps_are_explained() -> None:
    assert "--allowed-hosts" in explain(RuntimeError("403 … Invalid Host header - possible DNS"))
    refused = "exception HTTPConnectionPool(…): [Errno 111] Connection refused'))"
    assert explain(RuntimeError(refused)) == "Connection refused"
    assert explain(TimeoutError()) == "TimeoutError"
