"""A key in a URI is never shown: not in errors, lines, params or the report of any stage."""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import log
from pipeline.errors import DataError, PipelineError, StorageError, last_line, one_line
from pipeline.track.report import Text, write_report
from tests.jobs.conftest import runner
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


@pytest.fixture
def jobs(s3: S3, environment: dict[str, str], tmp_path: Path, images: Path) -> Callable[..., Any]:
    s3.make(BUCKET)
    for path in sorted((images / "train" / "red").glob("*.png")):
        s3.client().upload_file(str(path), BUCKET, f"photos/red/{path.name}")
    files = [path.read_bytes() for path in sorted((images / "train" / "red").glob("*.png"))]
    pq.write_table(pa.table({"image": files}), tmp_path / "part.parquet", row_group_size=20)
    s3.client().upload_file(str(tmp_path / "part.parquet"), BUCKET, "shards/part.parquet")
    return runner(environment | {"RAYDINO_HOME": str(tmp_path / "home")})


@pytest.mark.parametrize(
    ("job", "place", "ends"),
    [
        ("pack", "data.source={photos}", 0),
        ("pretrain", "data.shards={none}", 2),
        ("pretrain", "data.shards={photos}", 2),
        ("run", "data.source={photos}", 0),
        ("pretrain", "data.shards={shards}", 0),
        ("doctor", "data.shards={shards}", 0),
        ("doctor", "data.shards={none}", 2),
        ("doctor", "data.shards={photos}", 2),
    ],
)
def test_dry_runs_and_the_doctor(
    job: str, place: str, ends: int, jobs: Callable[..., Any], s3: S3, recipe: Path, tmp_path: Path
) -> None:
    places = {"photos": s3.uri(f"{BUCKET}/photos"), "none": s3.uri(f"{BUCKET}/none")}
    places["shards"] = s3.uri(f"{BUCKET}/shards")
    rest = ["--dry-run"] * (job != "doctor") + [f"data.shards={tmp_path}/s"] * (job == "pack")
    done = jobs(job, recipe, place.format(**places), f"run.folder={tmp_path}/runs", *rest)
    assert done.returncode == ends, done.stdout + done.stderr
    shown = done.stdout + done.stderr
    assert BUCKET in shown or (ends == 0 and job in ("run", "pretrain"))  # these name the folder
    assert KEY not in shown and SECRET not in shown
