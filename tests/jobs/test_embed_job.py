"""jobs/embed.py as a user meets it: what it says before it starts, and what it leaves."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import job
from pipeline.config.load import load
from pipeline.embed.vectors import open_vectors
from pipeline.errors import ConfigError, DataError
from pipeline.images.preprocessing import Preprocessing
from pipeline.job import spelled_out
from pipeline.model.pair import BackboneSpec
from pipeline.model.weights import save_backbone, save_huggingface
from pipeline.shards.shards import open_shards
from pipeline.stages import embed as stage
from pipeline.storage.run_folder import RunFolder
from tests.curate.images import scene, shard
from tests.data import encoded
from tests.jobs.conftest import Job, runner

SPEC = BackboneSpec(image_size=28, patch_size=7, width=32, depth=2, heads=2, registers=1)
SHORT = {"model": "embed.model", "vectors": "embed.vectors"}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_backbone(SPEC.build(), SPEC, tmp_path / "weights")


def test_short_names_of_a_job() -> None:
    words = ["a.yaml", "model=runs/a=b", "run.name=x", "model.size=vits14", "cat.jpg", "x/a=b.png"]
    assert spelled_out(words, {"model": "embed.model", "": "look.images"}) == [
        "a.yaml",
        "embed.model=runs/a=b",
        "run.name=x",
        "model.size=vits14",
        'look.images=["cat.jpg", "x/a=b.png"]',
    ]
    assert spelled_out(words, {}) == words
    config = load(spelled_out(["model=runs/a", "vectors=v"], SHORT))
    assert (config.embed.model, config.embed.vectors) == ("runs/a", "v")


def test_a_dry_run_says_images_size_and_place(
    weights: Path, tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"model={weights}", f"run.folder={tmp_path}/runs", "embed.outputs=[cls,patches]"]
    source = [f"data.source={images}/train", "data.max_bad_fraction=0.1", "--dry-run"]
    job.main(["pack", "embed"], "doc", [*given, *source], SHORT)
    shown = capsys.readouterr().out
    size = 82 * (100 + 32 * 4 + 16 * 32 * 2)
    assert f"82 images by {weights}: cls, patches of width 32" in shown
    assert f"about {size / 1024:.1f} KiB in {tmp_path}/runs/embed/vectors" in shown
    assert not (tmp_path / "runs").exists()


def test_what_is_wrong_is_said_before_anything_starts(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(tmp_path / "in" / "a.parquet", [encoded(scene(1))])
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    (tmp_path / "runs" / "empty" / "config.yaml").write_text("{}")
    (tmp_path / "file").touch()
    for fields, what in (
        (["model=empty"], "run folder without a checkpoint or weights"),
        (["model=nothing"], "there is no"),
        ([], "run embed has no checkpoint"),
        ([f"model={weights}", f"vectors={tmp_path}/file"], "embed.vectors="),
        ([f"model={weights}", "embed.outputs=[cls,cls]"], "each output once"),
        ([f"model={weights}", "embed.outputs=[]"], "embed.outputs"),
        ([f"model={weights}", "embed.outputs=[all]"], "embed.outputs"),
    ):
        given = [f"data.shards={tmp_path}/in", f"run.folder={tmp_path}/runs", *fields]
        for dry in ([], ["--dry-run"]):
            with pytest.raises(SystemExit) as ended:
                job.main(["pack", "embed"], "doc", [*given, *dry], SHORT)
            assert ended.value.code == 2 and what in capsys.readouterr().err, fields


def sixteen_bits(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    files = []
    for _ in range(20):
        pixels = rng.integers(0, 4000, (40, 40), np.uint16)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        files.append(stream.getvalue())
    shard(folder / "a.parquet", files)
    return folder


def test_values_that_the_model_never_saw(tmp_path: Path, weights: Path) -> None:
    shards = sixteen_bits(tmp_path / "deep")
    folder = RunFolder.of(str(tmp_path), "r")
    fields = [f"embed.model={weights}", f"data.shards={shards}"]
    config = load(fields)
    with pytest.raises(DataError, match="was trained with full: what it says") as error:
        stage.images_of(config, folder, stage.model_of(config, folder))
    assert "data.range=[low,high]" in error.value.hint
    config = load([*fields, "data.range=[0,4095]"])
    spec = stage.model_of(config, folder)
    assert stage.images_of(config, folder, spec).value_range == (0, 4095)
    # weights that say that they were trained so
    mean, std = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    deep = save_huggingface(
        SPEC.build(), SPEC, tmp_path / "hf", Preprocessing(28, mean, std, (0, 4000))
    )
    config = load([f"embed.model={deep}", f"data.shards={shards}"])
    spec = stage.model_of(config, folder)
    assert stage.images_of(config, folder, spec).columns.value_range == (0, 4000)
    assert spec.mean == mean
    with pytest.raises(ConfigError, match="the recipe curates nothing"):
        config = load([*fields, "embed.images=curated"])
        stage.images_of(config, folder, spec)


def test_from_a_folder_to_vectors(
    weights: Path, images: Path, tmp_path: Path, cluster_environment: dict[str, str]
) -> None:
    embed: Job = runner(cluster_environment)
    given = [f"model={weights}", f"data.source={images}/train", f"run.folder={tmp_path}/runs"]
    given += ["data.max_bad_fraction=0.1", "embed.outputs=[cls,mean]", "embed.dtype=float16"]
    given += ["track.uri=none"]
    shown = embed("embed", *given)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert f"80 images by {weights}: cls [32], mean [32]" in shown.stdout
    assert re.search(r"images/s, the model waited \d+ % of its time for images", shown.stdout)
    run = tmp_path / "runs" / "embed"
    vectors = open_vectors(str(run))
    assert vectors.rows == 80 and vectors.read("mean").shape == (80, 32)
    assert set(vectors.sources()) == {
        os.path.relpath(path, images / "train")
        for path in (images / "train").rglob("*.png")
        if path.name not in ("broken.png", "copy.png")
    }
    names = vectors.facts["class_names"]
    labels = [names[label] for label in vectors.labels()]
    assert labels == [source.partition("/")[0] for source in vectors.sources()]
    assert pq.read_table(run / "embed" / "bad.parquet").num_rows == 0
    before = {path: path.stat().st_mtime_ns for path in (run / "vectors").iterdir()}
    again = embed("embed", *given)
    assert "embed       up to date" in again.stdout
    (run / "vectors" / "part-00000.parquet").unlink()
    again = embed("embed", *given)
    assert "embed       80 images" in again.stdout
    assert {path.name for path in before} == {path.name for path in (run / "vectors").iterdir()}
    assert open_shards(str(run / "shards")).digest == vectors.facts["shards"]["digest"]
