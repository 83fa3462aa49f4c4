"""Servers that have clients write artifacts themselves, played by a client without a server."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.track.mlflow_writer import Writer
from pipeline.track.state import Known


class Client:
    """MLflow's client for a server whose artifacts are at `place`, and who may write there."""

    def __init__(self, place: str, error: Exception | None) -> None:
        self.place, self.error = place, error
        self.files: list[str] = []

    def get_run(self, run_id: str) -> Any:
        info = SimpleNamespace(artifact_uri=f"{self.place}/1/{run_id}/artifacts")
        return SimpleNamespace(info=info, data=SimpleNamespace(tags={}))

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        if self.error:
            raise self.error
        self.files.append(Path(path).name)

    def log_batch(self, run_id: str, **rows: Any) -> None:
        pass


EVENTS: list[dict[str, Any]] = [
    {"run": "pack", "artifact": {"file": "a.html", "folder": ""}},
    {"run": "pack", "table": {"file": "b.json"}},
    {"run": "pipeline", "artifact": {"file": "c.html", "folder": ""}},
]


@pytest.mark.parametrize(
    ("place", "host", "error", "said"),
    [
        ("/proc/none", "127.0.0.1", FileNotFoundError(2, "No such file"), "are not sent to MLflow"),
        ("/srv/a", "team", PermissionError(13, "Permission denied"), "are not sent to MLflow"),
        ("s3://bucket/a", "team", ImportError("No module named 'boto3'"), "are not sent to MLflow"),
        ("/srv/a", "team", None, "on this machine, and the server shows them only if"),
        ("/srv/a", "127.0.0.1", None, ""),
        ("s3://bucket/a", "team", None, ""),
        ("mlflow-artifacts:/a", "team", None, ""),
    ],
)
def test_one_warning_with_the_cause_and_what_to_set(
    place: str,
    host: str,
    error: Exception | None,
    said: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "pipeline.track")
    known = Known(experiment_id="1", runs={"pack": "abc", "pipeline": "def"})
    writer = Writer(f"http://{host}:5000", known, "key", tmp_path)
    client: Any = Client(place, error)
    writer.client = writer.runs.client = client
    for event in EVENTS:
        writer.apply([event], 0)
    assert client.files == ([] if error else ["a.html", "b.json", "c.html"])
    about_place = [line for line in caplog.messages if "artifact proxy" in line]
    assert len(about_place) == bool(said)
    if said:
        assert said in about_place[-1] and place in about_place[-1]
        assert "--artifacts-destination" in about_place[-1]
    assert len(caplog.messages) == len(about_place)
