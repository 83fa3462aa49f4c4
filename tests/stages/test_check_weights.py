"""Images that are read otherwise than those of the training of `model.init`: refused, or said."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from pipeline.adapt.derive import derive
from pipeline.adapt.facts import facts_of
from pipeline.config.config import Config
from pipeline.config.load import load
from pipeline.context import Context
from pipeline.doctor.dry_run import dry_run
from pipeline.errors import ConfigError
from pipeline.images.preprocessing import Preprocessing
from pipeline.images.value_range import FULL, ValueRange
from pipeline.model.weights import save_backbone, save_huggingface
from pipeline.plan.layout import Machine
from pipeline.plan.plan import SetFacts, resolve
from pipeline.shards.shards import open_shards
from pipeline.stages import adapt, pretrain
from pipeline.stages.checks.known_sets import known_set
from pipeline.stages.checks.weights import check_weights
from pipeline.storage.run_folder import RunFolder
from pipeline.train import build
from pipeline.train.checkpoint import state
from tests.data import encoded, hub_table, written

SMALL = [
    "augment.global_size=28",
    "augment.local_size=14",
    "augment.local_crops=2",
    "model.width=24",
    "model.depth=2",
    "model.heads=2",
    "model.in_channels=1",
    "head.prototypes=20",
    "head.bottleneck=8",
    "head.hidden=16",
    "optim.steps=10",
    "optim.global_batch_size=4",
    "track.enabled=false",
]
OWN = ["augment.mean=[0.5]", "augment.std=[0.25]"]
TWELVE_BITS = (0.0, 4095.0)
STAGES = ["pretrain", "evaluate", "export"]


def recipe(folder: Path, init: Path, *fields: str) -> Config:
    places = [f"run.folder={folder}/runs", "run.name=a", f"model.init={init}"]
    return load([*SMALL, *OWN, *places, *fields])


def run_of(path: Path, value_range: ValueRange | None, *fields: str) -> Path:
    """A run folder with one checkpoint, whose images were read with a range."""
    config = load([*SMALL, *OWN, *fields])
    machine = Machine(cpus=2, gpus=0, bfloat16=False)
    plan = resolve(config, SetFacts(100, "d", value_range=value_range), machine=machine)
    pair = build.pair(config)
    objective = build.objective(config, pair)
    tensors = {
        "student": pair.student.state_dict(),
        "teacher": pair.teacher.state_dict(),
        "objective": objective.state_dict(),
    }
    state.save(path / "checkpoints", 10, tensors, {"plan": plan.model_dump(mode="json")})
    return path


def export_of(path: Path, value_range: ValueRange, form: str = "huggingface") -> Path:
    config = load([*SMALL, *OWN])
    spec, network = build.backbone_spec(config), build.pair(config).student.backbone
    images = Preprocessing(28, (0.5,), (0.25,), value_range)
    save_huggingface(network, spec, path / "huggingface", images)
    save_backbone(network, spec, path / "dinov2")
    return path / form


def pictures(path: Path, highest: int, kind: type = np.uint16, number: int = 12) -> Path:
    """Grey images with values from 0 to `highest`."""
    path.mkdir(parents=True)
    for n in range(number):
        values = np.linspace(0, highest, 32 * 32).reshape(32, 32).astype(kind)
        (path / f"{n}.png").write_bytes(encoded(np.roll(values, n, axis=0)))
    return path


def shards_of(path: Path, source: Path) -> Path:
    path.mkdir()
    table = hub_table([file.read_bytes() for file in sorted(source.iterdir())])
    written(table, path / "a.parquet", 4)
    return path


def checked(config: Config, source: Path) -> list[str]:
    """By the files, and by a table of the same images: they must say the same."""
    folder = RunFolder.of(config.run.folder, config.run.name)
    table = source.parent / f"{source.name}.table"
    if not table.exists():
        shards_of(table, source)
    answers = []
    for images in (known_set(config, "data.source", str(source)), open_shards(str(table))):
        try:
            answers.append(check_weights(config, folder, images))
        except ConfigError as error:
            answers.append([error.what, error.hint or ""])
    assert answers[0] == answers[1]
    return answers[0]


def test_other_values_than_those_of_the_weights_are_refused(tmp_path: Path) -> None:
    bright = pictures(tmp_path / "bright", 60_000)
    places = {
        "run": run_of(tmp_path / "microscope", TWELVE_BITS),
        "checkpoint": tmp_path / "microscope" / "checkpoints" / "step-00000010",
        "export": export_of(tmp_path / "weights", TWELVE_BITS),
        "the form that says nothing, beside one that does": tmp_path / "weights" / "dinov2",
    }
    for init in places.values():
        what, hint = checked(recipe(tmp_path, init), bright)
        assert f"{init} was trained with data.range=[0,4095]" in what
        assert "read with [0,60000]" in what and "mean nothing" in what
        assert "set data.range=[0,4095]" in hint and "data.range=[0,60000]" in hint


def test_what_is_read_alike_is_not_refused(tmp_path: Path) -> None:
    init = run_of(tmp_path / "microscope", TWELVE_BITS)
    bright = pictures(tmp_path / "bright", 60_000)
    config = recipe(tmp_path, init)
    assert checked(config, pictures(tmp_path / "same", 3900)) == []  # near enough
    assert checked(config, pictures(tmp_path / "bytes", 255, np.uint8)) == []
    (said,) = checked(recipe(tmp_path, init, "data.range=[0,4095]"), bright)
    assert "use values 0 to 60000, and data.range=[0,4095] becomes 0 to 255" in said
    assert "set data.range=[0,60000] if" in said
    # what nobody says is no other range: an export without one, and 8 bits
    assert checked(recipe(tmp_path, export_of(tmp_path / "weights", FULL)), bright) == []
    assert checked(load([*SMALL, *OWN, "run.name=a"]), bright) == []


def test_whoever_names_other_values_is_told_and_not_stopped(tmp_path: Path) -> None:
    init = run_of(tmp_path / "microscope", TWELVE_BITS)
    bright = pictures(tmp_path / "bright", 60_000)
    (said,) = checked(recipe(tmp_path, init, "data.range=full"), bright)
    assert "trained with data.range=[0,4095]" in said and "with data.range=full" in said
    assert "part of a gain" in said


def test_a_run_without_a_range_may_have_seen_8_bits(tmp_path: Path) -> None:
    init = run_of(tmp_path / "photos", FULL)
    twelve = pictures(tmp_path / "twelve", 4095)
    (asked,) = checked(recipe(tmp_path, init), twelve)
    assert "8 bits, or on 16 bits with data.range=full, and these images are read with" in asked
    assert checked(recipe(tmp_path, init, "data.range=[0,4095]"), twelve) == []
    (said,) = checked(recipe(tmp_path, init, "data.range=full"), twelve)
    assert "some 16 of 256 levels are left" in said


def test_few_files_within_the_range_of_the_weights_prove_nothing(tmp_path: Path) -> None:
    """Others may be brighter: what is packed decides."""
    init = run_of(tmp_path / "microscope", TWELVE_BITS)
    dark = pictures(tmp_path / "dark", 2_000, number=40)
    folder = RunFolder.of(f"{tmp_path}/runs", "a")
    shards = shards_of(tmp_path / "table", dark)
    files = known_set(recipe(tmp_path, init), "data.source", str(dark))
    (said,) = check_weights(recipe(tmp_path, init), folder, files)
    assert "If all use no more, the job stops once they are packed; set data.range=[0,4095]" in said
    assert check_weights(recipe(tmp_path, init, "data.range=[0,4095]"), folder, files) == []
    (other,) = check_weights(recipe(tmp_path, init, "data.range=full"), folder, files)
    assert "trained with data.range=[0,4095], and the recipe reads" in other
    with pytest.raises(ConfigError, match="mean nothing"):
        check_weights(recipe(tmp_path, init), folder, open_shards(str(shards)))


def test_a_run_that_has_begun_is_not_asked_again(tmp_path: Path) -> None:
    init = run_of(tmp_path / "microscope", TWELVE_BITS)
    bright = pictures(tmp_path / "bright", 60_000)
    run_of(tmp_path / "runs" / "a", FULL)
    assert checked(recipe(tmp_path, init), bright) == []


@pytest.mark.parametrize("place", ["run", "export", "dinov2"])
def test_another_mean_or_deviation_is_said(tmp_path: Path, place: str) -> None:
    grey = pictures(tmp_path / "bytes", 255, np.uint8)
    form = place if place == "dinov2" else "huggingface"
    init = (
        run_of(tmp_path / "first", FULL)
        if place == "run"
        else export_of(tmp_path / "w", FULL, form)
    )
    (said,) = checked(recipe(tmp_path, init, "augment.mean=[0.4]"), grey)
    assert "trained with augment.mean=[0.5], and the recipe has augment.mean=[0.4]" in said
    assert "augment.std" not in said
    (said,) = checked(recipe(tmp_path, init, "augment.mean=[0.4]", "augment.std=[0.3]"), grey)
    assert "augment.mean=[0.4] augment.std=[0.3]" in said
    assert checked(recipe(tmp_path, init), grey) == []


def test_timm_says_what_its_own_weights_take(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    colours = pictures(tmp_path / "bytes", 255, np.uint8)
    name = "timm:vit_tiny_patch16_224.augreg_in21k"  # its mean is 0.5
    fields = ["model.in_channels=3", "run.name=a", f"model.init={name}", "run.folder=runs"]
    config = load([*SMALL, *fields])
    (said,) = checked(config, colours)
    assert f"{name} was trained with augment.mean=[0.5,0.5,0.5] augment.std=[0.5,0.5,0.5]" in said


def test_adaptation_reads_images_as_the_weights_do(tmp_path: Path) -> None:
    bright = pictures(tmp_path / "bright", 60_000)
    for init in (
        run_of(tmp_path / "microscope", TWELVE_BITS),
        export_of(tmp_path / "weights", TWELVE_BITS),
    ):
        places = [f"model.init={init}", "adapt.enabled=true", "run.name=a"]
        config = load([*places, f"run.folder={tmp_path}/runs"])
        derived = derive(config, facts_of(config), 600, False)
        assert derived.value("data.range") == [0, 4095]
        assert "data.range=[0,4095]" in derived.said()[0]
        applied = derived.applied(config)
        assert applied.data.range == TWELVE_BITS
        assert applied.augment.mean == (0.5,)
        (said,) = checked(applied, bright)
        assert "the two differ" in said
        yours = load([*places, "data.range=full", f"run.folder={tmp_path}/runs"])
        applied = derive(yours, facts_of(yours), 600, False).applied(yours)
        assert applied.data.range == FULL
        assert len(checked(applied, bright)) == 1


def test_an_adaptation_that_has_begun_keeps_its_recipe(tmp_path: Path) -> None:
    """Its images were packed without the range of the weights, which another version reads off."""
    init = run_of(tmp_path / "microscope", TWELVE_BITS)
    places = [f"model.init={init}", "adapt.enabled=true", "run.name=a"]
    config = load([*places, f"run.folder={tmp_path}/runs"])
    folder = RunFolder.of(config.run.folder, "a")
    stages = ["pack", "curate", "adapt", "pretrain", "evaluate", "export"]
    assert adapt.begun(config, folder, stages)[0].data.range == TWELVE_BITS
    lines = derive(config, facts_of(config), 600, False).to_json()
    folder.mark_done("adapt", "key", {"recipe": [one for one in lines if one[0] != "data.range"]})
    assert adapt.begun(config, folder, stages)[0].data.range == TWELVE_BITS
    run_of(tmp_path / "runs" / "a", FULL, f"model.init={init}")
    assert adapt.begun(config, folder, stages)[0].data.range == "auto-from-sample"


def test_the_stage_and_a_dry_run_say_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    init = run_of(tmp_path / "microscope", TWELVE_BITS)
    bright = pictures(tmp_path / "bright", 60_000)
    table = shards_of(tmp_path / "table", bright)
    said = []
    for place in (f"data.source={bright}", f"data.shards={table}"):
        config = recipe(tmp_path, init, place)
        with pytest.raises(ConfigError, match=r"trained with data\.range=\[0,4095\]") as caught:
            dry_run(config, ["pack", *STAGES] if "source" in place else STAGES)
        said.append((caught.value.what, caught.value.hint))
    context = Context(config, RunFolder.of(config.run.folder, "a"))
    with pytest.raises(ConfigError) as caught:
        pretrain.key(context)
    said.append((caught.value.what, caught.value.hint))
    assert len(set(said)) == 1
    named = recipe(tmp_path, init, f"data.shards={table}", "data.range=full", "augment.std=[0.5]")
    pretrain.key(Context(named, context.folder))
    with caplog.at_level(logging.WARNING, "pipeline"):
        dry_run(named, STAGES)
    warned = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert [one for one in warned if "data.range=full" in one]
    assert [one for one in warned if "augment.std=[0.25]" in one]
    assert not (tmp_path / "runs").exists()
