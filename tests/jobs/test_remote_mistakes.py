"""Remote places that cannot be used: exit code 2 and one sentence, before Ray is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.conftest import runner
from tests.s3 import S3

BUCKET = "mistakes"
Ended = Callable[..., "Any"]


@pytest.fixture
def without_ray(s3: S3, environment: dict[str, str], tmp_path: Path, images: Path) -> Ended:
    """Runs a job in a world where S3 is there and importing Ray is an error."""
    s3.make(BUCKET)
    for path in sorted((images / "train" / "red").glob("0*.png")):
        s3.client().upload_file(str(path), BUCKET, f"photos/red/{path.name}")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise RuntimeError('this job needs no Ray')\n")
    found = environment | {"PYTHONPATH": str(tmp_path), "RAYDINO_HOME": str(tmp_path / "home")}

    def run(*arguments: object, **changes: str) -> Any:
        return runner(found | s3.environment() | changes)(*arguments)

    return run


def said(job: Any) -> tuple[str, str]:
    """What and hint of a job that ended with a mistake, after its first lines."""
    assert job.returncode == 2, job.stdout + job.stderr
    assert "Traceback" not in job.stderr
    lines = job.stderr.strip().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    assert len(lines) - at == 2, job.stderr  # the sentence, and what to do
    return lines[at].removeprefix("error: "), lines[at + 1].strip()


PLACES = ["run.folder", "data.source", "data.shards"]


def arguments(recipe: Path, place: str, uri: str, folder: Path) -> list[object]:
    name = "run" if place == "run.folder" else "pack" if place == "data.source" else "pretrain"
    rest = [f"run.folder={folder / 'runs'}"] * (place != "run.folder")
    rest += ["data.shards=shards/"] * (place == "data.source")
    rest += [f"data.source=s3://{BUCKET}/photos"] * (place == "run.folder")
    return [name, recipe, f"{place}={uri}", *rest]


@pytest.mark.parametrize("place", PLACES)
def test_wrong_keys(place: str, without_ray: Ended, s3: S3, recipe: Path, tmp_path: Path) -> None:
    s3.check_keys = True
    job = without_ray(
        *arguments(recipe, place, f"s3://{BUCKET}/x", tmp_path), AWS_ACCESS_KEY_ID="stranger"
    )
    what, hint = said(job)
    assert "was refused: access denied" in what
    first = (
        "photos" if place == "run.folder" else "x"
    )  # sources are looked up before the run folder
    assert f"{BUCKET}/{first}" in what
    assert "AWS_ACCESS_KEY_ID" in hint


@pytest.mark.parametrize("place", PLACES)
def test_nobody_answers(
    place: str, without_ray: Ended, s3: S3, recipe: Path, tmp_path: Path
) -> None:
    job = without_ray(
        *arguments(recipe, place, f"s3://{BUCKET}/x", tmp_path),
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
    )
    what, hint = said(job)
    assert "failed 3 times: Could not connect to server" in what
    assert "AWS_ENDPOINT_URL" in hint


def test_no_such_bucket(without_ray: Ended, recipe: Path, tmp_path: Path) -> None:
    job = without_ray(*arguments(recipe, "run.folder", "s3://nobody-made-this/runs", tmp_path))
    what, _ = said(job)
    assert "there is no such bucket" in what
    assert "nobody-made-this" in what


def test_a_run_folder_that_may_only_be_read(
    without_ray: Ended, s3: S3, recipe: Path, tmp_path: Path
) -> None:
    with s3.broken("^(PUT|POST) /mistakes/runs", 403, times=1000):
        job = without_ray(*arguments(recipe, "run.folder", f"s3://{BUCKET}/runs", tmp_path))
    what, _ = said(job)
    assert what.startswith(f"writing {BUCKET}/runs/tiny/config.yaml was refused")


def test_a_dry_run_sees_the_remote_run_and_writes_nothing(
    without_ray: Ended, s3: S3, recipe: Path
) -> None:
    before = s3.objects(BUCKET)
    job = without_ray(
        "run",
        recipe,
        f"data.source=s3://{BUCKET}/photos",
        f"run.folder=s3://{BUCKET}/runs",
        "train.workers=1",
        "optim.global_batch_size=2",
        "--dry-run",
    )
    assert job.returncode == 0, job.stderr
    assert f"tiny in s3://{BUCKET}/runs/tiny (dry run" in job.stdout + job.stderr
    assert "about 10 images" in job.stdout + job.stderr
    assert s3.objects(BUCKET) == before


def test_a_dry_run_says_that_a_run_folder_may_only_be_read(
    without_ray: Ended, s3: S3, recipe: Path, tmp_path: Path
) -> None:
    given = arguments(recipe, "run.folder", f"s3://{BUCKET}", tmp_path)  # the bucket is there
    with s3.broken("^(PUT|POST) /mistakes/[.]", 403, times=1000):
        job = without_ray(*given, "--dry-run")
    what, _ = said(job)
    assert what.startswith(f"writing {BUCKET}/.") and "was refused" in what
