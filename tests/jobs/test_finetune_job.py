"""jobs/finetune.py as a user meets it: what it refuses, what it leaves, and a stop on the way."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from pipeline import job
from pipeline.config.load import load
from pipeline.errors import PipelineError
from pipeline.job import spelled_out
from pipeline.model.pair import BackboneSpec
from pipeline.model.weights import save_backbone
from pipeline.shards.shards import open_shards
from pipeline.stages import finetune as stage
from pipeline.storage.run_folder import RunFolder
from pipeline.track.journal import read_steps
from tests.data import encoded, noise, own_table, written
from tests.jobs.conftest import ROOT, Job, runner
from tests.jobs.running import finish, held, terminate_held

SPEC = BackboneSpec(
    image_size=28, patch_size=7, width=32, depth=2, heads=2, registers=1, layer_scale=0.1
)
SHORT = {"model": "finetune.model", "data": "data.source", "queries": "evaluate.queries"}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_backbone(SPEC.build(), SPEC, tmp_path / "weights")


def given(weights: Path, images: Path, runs: Path, *more: str) -> list[str]:
    return [
        f"model={weights}",
        f"data={images}/train",
        f"queries={images}/test",
        f"run.folder={runs}",
        "data.max_bad_fraction=0.1",
        "track.uri=none",
        *more,
    ]


def test_short_names() -> None:
    fields = spelled_out(["model=a", "data=b/", "queries=c/"], SHORT)
    config = load(fields)
    assert (config.finetune.model, config.data.source) == ("a", "b/")
    assert config.evaluate.queries == "c/"


def test_a_dry_run_opens_the_network_and_leaves_nothing(
    weights: Path, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = given(weights, images, tmp_path / "runs", "finetune.steps=30")
    job.main(["pack", "finetune"], "doc", [*arguments, "--dry-run"], SHORT)
    shown = capsys.readouterr().out
    assert f"finetune    {weights} (all weights) on at most 82 images of 28 pixels" in shown
    assert "about 30 steps; written as huggingface" in shown
    assert not (tmp_path / "runs").exists()


def test_what_is_wrong_is_said_before_anything_starts(
    weights: Path, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.png").write_bytes(encoded(noise(1)))
    for fields, what in (
        (["model=descriptor"], "descriptor cannot be fine-tuned"),
        (["model=nothing"], "there is no"),
        ([f"data={flat}"], "has no labels, and fine-tuning learns from them"),
        ([f"queries={flat}"], "has no labels, so no prediction can be checked"),
        (["data.labels=none"], "data.labels=none leaves the labels out"),
        (["finetune.epochs=2", "finetune.steps=3"], "give either epochs or steps, not both"),
        (["finetune.crop_scale=[0.8,0.2]"], "crop_scale must be low, high"),
        (["finetune.image_size=30"], "finetune.image_size=30 is not a multiple"),
        (["finetune.tune=low_rank", "finetune.rank=64"], "finetune.rank=64 is no low rank"),
    ):
        names = {field.partition("=")[0] for field in fields}
        kept = [x for x in given(weights, images, tmp_path) if x.partition("=")[0] not in names]
        with pytest.raises(SystemExit) as end:
            job.main(["pack", "finetune"], "doc", [*kept, *fields, "--dry-run"], SHORT)
        assert end.value.code == 2
        assert what in capsys.readouterr().err, fields


def test_the_key_changes_with_what_the_classifier_depends_on(weights: Path, tmp_path: Path) -> None:
    images = [encoded(noise(number)) for number in range(6)]
    written(own_table(images, [0, 1] * 3, ("a", "b")), tmp_path / "s" / "a.parquet", 4)
    folder = RunFolder.of(str(tmp_path / "runs"), "x")

    def key(*fields: str) -> str:
        config = load([f"finetune.model={weights}", f"data.shards={tmp_path}/s/a.parquet", *fields])
        return stage.key(stage.Context(config, folder))

    same = key()
    assert key("train.workers=2", "train.log_every=3", "run.name=y") == same
    for field in ("lr=1", "tune=head", "label_fraction=0.1", "from_scratch=true", "seed=4"):
        assert key(f"finetune.{field}") != same, field
    other = save_backbone(SPEC.build(), SPEC, tmp_path / "other")
    assert key(f"finetune.model={other}") != same


def test_from_a_folder_to_a_classifier_with_a_stop_on_the_way(
    weights: Path, images: Path, tmp_path: Path, cluster_environment: dict[str, str]
) -> None:
    transformers = pytest.importorskip("transformers")
    finetune: Job = runner(cluster_environment)
    runs = tmp_path / "runs"
    length = ["finetune.batch_size=16", "finetune.steps=400", "train.log_every=5"]
    arguments = given(weights, images, runs, *length, "train.workers=2", "resources.threads=1")
    process = subprocess.Popen(
        [sys.executable, ROOT / "jobs" / "finetune.py", *arguments],
        env=cluster_environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    checkpoints = runs / "finetune" / "finetune" / "checkpoints"
    while not list(checkpoints.glob("step-*")):  # at step 20; a line on the console comes later
        assert process.poll() is None, finish(process)[1]
        time.sleep(0.01)
    with held(2):
        console = terminate_held(process)
    code, rest = finish(process)
    console += rest
    assert code == 143, console
    stopped = re.search(r"stopped     at step (\d+)", console)
    assert stopped, console
    assert "80 images of 2 classes to train on, 20 to score" in console

    changed = finetune("finetune", *arguments, "finetune.lr=1e-3")
    assert changed.returncode == 2
    assert "finetune.lr: 0.0005 -> 0.001" in changed.stderr

    shown = finetune("finetune", *arguments)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert f"resumed     from the checkpoint at step {stopped[1]}" in shown.stdout
    said = "fine-tuned (all weights) 1.000 ± 0.050 on 20 images; majority class 0.500"
    assert f"finetune    {said}" in shown.stdout, shown.stdout
    run = runs / "finetune"
    folder = run / "finetune" / "huggingface"
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert model.config.id2label == {0: "green", 1: "red"}
    processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    from PIL import Image

    for name, number in (("green", 0), ("red", 1)):
        picture = Image.open(images / "test" / name / "03.png")
        inputs = processor(picture, return_tensors="pt")
        with torch.no_grad():
            assert int(model(**inputs).logits.argmax()) == number
    steps = read_steps(run / "metrics.jsonl", "finetune")
    assert [step for step, row in steps.items() if "loss/finetune" in row] == list(range(400))
    assert steps[400]["eval/finetune_top1"] == 1.0
    assert steps[400]["eval/finetune_top1_majority"] == 0.5

    again = finetune("finetune", *arguments)
    assert "finetune    up to date" in again.stdout
    assert open_shards(str(run / "shards")).rows == 80


def test_a_damaged_image_is_left_out_and_listed(
    weights: Path, tmp_path: Path, cluster_environment: dict[str, str]
) -> None:
    images = [encoded(noise(number)) for number in range(40)]
    table = own_table(images, [0, 1] * 20, ("a", "b"))
    damaged = [b"another file" if row == 7 else image for row, image in enumerate(images)]
    ids = table.column("image_id").to_pylist()
    shards = tmp_path / "s" / "a.parquet"
    written(own_table(damaged, [0, 1] * 20, ("a", "b"), image_id=ids), shards, 8)
    finetune: Job = runner(cluster_environment)
    fields = [f"finetune.model={weights}", f"data.shards={shards}", f"run.folder={tmp_path}/runs"]
    fields += ["track.uri=none", "finetune.steps=4", "finetune.batch_size=16", "train.workers=1"]
    fields += ["finetune.tune=low_rank", "data.max_bad_fraction=0.1"]
    shown = finetune("finetune", *fields)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "fine-tuned (low-rank)" in shown.stdout
    assert "1 image could not be decoded, listed in finetune/bad.parquet" in shown.stdout
    listed = pq.read_table(tmp_path / "runs" / "finetune" / "finetune" / "bad.parquet")
    assert listed.column("image_id").to_pylist() == [ids[7]]
    assert listed.column("reason").to_pylist() == ["damaged"]


def test_without_labels_a_set_is_refused(weights: Path, tmp_path: Path) -> None:
    shards = tmp_path / "s" / "a.parquet"
    written(own_table([encoded(noise(1))]), shards, 8)
    config = load([f"finetune.model={weights}", f"data.shards={shards}"])
    folder = RunFolder.of(str(tmp_path), "x")
    with pytest.raises(PipelineError, match="labelled images of 0 classes"):
        stage.run(stage.Context(config, folder), None)
