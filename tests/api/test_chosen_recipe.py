"""`api.train` without a recipe: which one it takes, and that the same call again takes it again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import api, rounds
from pipeline.config.config import Config
from pipeline.errors import ConfigError, DataError
from pipeline.plan.layout import Machine
from pipeline.plan.nodes import Node
from pipeline.start import machine
from pipeline.start.machine import GB, Surroundings
from pipeline.train.checkpoint import state
from tests.s3 import S3


def pictures(folder: Path, number: int) -> Path:
    for n in range(number):
        place = folder / ("dark", "light")[n % 2] / f"{n}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        low = 128 * (n % 2)
        pixels = np.random.default_rng(n).integers(low, low + 128, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(place)
    return folder


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs of the chains that calls would have run, on a machine of two CPUs."""
    configs: list[Config] = []

    def run(config: Config, stages: Sequence[str]) -> None:
        configs.append(config)

    cpus = Machine(cpus=2, gpus=0, bfloat16=False, nodes=(Node(2, 0, driver=True),))
    around = Surroundings(cpus, "a machine", "", 0.0, "", 8 * GB, None, False)
    monkeypatch.setattr(rounds, "run", run)
    monkeypatch.setattr(machine, "look", lambda config: around)
    return configs


def test_without_a_recipe_it_takes_the_one_that_start_writes(
    tmp_path: Path,
    ran: list[Config],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = pictures(tmp_path / "photos", 120)
    api.train(photos, "runs/first", settings={"optim.lr": 0.25})
    said = capsys.readouterr().out.splitlines()
    api.train(photos, "runs/second", recipe=api.start(photos).recipe)
    first, second = ran
    assert len(said) == 1 and said[0].startswith("recipe      small (120 images and no GPU")
    assert said[0].endswith("runs/first/recipe.yaml; recipe=FILE.yaml takes another one")
    assert first.optim.global_batch_size == 16 and first.optim.passes == 200
    assert first.optim.lr == 0.25 and second.optim.lr == 2e-3
    for section in ("data", "augment", "model", "head", "loss", "teacher", "train", "evaluate"):
        assert getattr(first, section) == getattr(second, section)
    assert (first.run.folder, first.run.name) == ("runs", "first")
    assert "name:" not in (tmp_path / "runs" / "first" / "recipe.yaml").read_text()


def test_the_same_call_again_takes_the_recipe_of_the_run(
    tmp_path: Path, ran: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine `start` would write another one; the run would be refused."""
    photos = pictures(tmp_path / "photos", 120)
    api.train(photos, tmp_path / "runs" / "x", settings={"train.log_every": 7})
    monkeypatch.setattr(machine, "look", lambda config: pytest.fail("it looked again"))
    api.train(photos, tmp_path / "runs" / "x", settings={"train.log_every": 7})
    api.train(photos, tmp_path / "runs" / "x", settings={"optim.passes": 20})
    first, again, shorter = ran
    assert first == again
    assert shorter.optim.passes == 20 and shorter.optim.global_batch_size == 16


def test_no_recipe_is_chosen_for_a_run_that_has_one_of_its_own(
    tmp_path: Path, ran: list[Config]
) -> None:
    photos = pictures(tmp_path / "photos", 120)
    state.save(tmp_path / "runs" / "x" / "checkpoints", 5, {}, {})
    with pytest.raises(ConfigError, match="run x has begun with a recipe or settings of its own"):
        api.train(photos, tmp_path / "runs" / "x")
    assert not ran and not (tmp_path / "runs" / "x" / "recipe.yaml").exists()


def test_a_network_that_is_named_is_not_replaced(tmp_path: Path, ran: list[Config]) -> None:
    photos = pictures(tmp_path / "photos", 120)
    with pytest.raises(ConfigError, match=r"settings name model\.width, and there is no recipe"):
        api.train(photos, tmp_path / "runs" / "x", settings={"model.width": 96})
    assert not ran


def test_a_call_that_fails_leaves_no_recipe(tmp_path: Path, ran: list[Config]) -> None:
    photos = pictures(tmp_path / "photos", 120)
    alone = pictures(tmp_path / "alone", 0) / "dark"
    (alone / "a").mkdir(parents=True)
    (photos / "dark" / "0.png").rename(alone / "a" / "0.png")
    with pytest.raises(DataError, match=r"evaluate\.queries"):
        api.train(photos, tmp_path / "runs" / "x", settings={"evaluate.queries": str(alone)})
    assert not (tmp_path / "runs" / "x" / "recipe.yaml").exists()


def test_the_held_out_part_is_not_trained_on(
    tmp_path: Path,
    ran: list[Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = tmp_path / "photos"
    pictures(photos / "train", 120)
    pictures(photos / "val", 8)
    for _ in range(2):
        api.train(f"{photos}/", tmp_path / "runs" / "x")
    assert [one.data.source for one in ran] == [f"{photos}/train"] * 2
    assert [one.evaluate.queries for one in ran] == [f"{photos}/val"] * 2
    monkeypatch.chdir(tmp_path)
    for spelt in ("photos", "./photos", photos / "train"):
        api.train(spelt, tmp_path / "runs" / "x")
        assert ran[-1].data.source == f"{photos}/train"
    other = pictures(tmp_path / "photos-2", 8)
    api.train(other, tmp_path / "runs" / "x")
    assert ran[-1].data.source == str(other)
    said = capsys.readouterr().out
    assert "was chosen for" in said and "photos-2; to choose anew, take another out=" in said
    part = pictures(tmp_path / "years" / "2024", 120)  # no part of a set by its name
    api.train(part, tmp_path / "runs" / "y")
    api.train(tmp_path / "years", tmp_path / "runs" / "y")
    assert ran[-1].data.source == str(tmp_path / "years")


@pytest.mark.parametrize("field", ["optim.steps", "optim.passes", "model.init"])
def test_settings_that_say_enough_choose_nothing(
    field: str, tmp_path: Path, ran: list[Config]
) -> None:
    value = "weights.safetensors" if field == "model.init" else 5
    api.train(tmp_path / "nothing", tmp_path / "runs" / "x", settings={field: value})
    assert ran[0].optim.global_batch_size == Config().optim.global_batch_size
    assert not (tmp_path / "runs").exists()


def test_too_few_images(tmp_path: Path, ran: list[Config]) -> None:
    photos = pictures(tmp_path / "photos", 30)
    with pytest.raises(DataError, match="30 images: too few for anything but adaptation"):
        api.train(photos, tmp_path / "runs" / "x")
    assert not ran and not (tmp_path / "runs").exists()


def test_a_remote_run_has_its_recipe_at_its_address(
    tmp_path: Path, ran: list[Config], s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine, whose working copy is empty, goes on with it."""
    monkeypatch.setenv("RAYDINO_HOME", str(tmp_path / "home"))
    s3.make("chosen")
    photos = pictures(tmp_path / "photos", 120)
    api.train(photos, "s3://chosen/runs/x")  # there is none yet
    there = b"optim: {passes: 3, global_batch_size: 32}\n"
    s3.client().put_object(Bucket="chosen", Key="runs/x/recipe.yaml", Body=there)
    monkeypatch.setenv("RAYDINO_HOME", str(tmp_path / "another"))
    api.train(photos, "s3://chosen/runs/x")
    assert [one.optim.passes for one in ran] == [200, 3]
    assert [one.optim.global_batch_size for one in ran] == [16, 32]


@pytest.mark.jobs
def test_the_one_call_trains_and_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its length is fitted to the speed of this machine, which is another one at each look."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "photos", 120)
    settings = {"track.enabled": False, "start.hours": 0.001, "train.precision": "float32"}
    trained = api.train("photos/", out="runs/photos", settings=settings)
    assert trained.verdict and trained.results["pretrain"]["step"] > 0
    mark = tmp_path / "runs" / "photos" / "pretrain" / "_done.json"
    before = mark.stat().st_mtime_ns
    assert api.train("photos/", out="runs/photos", settings=settings).scores == trained.scores
    assert mark.stat().st_mtime_ns == before
