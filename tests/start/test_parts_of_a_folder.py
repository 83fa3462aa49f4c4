"""jobs/start.py: which folders are classes, what is scored, and that nothing vanishes unsaid."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.config import Config
from pipeline.stages.checks.start import check_scored
from pipeline.start import folder as images
from pipeline.start.choose import choose
from pipeline.start.folder import Folder
from pipeline.start.start import folder_lines
from tests.start.starting import config, here, picture, ran


def numbered(home: Path, train: str = "0123456789", val: str = "0123456789") -> None:
    """`train/0` to `train/9` with five images each, `val/…` with two."""
    for split, names, number in (("train", train, 5), ("val", val, 2)):
        for name in names:
            for i in range(number):
                picture(home / split / name / f"{i}.png", 32, number * 100 + 10 * int(name) + i)


def lines_of(folder: Folder) -> dict[str, str]:
    return dict(folder_lines(folder))


def recipe_of(settings: Config, folder: Folder) -> Config:
    """The recipe of a folder, as if it had images enough; jobs/run.py takes its sets."""
    recipe = choose(settings, replace(folder, images=150), here()).config
    check_scored(recipe)
    return recipe


def test_numbered_folders_are_classes_where_the_held_out_part_has_the_same(
    tmp_path: Path,
) -> None:
    numbered(tmp_path)
    settings = config(f"data.source={tmp_path}")
    looked_at = images.look(settings)
    assert looked_at.classes == tuple("0123456789") and looked_at.no_classes == ""
    assert looked_at.queries == f"{tmp_path}/val"
    said = lines_of(looked_at)
    assert "10 classes" in said["labels"] and "val has the same folders" in said["labels"]
    recipe = recipe_of(settings, looked_at)
    assert recipe.data.labels == "auto" and recipe.evaluate.queries == f"{tmp_path}/val"


def test_where_labels_are_dropped_the_held_out_part_is_too_and_it_is_said(tmp_path: Path) -> None:
    numbered(tmp_path / "other", val="012")
    numbered(tmp_path / "dated")
    for path in (tmp_path / "dated").glob("*/*"):
        path.rename(path.with_name(f"201{path.name}"))
    for name in ("other", "dated"):
        settings = config(f"data.source={tmp_path}/{name}")
        looked_at = images.look(settings)
        assert looked_at.classes == () and looked_at.no_classes and looked_at.queries == "", name
        said = lines_of(looked_at)
        assert "held out" not in said
        assert re.search(r"val: \d+ images, neither trained on nor scored", said["left alone"])
        assert "train has no classes to tell its images by" in said["left alone"]
        recipe = recipe_of(settings, looked_at)
        assert recipe.data.labels == "none" and recipe.evaluate.queries == ""


def test_the_word_of_the_user_on_labels_counts(tmp_path: Path) -> None:
    numbered(tmp_path, val="012")
    for word in ("folder", "auto"):
        looked_at = images.look(config(f"data.source={tmp_path}", f"data.labels={word}"))
        assert looked_at.classes == tuple("0123456789") and looked_at.no_classes == "", word
        assert looked_at.queries == f"{tmp_path}/val", word
    looked_at = images.look(config(f"data.source={tmp_path}", "data.labels=none"))
    assert looked_at.classes == () and looked_at.queries == ""
    assert "as you set it" in lines_of(looked_at)["labels"]
    # queries are told by classes, so who names some has classes
    looked_at = images.look(config(f"data.source={tmp_path}", f"evaluate.queries={tmp_path}/val"))
    assert looked_at.source == f"{tmp_path}/train" and len(looked_at.classes) == 10
    assert "never trained on" in lines_of(looked_at)["held out"]
    inside = f"{tmp_path}/train/0"
    looked_at = images.look(config(f"data.source={tmp_path}/train", f"evaluate.queries={inside}"))
    assert "trained on as far as it overlaps" in lines_of(looked_at)["held out"]


def test_few_images_of_a_class_with_a_held_out_part(tmp_path: Path) -> None:
    for number in range(40):
        picture(tmp_path / "train" / f"k{number // 2}" / f"{number}.png", 32, number)
        picture(tmp_path / "val" / f"k{number // 4}" / f"{number}.png", 32, 100 + number)
    assert images.look(config(f"data.source={tmp_path}")).queries == ""
    for number in range(10, 20):
        picture(tmp_path / "val" / f"k{number}" / "0.png", 32, 200 + number)
    looked_at = images.look(config(f"data.source={tmp_path}"))
    assert len(looked_at.classes) == 20 and looked_at.queries == f"{tmp_path}/val"


def test_images_that_are_not_used_are_named(tmp_path: Path) -> None:
    for place, number in (("train", 12), ("val", 5), ("unlabeled", 3), ("test/a", 2), (".", 1)):
        for i in range(number):
            picture(tmp_path / place / f"{i}.png", 32, i)
    (tmp_path / "empty").mkdir()
    beside = dict(images.look(config(f"data.source={tmp_path}")).beside)
    assert beside[f"{tmp_path}/val"].startswith("5 images, neither trained on nor scored")
    assert beside[f"{tmp_path}/unlabeled"].startswith("3 files, neither")
    assert beside[f"{tmp_path}/test"].startswith("2 files, neither")
    assert beside[str(tmp_path)].startswith("1 file beside its folders")
    assert len(beside) == 4
    for path in (tmp_path / "val").iterdir():
        path.unlink()
    beside = dict(images.look(config(f"data.source={tmp_path}")).beside)
    assert "it holds no images" in beside[f"{tmp_path}/val"]


def test_a_held_out_part_of_other_classes_is_left_alone(tmp_path: Path) -> None:
    for number in range(16):
        picture(tmp_path / "train" / f"k{number % 2}" / f"{number}.png", 32, number)
        picture(tmp_path / "val" / f"j{number % 2}" / f"{number}.png", 32, number)
    looked_at = images.look(config(f"data.source={tmp_path}"))
    assert looked_at.classes == ("k0", "k1") and looked_at.queries == ""
    assert "none of its classes" in dict(looked_at.beside)[f"{tmp_path}/val"]


def test_parts_that_are_trained_on_together_are_said(tmp_path: Path) -> None:
    for number in range(16):
        for split in ("train", "val"):
            picture(tmp_path / "flat" / split / f"{number}.png", 32, number)
            picture(tmp_path / "sorted" / split / f"k{number % 2}" / f"{number}.png", 32, number)
    for source in (f"{tmp_path}/flat/train,{tmp_path}/flat/val", f"{tmp_path}/flat/*/*.png"):
        looked_at = images.look(config(f"data.source={source}"))
        assert looked_at.images == 32 and looked_at.queries == ""
        assert looked_at.classes == () and "parts of a set" in looked_at.no_classes
        assert lines_of(looked_at)["held out"].startswith("none: train, val are all trained on")
    looked_at = images.look(config(f"data.source=file://{tmp_path}/sorted"))
    assert looked_at.images == 32 and looked_at.classes == ("k0", "k1")
    assert lines_of(looked_at)["held out"].startswith("none: train, val are all trained on")
    looked_at = images.look(config(f"data.source={tmp_path}/sorted/train"))
    assert "held out" not in lines_of(looked_at)


def test_images_without_an_ending_are_not_said_to_be_left_alone(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / f"{number}.png", 32, number)
        (tmp_path / f"{number}.png").rename(tmp_path / f"h{number}")
    (tmp_path / ".hidden").write_text("nothing")
    looked_at = images.look(config(f"data.source={tmp_path}"))
    said = lines_of(looked_at)
    assert "files without an image's ending" in said["images"] and "archives" not in str(said)
    assert said["opened"].startswith("3 files without an image's ending, such as h0")
    assert "1 other file: .hidden" in said["left alone"]
    choice = choose(config(), looked_at, here())
    assert "files without an image's ending hide" in choice.why
    picture(tmp_path / "named.png", 32, 9)
    assert images.look(config(f"data.source={tmp_path}")).images == 1
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.png").write_bytes((tmp_path / "named.png").read_bytes())
    (tmp_path / "notes" / "README.md").write_text("nothing")
    said = lines_of(images.look(config(f"data.source={tmp_path}/notes")))
    assert "opened" not in said and "README.md" in said["left alone"]


def test_queries_without_classes_are_refused_before_the_recipe_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for number in range(110):
            picture(tmp_path / "flat" / split / f"{number}.png", 32, number)
    with pytest.raises(SystemExit):
        ran("flat", "evaluate.queries=flat/val")
    assert "evaluate.queries=" in (shown := capsys.readouterr().err) and "no labels" in shown
    assert not list(tmp_path.glob("*.yaml"))
