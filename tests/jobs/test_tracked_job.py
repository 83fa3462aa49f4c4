"""A whole chain as MLflow's own client reads it: the pipeline's page, and every point of the
journal less the zeros before the first other value.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.conftest import runner

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ARGUMENTS = ("track.enabled=true", "track.experiment=pages", "track.register=pages-test")


@pytest.fixture(scope="module")
def folder(
    recipe: Path,
    images: Path,
    cluster_environment: dict[str, str],
    started_server: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The run folder of a chain."""
    place = tmp_path_factory.mktemp("pages")
    run = runner(cluster_environment | {"MLFLOW_TRACKING_URI": started_server.uri})
    command = [
        *(recipe, f"data.source={images}/train", f"evaluate.queries={images}/test"),
        *(f"run.folder={place}", "run.name=first", *ARGUMENTS),
    ]
    shown = run("run", *command)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "viewStateShareKey=raydino" in shown.stdout + shown.stderr
    return place / "first"


def expected(folder: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Points by run and metric: those that are to be sent, without all but one leading zero."""
    points: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        for name, value in event.get("metrics", {}).items():
            if event.get("send", True):
                number = math.nan if value is None else value
                points[event.get("to", event["run"]), name].append((event["step"], number))
    for key, rows in points.items():
        while len(rows) > 1 and rows[0][1] == rows[1][1] == 0:
            rows.pop(0)
        points[key] = [] if rows[0][1] == 0 and len(rows) == 1 else rows
    return points


def test_mlflow_has_the_journal_less_its_leading_zeros(folder: Path, mlflow_server: Any) -> None:
    runs = mlflow_server.runs("pages", "first")
    points = expected(folder)
    flat = {name for (run, name), rows in points.items() if run == "pretrain" and not rows}
    assert {"health/nonfinite_steps", "data/storage_retries"} <= flat
    for (run, name), rows in points.items():
        there = mlflow_server.points(runs[run].info.run_id, name)
        assert repr(there) == repr(sorted(rows)), (run, name)
    shown = set(runs["pretrain"].data.metrics)
    assert not flat & shown and not {"data/images_seen", "data/pass"} & shown
    for stage in ("pretrain", "pipeline"):  # MLflow orders the charts of a run by these
        sections = {name.partition("/")[0] for name in runs[stage].data.metrics}
        assert sorted(sections)[:3] == ["eval", "health", "loss"]


def test_the_page_of_the_pipeline(folder: Path, images: Path, mlflow_server: Any) -> None:
    client, runs = mlflow_server.client, mlflow_server.runs("pages", "first")
    run = runs["pipeline"]
    params, tags = run.data.params, run.data.tags
    eight = ("network", "image size", "steps", "batch", "rate", "images", "curation", "seed")
    assert set(eight) == {name for name in params if not name.startswith("yaml/")}
    assert params["yaml/optim.global_batch_size"] == params["batch"]
    assert not [name for name in params if name.startswith(("yaml/run.", "yaml/track."))]
    verdict = json.loads((folder / "evaluate" / "card.json").read_text())["verdict"]
    note = tags["mlflow.note.content"]
    assert note.startswith(verdict["text"]) and "| what" in note and "* **pretrain** " in note
    assert tags["status"] == "finished" and tags["has_labels"] == "true"
    assert (
        tags["verdict"] in ("good", "bad", "open") and tags["mlflow.source.name"] == "jobs/run.py"
    )
    names = {one.dataset.name for one in run.inputs.dataset_inputs}
    assert f"{images.name}/train" in {name.removesuffix(" (curated)") for name in names}
    model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    text = model.tags["mlflow.note.content"]
    assert verdict["text"] in text and 'load_model("models:/pages-test/1")' in text
    assert model.tags["licence.code"] == "Apache-2.0" and model.tags["mlflow.source.name"]
    assert {one.dataset_name for one in model.metrics} & names  # what its scores are of
    assert len(runs["pretrain"].data.params) <= 2  # MLflow prints them above every picture
    files = [one.path for one in client.list_artifacts(runs["pretrain"].info.run_id, "images")]
    assert any("first and last step~" in file for file in files)
