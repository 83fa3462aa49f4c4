"""The command line of `jobs/evaluate.py`, with tasks in this process."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.card.files import read_card
from pipeline.config.embedding import group_of
from pipeline.config.load import load
from pipeline.errors import ConfigError, DataError
from pipeline.stages.checks.start import check_decides
from pipeline.stages.evaluation import groups_of
from pipeline.stages.pack import check_places
from pipeline.storage.run_folder import RunFolder
from tests import standins
from tests.card.conftest import COLOURS, coloured, folder_of_classes
from tests.data import encoded

Job = Callable[..., tuple[int, str]]
JOB = Path(__file__).parents[2] / "jobs" / "evaluate.py"


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    """Runs the job in a folder of its own; gives its exit status and all that it printed."""
    standins.tasks_here(monkeypatch)
    standins.ray_here(monkeypatch)

    def run(*arguments: str) -> tuple[int, str]:
        given = [f"run.folder={tmp_path}/runs", "track.enabled=false"]
        given += arguments
        monkeypatch.setattr(sys, "argv", [str(JOB), *given])
        try:
            runpy.run_path(str(JOB), run_name="__main__")
        except SystemExit as end:
            shown = capsys.readouterr()
            return int(end.code or 0), shown.out + shown.err
        shown = capsys.readouterr()
        return 0, shown.out + shown.err

    return run


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """A folder for each of three colours, and what people keep beside their images."""
    folder = folder_of_classes(tmp_path / "classes", 14)
    (folder / "red" / "Thumbs.db").write_bytes(b"no image")
    (folder / "blue" / "broken.png").write_bytes(coloured("blue", 99)[:60])
    return folder


def value(folder: Path, score: str, role: str = "model") -> float:
    one = next(one for one in read_card(folder).contenders if one.role == role)
    return one.results[score].interval.value


@pytest.mark.long
def test_a_folder_of_classes_alone(job: Job, classes: Path, tmp_path: Path) -> None:
    quick = "scores=[knn,logistic,few_shot,retrieval,copies,unlabelled]"
    given = ["model=descriptor", f"data={classes}", "evaluate.k=5", quick]
    status, shown = job(*given)
    assert status == 0, shown
    run = tmp_path / "runs" / "evaluate"
    card = read_card(run)
    assert card.queries is None and card.reference.images == 42
    assert card.reference.name == str(classes)  # not where its shards are
    assert card.reference.class_names == tuple(sorted(COLOURS))
    assert shown.strip().splitlines()[-1] == f"verdict     {card.verdict.text}"
    result = json.loads((run / "evaluate" / "_done.json").read_text())["result"]
    assert result["page"] == "evaluate/card.html" and (run / result["page"]).is_file()
    assert card.verdict.text in (run / "report.html").read_text()
    groups = ("knn5_top1", "logistic_top1", "few_shot5_top1", "retrieval_map", "rank_me")
    assert set(groups) <= set(card.contenders[0].results)
    # the same again does nothing, another image does it anew
    assert "evaluate    up to date" in job(*given)[1]
    (classes / "red" / "new.png").write_bytes(coloured("red", 200))
    assert "evaluate    up to date" not in job(*given)[1]
    assert read_card(run).reference.images == 43


def test_two_models_and_a_second_set(job: Job, classes: Path, tmp_path: Path) -> None:
    queries = folder_of_classes(tmp_path / "queries", 4, first=50)
    given = [f"data={classes}", f"queries={queries}", "scores=[knn,unlabelled]", "evaluate.k=5"]
    for name in ("one", "two"):
        status, shown = job("model=descriptor", *given, f"run.name={name}")
        assert status == 0, shown
    card = read_card(tmp_path / "runs" / "one")
    assert card.queries is not None and card.queries.images == 12
    runs = tmp_path / "runs"
    status, shown = job(f"cards=[{runs}/one,{runs}/two]")
    assert status == 0, shown
    assert (runs / "evaluate" / "evaluate" / "compare.html").is_file()
    assert shown.strip().splitlines()[-1].startswith("verdict     ")


def test_images_without_labels(job: Job, classes: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in COLOURS:
        for image in (classes / name).glob("?.png"):
            shutil.copy(image, plain / f"{name}-{image.name}")
    status, shown = job("model=descriptor", f"data={plain}", "scores=unlabelled")
    assert status == 0, shown
    card = read_card(tmp_path / "runs" / "evaluate")
    assert card.score == "rank_me" and not card.reference.labelled
    assert [one.role for one in card.contenders] == ["model"]
    assert "without labels" in shown.strip().splitlines()[-1]


def test_vectors_need_no_model(job: Job, classes: Path, tmp_path: Path) -> None:
    assert job("model=descriptor", f"data={classes}", "scores=knn")[0] == 0
    place = tmp_path / "runs/evaluate/evaluate/vectors/00-model/reference"
    shutil.copytree(place, tmp_path / "vectors")
    shutil.rmtree(classes)
    status, shown = job(f"data={tmp_path}/vectors", "scores=knn", "run.name=again")
    assert status == 0, shown
    first, again = (value(tmp_path / "runs" / name, "knn20_top1") for name in ("evaluate", "again"))
    assert first == again


def test_wrong_names_are_said_in_a_sentence(job: Job, classes: Path, tmp_path: Path) -> None:
    data = f"data={classes}"
    wrong = {
        "there is nothing to evaluate on": ["model=descriptor"],
        "evaluate.models: no embedder: there is no": ["model=/nowhere/weights", data],
        "has no checkpoint": [data],
        "no such path": ["model=descriptor", "data=/nowhere"],
        "evaluate.queries": ["model=descriptor", data, "queries=/nowhere"],
        "names one model twice": ["models=[descriptor,descriptor]", data],
        "evaluate.scores: Input should be 'knn'": ["model=descriptor", data, "scores=kn"],
        "one card alone": [f"cards={tmp_path}"],
    }
    for sentence, given in wrong.items():
        for dry in ([], ["--dry-run"]):
            if dry and "cards" in given[0]:
                continue
            status, shown = job(*given, *dry)
            assert status == 2 and sentence in shown, (given, shown)
            said = [line for line in shown.strip().splitlines() if not line.startswith("still ")]
            assert len(said) <= 3, shown
    assert not (tmp_path / "runs" / "evaluate" / "evaluate").exists()


def test_other_images_are_scored_under_the_same_name(
    job: Job, classes: Path, tmp_path: Path
) -> None:
    """Each set keeps its own shards; the card is of the last one, and that is said."""
    given = ["model=descriptor", "scores=unlabelled"]
    other = folder_of_classes(tmp_path / "other", 3, first=70)
    run = tmp_path / "runs" / "evaluate"
    for folder, images, again in ((classes, 42, False), (other, 9, True), (classes, 42, True)):
        status, shown = job(*given, f"data={folder}")
        assert status == 0, shown
        card = read_card(run)
        assert (card.reference.name, card.reference.images) == (str(folder), images)
        assert ("is overwritten: run.name=" in shown) == again, shown
        assert len(list((run / "pack").glob("reference*/_manifest.json"))) == 1 + again
    assert "evaluate    up to date" in job(*given, f"data={classes}")[1]


def test_other_training_images_need_another_run_name(
    job: Job, classes: Path, tmp_path: Path
) -> None:
    """As with a second folder under `runs/finetune`: checkpoints of the first one are there."""
    assert job("model=descriptor", f"data={classes}", "scores=unlabelled")[0] == 0
    run = tmp_path / "runs" / "evaluate"
    (run / "pack" / "reference").rename(run / "shards")
    other = folder_of_classes(tmp_path / "other", 3, first=70)
    fields = [f"data.source={other}", f"run.folder={tmp_path}/runs", "run.name=evaluate"]
    with pytest.raises(DataError) as error:
        check_places(load(fields), RunFolder.of(f"{tmp_path}/runs", "evaluate"))
    assert "holds the shards of" in error.value.what and "run.name=" in error.value.hint


def test_what_cannot_be_read_of_a_set_is_on_its_card(
    job: Job, classes: Path, tmp_path: Path
) -> None:
    """A tenth of the images, more than `data.max_bad_fraction`; only a set of hardly any image that
    can be read is refused.
    """
    for number in range(4):
        (classes / "red" / f"cut{number}.png").write_bytes(coloured("red", number)[: 40 + number])
    shutil.copy(classes / "red" / "1.png", classes / "red" / "same.png")
    given = ["model=descriptor", f"data={classes}", "scores=unlabelled"]
    status, shown = job(*given)
    assert status == 0, shown
    card = read_card(tmp_path / "runs" / "evaluate")
    assert card.reference.images == 42
    (said,) = [remark for remark in card.remarks if "could not be read" in remark]
    assert said.startswith("files of the reference: 5 of 48 could not be read (5 truncated), ")
    assert said.endswith("; 1 are byte for byte like another one, and are left out")
    bad = pq.read_table(tmp_path / "runs" / "evaluate" / "pack" / "bad_images_reference.parquet")
    assert bad.num_rows == 5
    for number in range(400):
        (classes / "red" / f"no{number}.png").write_bytes(b"no image %d" % number)
    status, shown = job(*given)
    assert status == 2 and "405 of 448 images" in shown and "allowed 90" in shown, shown


def test_scores_that_a_set_does_not_allow_leave_the_others(
    job: Job, classes: Path, tmp_path: Path
) -> None:
    """One folder as both sets: nothing is left to learn from, yet images have other neighbours."""
    given = ["model=descriptor", f"data={classes}", f"queries={classes}", "evaluate.k=5"]
    status, shown = job(*given, "scores=[knn,logistic,linear,retrieval]")
    assert status == 0, shown
    card = read_card(tmp_path / "runs" / "evaluate")
    assert {"knn5_top1", "retrieval_map"} <= set(card.contenders[0].results)
    assert "logistic_top1" not in card.contenders[0].results
    for named in ("logistic regression", "linear layer"):
        (said,) = [x for x in card.remarks if x.startswith(f"descriptor has no {named}: ")]
        assert "are left to train a classifier" in said, card.remarks
    assert "queries are also in the reference" in card.verdict.text


def test_the_folder_of_a_run_means_its_vectors_or_its_images(
    job: Job, classes: Path, tmp_path: Path
) -> None:
    """`data=runs/photos` of a run with both: the images for models that are named."""
    assert job("model=descriptor", f"data={classes}", "scores=knn", "evaluate.k=5")[0] == 0
    made, other = tmp_path / "runs" / "evaluate", tmp_path / "photos"
    shutil.copytree(made / "pack" / "reference", other / "shards")
    shutil.copytree(made / "evaluate" / "vectors" / "00-model" / "reference", other / "vectors")
    shutil.rmtree(classes)
    first = value(made, "knn5_top1")
    for given, said in (
        ([], "its vectors are meant"),
        (["model=descriptor"], "its packed images are meant"),
    ):
        status, shown = job(*given, f"data={other}", "scores=knn", "evaluate.k=5", "run.name=b")
        assert status == 0 and said in shown, shown
        assert value(tmp_path / "runs" / "b", "knn5_top1") == first
    status, shown = job("model=descriptor", f"data={made}", "run.name=c")
    assert status == 2 and "is the folder of a run that has no shards/" in shown, shown


def test_any_score_of_a_card_decides_its_verdict(job: Job, classes: Path, tmp_path: Path) -> None:
    """The best checkpoint of a training is chosen by what is computed while training alone."""
    given = ["model=descriptor", f"data={classes}"]
    status, shown = job(*given, "scores=copies", "evaluate.decide_by=copies_recall1")
    assert status == 0, shown
    card = read_card(tmp_path / "runs" / "evaluate")
    assert card.score == "copies_recall1" and "copy detection" in card.verdict.text, card.verdict
    assert any("no baselines of pixels and colours" in remark for remark in card.remarks)
    wrong = {"needs images with masks or depth": ["evaluate.decide_by=depth_head_rmse"]}
    wrong["evaluate.decide_by=linear cannot decide"] = ["evaluate.decide_by=linear"]
    for sentence, field in wrong.items():
        status, shown = job(*given, *field, "run.name=other")
        assert status == 2 and sentence in shown, shown
    for score in ("linear_top1", "copies_recall1", "retrieval_recall1"):
        config = load([f"evaluate.decide_by={score}", "evaluate.scores=[]"])
        with pytest.raises(ConfigError, match=f"{score} cannot choose the best checkpoint"):
            check_decides(config, ["pack", "pretrain", "evaluate"])
        check_decides(config, ["evaluate"])
        assert group_of(score) in groups_of(config)


def test_a_folder_of_masks_is_scored_densely(job: Job, tmp_path: Path) -> None:
    """Taken for what it is, and said; the descriptor has no patches, so it has no such score."""
    for place in ("images", "masks"):
        (tmp_path / "dense" / place).mkdir(parents=True)
    for number in range(4):
        image = coloured("red", number)
        mask = encoded(np.full((18, 18), number % 2, np.uint8))
        (tmp_path / "dense" / "images" / f"{number}.png").write_bytes(image)
        (tmp_path / "dense" / "masks" / f"{number}.png").write_bytes(mask)
    status, shown = job("model=descriptor", f"data={tmp_path}/dense")
    assert status == 0, shown
    assert "has masks or depth: dense scores are of it" in shown
    card = read_card(tmp_path / "runs" / "evaluate")
    assert card.score == "segmentation_linear_miou" and card.reference.images == 4
    assert any("descriptor has no dense scores" in remark for remark in card.remarks)


def test_a_dry_run_says_who_is_scored_by_what(job: Job, classes: Path, tmp_path: Path) -> None:
    status, shown = job("model=descriptor", f"data={classes}", "--dry-run")
    assert status == 0, shown
    assert "evaluate    descriptor" in shown
    assert "scores: knn, logistic, few_shot, retrieval, copies, unlabelled, linear" in shown
    assert "about 43 images, embedded by 1 network" in shown
    assert not (tmp_path / "runs").exists()
