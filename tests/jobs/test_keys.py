"""Keys and passwords come from the environment and are never shown or written."""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from pipeline import log
from pipeline.errors import DataError, PipelineError, StorageError, last_line, one_line
from pipeline.job import main
from pipeline.report.page import Text, write_report
from tests.jobs.conftest import ROOT
from tests.s3 import KEY, S3, SECRET

BUCKET = "keys"
URI = "s3://AKIDEXAMPLE:hush%2Fhush@bucket/shards"
HIDDEN = "AKIDEXAMPLE", "hush"


def clean(text: str) -> bool:
    return "s3://bucket/shards" in text and not any(word in text for word in HIDDEN)


@pytest.mark.parametrize("kind", [PipelineError, DataError, StorageError])
def test_errors(kind: type[PipelineError]) -> None:
    error = kind(f"{URI} is empty", f"pack it: data.shards={URI}")
    for text in (str(error), repr(error), error.what, error.hint, one_line(error)):
        assert clean(text)
    assert clean(str(pickle.loads(pickle.dumps(error))))
    assert clean(last_line(ValueError(f"no {URI}"))) and clean(one_line(OSError(f"no {URI}")))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_lines(elsewhere: bool, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    log.configure("[w1]", handler=logging.StreamHandler(stream) if elsewhere else None)
    logging.getLogger("pipeline.x").warning("changed     data.shards: %s -> %s", URI, URI)
    text = stream.getvalue() if elsewhere else capsys.readouterr().out
    assert clean(text) and text.count("s3://bucket/shards") == 2


def test_the_report(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", f"of {URI}", [Text("data", f"from {URI}")], URI)
    assert clean((tmp_path / "report.html").read_text())


@pytest.mark.parametrize(
    "job", ["pack", "curate", "pretrain", "evaluate", "export", "run", "doctor"]
)
@pytest.mark.parametrize(
    "given",
    ["data.source={}/photos", "data.shards={}/shards", "run.folder={}/runs", "track.uri={}"],
)
def test_a_key_on_the_command_line_is_refused(
    job: str, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would be in the list of processes and jobs, in the run folder and in MLflow."""
    with pytest.raises(SystemExit) as ended:
        main([job], "", [given.format("s3://AKIDEXAMPLE:hush%2Fhush@bucket")])
    said = "".join(capsys.readouterr())
    assert ended.value.code == 2
    assert f"{given.split('=')[0]}: s3://bucket" in said and "AWS_SECRET_ACCESS_KEY" in said
    assert not any(word in said for word in HIDDEN)


@pytest.mark.slow
def test_secrets_of_the_environment_stay_there(
    s3: S3, environment: dict[str, str], tmp_path: Path, images: Path, recipe: Path
) -> None:
    """Not in what a job prints or writes, nor in the command line of any of its processes."""
    s3.make(BUCKET)
    for path in sorted((images / "train" / "red").glob("*.png")):
        s3.client().upload_file(str(path), BUCKET, f"photos/red/{path.name}")
    password = "hush-hush-hush"
    secrets = {KEY, SECRET, password}
    job = subprocess.Popen(
        [sys.executable, ROOT / "jobs" / "pack.py", recipe, f"data.source=s3://{BUCKET}/photos"]
        + [f"run.folder={tmp_path}/runs", "track.enabled=true"],
        env=environment
        | s3.environment()
        | {"MLFLOW_TRACKING_URI": f"http://ann:{password}@127.0.0.1:9"}
        | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen: set[str] = set()

    def look() -> None:
        while job.poll() is None:
            with contextlib.suppress(psutil.Error):
                for process in psutil.Process(job.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        seen.add(" ".join(process.cmdline()))
            time.sleep(0.1)

    looking = threading.Thread(target=look)
    looking.start()
    said, _ = job.communicate(timeout=280)
    looking.join()
    assert job.returncode == 0, said
    assert any("raylet" in line for line in seen)
    assert "MLflow at http://127.0.0.1:9 does not answer" in said
    for text in (said, *seen):
        assert not [secret for secret in secrets if secret in text]
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "track.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path
        mode = path.stat().st_mode
        assert not mode & 0o022 and not mode & 0o111, f"{path}: {mode:o}"  # no one else writes
