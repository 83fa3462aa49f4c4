"""jobs/adapt.py as a user meets it: the recipe and its reasons, before and after, the verdict."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pipeline import job
from pipeline.card.files import read_card
from pipeline.images.preprocessing import Preprocessing
from pipeline.job import spelled_out
from pipeline.model.pair import BackboneSpec
from pipeline.model.weights import save_huggingface
from pipeline.storage.run_folder import RunFolder
from tests.jobs.conftest import Job

SPEC = BackboneSpec(
    image_size=28, patch_size=7, width=32, depth=2, heads=2, registers=1, layer_scale=0.1
)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
STAGES = ["pack", "curate", "adapt", "pretrain", "evaluate", "export"]
WORDS = ("model.init", "data.source")
SHORT = {"queries": "evaluate.queries"}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_huggingface(SPEC.build(), SPEC, tmp_path / "weights", Preprocessing(28, MEAN, STD))


def given(weights: Path, images: Path, runs: Path, *more: str) -> list[str]:
    return [
        str(weights),
        f"{images}/train",
        f"run.folder={runs}",
        "data.max_bad_fraction=0.1",
        "track.enabled=false",
        "train.workers=1",
        "resources.threads=1",
        "resources.object_store_gb=0.2",
        *more,
    ]


def test_words_are_fields_in_their_order() -> None:
    fields = spelled_out(["w.pth", "photos/", "queries=val/"], SHORT, WORDS)
    assert sorted(fields) == [
        "data.source=photos/", "evaluate.queries=val/", "model.init=w.pth",
    ]  # fmt: skip
    assert spelled_out(["model.init=w", "./photos=1/"], {}, WORDS) == [
        "model.init=w", "data.source=./photos=1/",
    ]  # fmt: skip


def test_what_is_wrong_is_said_before_anything_starts(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = given(weights, images, tmp_path / "runs")
    for words, what in (
        ([], "no weights to adapt"),
        ([str(tmp_path / "gone.pth"), *arguments[1:]], "there is no"),
        ([*arguments, "more"], "more is one word too many"),
        ([*arguments, "augment.global_size=30"], "augment.global_size=30 is not a multiple"),
    ):
        with pytest.raises(SystemExit) as stopped:
            job.main(STAGES, "doc", [*words, "--dry-run"], SHORT, WORDS, "configs/adapt.yaml")
        assert stopped.value.code == 2
        assert what in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_the_recipe_and_leaves_nothing(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = given(weights, images, tmp_path / "runs", "optim.lr=0.0123", "--dry-run")
    job.main(STAGES, "doc", arguments, SHORT, WORDS, "configs/adapt.yaml")
    shown = capsys.readouterr().out
    assert f"weights     {weights}: a ViT 32 x 2, patches of 7" in shown
    assert "augment.mean=[0.4,0.5,0.6]" in shown and "model.registers=1" in shown
    assert "optim.lr=0.0123: as you set it" in shown
    assert re.search(r"recipe +train\.freeze_backbone_steps=\d+: fresh heads", shown)
    assert re.search(r"^time +about", shown, re.M) and re.search(r"^memory +about", shown, re.M)
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(900)  # two jobs, on a machine that may be busy
def test_before_and_after_and_the_same_recipe_again(
    weights: Path, images: Path, tmp_path: Path, alone: Job
) -> None:
    arguments = given(weights, images, tmp_path / "runs", "optim.steps=12")
    first = alone("adapt", *arguments)
    assert first.returncode == 0, first.stderr + first.stdout
    folder = RunFolder.of(str(tmp_path / "runs"), "adapt")
    *_, last = first.stdout.strip().splitlines()
    assert last.startswith("verdict ")
    before = re.findall(r"^before +k-NN ([0-9.]+)", first.stdout, re.M)
    assert len(before) == 2 and before[0] == before[1]  # told twice, of two cards, and the same
    assert re.search(r"^after +k-NN", first.stdout, re.M)
    cards = [read_card(folder.path / name) for name in ("adapt", "evaluate")]
    assert cards[0].reference.digest == cards[1].reference.digest
    init = next(one for one in cards[1].contenders if one.role == "init")
    for name in ("image_size", "mean", "std"):
        assert cards[0].contenders[0].facts[name] == init.facts[name]
    assert list(init.facts["mean"]) == pytest.approx(MEAN)
    recipe = (folder.path / "adapt" / "recipe.yaml").read_text()
    assert yaml.safe_load(recipe)["optim"]["steps"] == 12
    whole = yaml.safe_load((folder.path / "config.yaml").read_text())
    assert whole["model"]["width"] == 32 and whole["loss"]["centring"] == "sinkhorn"
    assert "Before and after" in (folder.path / "report.html").read_text()

    again = alone("adapt", *arguments)
    assert again.returncode == 0, again.stderr
    for stage in ("pack", "adapt", "pretrain", "evaluate", "export"):
        assert re.search(rf"^{stage} +up to date", again.stdout, re.M), again.stdout
    assert (folder.path / "adapt" / "recipe.yaml").read_text() == recipe
    assert again.stdout.strip().splitlines()[-1] == last
