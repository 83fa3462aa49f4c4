"""Checkpoints in a bucket: whole or not there, whatever request fails."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline.config.config import Config
from pipeline.errors import PipelineError, StorageError, TrainError
from pipeline.storage import places as storage
from pipeline.storage import retry
from pipeline.train.checkpoint import state
from pipeline.train.checkpoint.best import Best, write_best
from pipeline.train.start import checkpoint_at, starting_pair
from tests.s3 import S3

FILES = ["index.json", "meta.json", "rank-00000.safetensors"]
META = {"config": {"run": {"seed": 0}}}
RUN = "s3://checks/runs/a"
FOLDER = f"{RUN}/checkpoints"


@pytest.fixture(autouse=True)
def bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr(storage, "PART_TRIES", 1)
    s3.make("checks")
    for name in s3.objects("checks"):
        s3.client().delete_object(Bucket="checks", Key=name)
    return s3


def small(value: float = 1.0) -> dict[str, Any]:
    return {"teacher": {"w": torch.full((3, 2), value)}, "objective": {"n": 1}}


def steps() -> list[int]:
    return [saved.step for saved in state.checkpoints(FOLDER)]


def names(s3: S3) -> list[str]:
    prefix = "runs/a/checkpoints/"
    objects = (n.removeprefix(prefix) for n in s3.objects("checks", prefix))
    return sorted(n for n in objects if n and not n.endswith("/"))


def test_what_goes_in_comes_out(bucket: S3) -> None:
    saved = state.save(FOLDER, 1200, small(2.5), META)
    assert names(bucket) == [f"step-00001200/{file}" for file in FILES]
    newest = state.latest(FOLDER)
    assert newest == saved
    assert newest.path == f"{FOLDER}/step-00001200"
    assert torch.equal(newest.load()["teacher"]["w"], torch.full((3, 2), 2.5))
    assert torch.equal(newest.teacher()["w"], torch.full((3, 2), 2.5))
    # the object is what safetensors itself reads
    content = bucket.read("checks", f"runs/a/checkpoints/step-00001200/{FILES[-1]}")
    assert torch.equal(safetensors.torch.load(content)["teacher/w"], torch.full((3, 2), 2.5))


def test_no_checkpoint_is_none(bucket: S3) -> None:
    assert state.checkpoints(FOLDER) == []
    assert state.latest(FOLDER) is None
    assert state.best(FOLDER) is None
    assert checkpoint_at(RUN) is None
    state.prune(FOLDER, 2, set())


WRITES = ["POST .*rank-00000.*uploads", "PUT .*rank-00000", "POST .*rank-00000.*uploadId"]
WRITES += ["POST .*index.json.uploads", "PUT .*index.json", "POST .*index.json.uploadId"]
WRITES += ["POST .*meta.json.uploads", "PUT .*meta.json", "POST .*meta.json.uploadId"]


@pytest.mark.parametrize("where", WRITES)
def test_a_failing_upload_leaves_the_older_ones(bucket: S3, where: str) -> None:
    state.save(FOLDER, 10, small(1), META)
    with bucket.broken(where, 503, times=1000), pytest.raises(OSError, match="failed 4 times"):
        state.save(FOLDER, 20, small(2), META)
    assert steps() == [10]
    assert torch.equal(state.latest(FOLDER).load()["teacher"]["w"], torch.full((3, 2), 1.0))  # type: ignore[union-attr]
    # what is left of it goes when the next one is there
    state.save(FOLDER, 30, small(3), META)
    state.prune(FOLDER, 2, set())
    assert steps() == [10, 30]
    assert not [name for name in names(bucket) if "step-00000020" in name]


@pytest.mark.parametrize("where", WRITES)
def test_one_failing_request_does_not_matter(bucket: S3, where: str) -> None:
    with bucket.broken(where, "reset") as fault:
        state.save(FOLDER, 10, small(1), META)
    assert fault.done == 1
    assert steps() == [10]


def test_the_same_step_again_is_the_new_one_or_none(bucket: S3) -> None:
    state.save(FOLDER, 10, small(1), META)
    state.save(FOLDER, 20, small(1), META)
    with bucket.broken("PUT .*rank-00000", 503, times=1000), pytest.raises(OSError, match="failed"):
        state.save(FOLDER, 20, small(2), META)
    assert steps() == [10]  # old tensors under a new meta.json would be worse
    state.save(FOLDER, 20, small(3), META)
    assert float(state.latest(FOLDER).load()["teacher"]["w"][0, 0]) == 3.0  # type: ignore[union-attr]


def test_a_cut_checkpoint_and_another_version(bucket: S3) -> None:
    state.save(FOLDER, 10, small(1), META)
    state.save(FOLDER, 20, small(2), META)
    name = "runs/a/checkpoints/step-00000020/"
    bucket.client().put_object(Bucket="checks", Key=f"{name}{FILES[-1]}", Body=b"short")
    assert steps() == [10]
    meta = json.loads(bucket.read("checks", f"{name}meta.json")) | {"version": 1}
    bucket.client().put_object(Bucket="checks", Key=f"{name}meta.json", Body=json.dumps(meta))
    with pytest.raises(TrainError, match="has version 1, expected"):
        state.latest(FOLDER)


def test_the_right_ones_are_kept(bucket: S3) -> None:
    for step in (10, 20, 30, 40, 50):
        state.save(FOLDER, step, small(step), META)
    write_best(FOLDER, Best(20, 0.5))
    state.prune(FOLDER, 2, {10})
    assert steps() == [10, 20, 40, 50]
    best = state.best(FOLDER)
    assert best
    assert (best[0].step, best[1].score) == (20, 0.5)


def test_a_removal_that_breaks_off_leaves_no_half_checkpoint(bucket: S3) -> None:
    for step in (10, 20):
        state.save(FOLDER, step, small(step), META)
    with (
        bucket.broken("^DELETE.*rank-00000", 403, times=1),
        pytest.raises(OSError, match="refused"),
    ):
        state.prune(FOLDER, 1, set())
    assert steps() == [20]
    state.prune(FOLDER, 1, set())
    assert names(bucket) == [f"step-00000020/{file}" for file in FILES]


def test_storage_that_is_away_is_not_an_empty_folder(bucket: S3) -> None:
    """Else a run would begin anew beside its checkpoints."""
    state.save(FOLDER, 10, small(), META)
    for where in ("^GET.*list-type", "^GET.*meta.json"):
        with bucket.broken(where, 503, times=1000), pytest.raises(StorageError):
            state.latest(FOLDER)


def test_weights_in_a_bucket_are_no_checkpoint(bucket: S3) -> None:
    plan = SimpleNamespace(
        config=Config(), init="s3://K:S@checks/weights", encoder_files={}, headless=False
    )
    with pytest.raises(PipelineError, match=r"model\.init=s3://checks/weights holds no checkpoint"):
        starting_pair(plan)  # type: ignore[arg-type]


def test_a_run_and_a_checkpoint_are_found_by_their_uris(bucket: S3) -> None:
    for step in (10, 20):
        state.save(FOLDER, step, small(step), META)
    query = f"?endpoint_override=127.0.0.1:{bucket.port}&scheme=http"
    assert checkpoint_at(RUN).step == 20  # type: ignore[union-attr]
    assert checkpoint_at(f"{FOLDER}/step-00000010").step == 10  # type: ignore[union-attr]
    assert checkpoint_at(f"{RUN}{query}").step == 20  # type: ignore[union-attr]
    one = checkpoint_at(f"{FOLDER}/step-00000010{query}")
    assert one
    assert float(one.teacher()["w"][0, 0]) == 10.0
    write_best(FOLDER, Best(10, 0.5))
    assert checkpoint_at(RUN).step == 10  # type: ignore[union-attr]
