"""The chain with everything at s3:// URIs: stopped, gone on with elsewhere, and finished."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.storage.places import PART_TRIES
from pipeline.track.journal import read_steps
from tests.jobs.conftest import ROOT, runner
from tests.jobs.running import finish, held, terminate_held
from tests.s3 import S3
from tests.tiny import STEPS

pytestmark = pytest.mark.timeout(900)  # seconds; under a minute where nobody else works
BUCKET = "chain"


@pytest.fixture
def bucket(s3: S3, images: Path) -> str:
    """A bucket with the images at `photos/train` and `photos/test`."""
    s3.make(BUCKET)
    client = s3.client()
    for path in sorted(images.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), BUCKET, f"photos/{path.relative_to(images)}")
    return BUCKET


def arguments(recipe: Path) -> list[str]:
    return [
        str(recipe),
        f"data.source=s3://{BUCKET}/photos/train",
        f"evaluate.queries=s3://{BUCKET}/photos/test",
        f"data.shards=s3://{BUCKET}/shards",
        f"run.folder=s3://{BUCKET}/runs",
        "train.workers=1",
    ]


def test_a_run_in_a_bucket_goes_on_elsewhere(
    s3: S3, bucket: str, recipe: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    here = environment | s3.environment() | {"RAYDINO_HOME": str(tmp_path / "here")}
    command = [sys.executable, str(ROOT / "jobs" / "run.py"), *arguments(recipe)]
    # storage that fails now and then, while it is read and while it is written
    with (
        s3.broken(r"^GET /chain/shards/part", 503, skip=2, times=2) as read,
        s3.broken(
            r"^PUT /chain/runs/tiny/checkpoints", "reset", skip=1, times=PART_TRIES
        ) as written,
    ):
        job = subprocess.Popen(
            command, env=here, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        first = "runs/tiny/checkpoints/step-00000010/meta.json"
        deadline = time.monotonic() + 400
        while first not in s3.objects(BUCKET) and job.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert job.poll() is None, finish(job)[1]
        with held(1):  # the steps that are left take a second or two
            said = terminate_held(job)
        code, rest = finish(job)
        said += rest
    assert code == 143, said
    assert read.done == 2, said
    assert written.done == PART_TRIES, said
    assert f"in s3://{BUCKET}/runs/tiny" in said
    stopped = objects(s3)
    assert {"config.yaml", "plan.yaml", "metrics.jsonl", "pack/_done.json"} <= stopped.keys()
    assert "pretrain/_done.json" not in stopped
    steps = sorted(name.split("/")[1] for name in stopped if name.endswith("meta.json"))
    resumed = int(steps[-1].removeprefix("step-"))
    assert 10 <= resumed < STEPS

    # another machine, which has only the bucket
    there = runner(environment | s3.environment() | {"RAYDINO_HOME": str(tmp_path / "there")})
    done = there("run", *arguments(recipe))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumed     from the checkpoint at step {resumed}" in done.stdout + done.stderr
    assert "pack        up to date" in done.stdout + done.stderr
    check_contract(s3, tmp_path, resumed)

    # a third one finds nothing to do, and starts no Ray for that
    (tmp_path / "trap" / "ray").mkdir(parents=True)
    (tmp_path / "trap" / "ray" / "__init__.py").write_text("raise RuntimeError('no Ray')\n")
    changes = {"RAYDINO_HOME": str(tmp_path / "third"), "PYTHONPATH": str(tmp_path / "trap")}
    idle = runner(environment | s3.environment() | changes)("run", *arguments(recipe))
    assert idle.returncode == 0, idle.stderr
    assert (idle.stdout + idle.stderr).count("up to date") == 4


def check_contract(s3: S3, folder: Path, stopped: int) -> None:
    """The run folder in the bucket is what the design says."""
    found = objects(s3)
    assert {"plan.yaml", "config.yaml", "metrics.jsonl", "report.html"} <= found.keys()
    for stage in ("pack", "pretrain", "evaluate", "export"):
        assert set(json.loads(get(s3, f"{stage}/_done.json"))) == {"key", "result"}
    assert yaml.safe_load(get(s3, "plan.yaml"))["steps"] == STEPS
    assert b"<html" in get(s3, "report.html")
    for name in ("dinov2", "huggingface", "timm"):
        assert found[f"weights/{name}/model.safetensors"] > 1000
    assert any(name.startswith("pictures/pretrain/crops") for name in found)
    assert any(name.startswith("pictures/evaluate/") for name in found)
    assert not [name for name in found if any(p.startswith(".") for p in name.split("/"))]
    # every step once, as each left it
    (folder / "metrics.jsonl").write_bytes(get(s3, "metrics.jsonl"))
    rows = read_steps(folder / "metrics.jsonl", "pretrain")
    steps = [step for step, row in rows.items() if "loss/total" in row]
    assert steps == list(range(STEPS))
    # the checkpoint that failed at first: a thread tried it again, until the next one at the latest
    assert rows[stopped - 1]["data/storage_retries"] >= 1
    assert json.loads(get(s3, "pretrain/_done.json"))["result"]["status"] == "finished"
    # checkpoints: the newest ones and the best, each with all files
    folders = {name.split("/")[1] for name in found if name.startswith("checkpoints/step-")}
    assert f"step-{STEPS:08d}" in folders
    assert len(folders) <= 4
    for name in folders:
        meta = json.loads(get(s3, f"checkpoints/{name}/meta.json"))
        sizes = {file: said["bytes"] for file, said in meta["files"].items()}
        assert sizes.keys() == {"index.json", "rank-00000.safetensors"}
        assert all(found[f"checkpoints/{name}/{file}"] == size for file, size in sizes.items())
    assert json.loads(get(s3, "checkpoints/best.json"))["step"] in (0, 20, STEPS)
    bad = pq.read_table(io.BytesIO(get(s3, "pack/bad_images_train.parquet"))).to_pylist()
    assert [(row["source"], row["reason"]) for row in bad] == [("red/broken.png", "not_an_image")]
    shards = s3.objects(BUCKET, "shards/")
    assert "shards/_manifest.json" in shards
    manifest = json.loads(s3.read(BUCKET, "shards/_manifest.json"))
    assert manifest["images"] == 80
    for file in manifest["files"]:
        assert shards[f"shards/{file['name']}"] == file["bytes"]


def objects(s3: S3) -> dict[str, int]:
    """Objects of the run folder; markers of folders left out."""
    prefix = "runs/tiny/"
    return {
        name.removeprefix(prefix): size
        for name, size in s3.objects(BUCKET, prefix).items()
        if not name.endswith("/")
    }


def get(s3: S3, name: str) -> bytes:
    return s3.read(BUCKET, f"runs/tiny/{name}")
