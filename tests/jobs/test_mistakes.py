"""A user's mistakes: one sentence, the way out, exit code 2, no traceback, and at once."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import job, log
from pipeline.config.load import load
from pipeline.errors import PipelineError, TrainError
from pipeline.plan.layout import Machine
from pipeline.storage.run_folder import RunFolder
from tests.jobs.conftest import Job

ONE = pa.table({"img": [b"x"] * 40, "label": list(range(40))})


def assert_said(shown: subprocess.CompletedProcess[str], what: str, hint: str) -> None:
    """Two lines on stderr, what and what to do, and nothing else."""
    assert "Traceback" not in shown.stdout + shown.stderr, shown.stderr
    lines = shown.stderr.splitlines()
    assert shown.returncode == 2, shown.stderr
    assert len(lines) == 2, shown.stderr
    assert lines[0].startswith("error: ")
    assert what in lines[0]
    assert lines[1].startswith("  ")
    assert hint in lines[1]


def test_a_wrong_path(without_ray: Job, tmp_path: Path) -> None:
    shown = without_ray(
        "pack", f"data.source={tmp_path}/photoss", f"run.folder={tmp_path}", "run.name=r"
    )
    assert_said(shown, f"no such path: {tmp_path}/photoss", "data.source")


def test_a_misspelt_key(without_ray: Job, recipe: Path) -> None:
    shown = without_ray("run", recipe, "optim.lrr=1e-3")
    assert_said(shown, "optim.lrr: no such field; did you mean optim.lr?", "--help")


def test_a_wrong_type(without_ray: Job, recipe: Path) -> None:
    shown = without_ray("run", recipe, "optim.steps=ten")
    assert_said(shown, "optim.steps: Input should be a valid integer", "--help")
    assert "(got 'ten')" in shown.stderr


def test_a_folder_without_images(without_ray: Job, tmp_path: Path) -> None:
    (tmp_path / "photos" / "2024").mkdir(parents=True)
    (tmp_path / "photos" / ".hidden").touch()
    shown = without_ray("pack", f"data.source={tmp_path}/photos", f"run.folder={tmp_path}")
    assert_said(shown, f"no files under {tmp_path}/photos", "data.source is a folder of images")


@pytest.mark.slow  # what a file is, is found out by reading it, and that takes a Ray
def test_a_folder_of_other_files(alone: Job, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no picture")
    place = [f"data.source={tmp_path}/notes", f"run.folder={tmp_path}", "track.enabled=false"]
    shown = alone("pack", *place)
    what = f"no image under {tmp_path}/notes could be read: 1 other file left alone"
    assert_said(shown, what, "other_files_train.parquet")


def test_shards_without_an_image_column(without_ray: Job, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    pq.write_table(ONE, tmp_path / "shards" / "part-0003.parquet")
    shown = without_ray(
        "pretrain", recipe, f"data.shards={tmp_path}/shards", f"run.folder={tmp_path}"
    )
    assert_said(shown, 'part-0003.parquet has no column "image" (found: img, label)', "=img")
    assert "data.image_column=img" in shown.stderr


def test_a_resume_with_another_architecture(without_ray: Job, recipe: Path, tmp_path: Path) -> None:
    pq.write_table(ONE.rename_columns(["image", "label"]), tmp_path / "shards.parquet")
    write_checkpoint(recipe, tmp_path)
    shown = without_ray(
        "pretrain",
        recipe,
        f"data.shards={tmp_path}/shards.parquet",
        f"run.folder={tmp_path}",
        "model.width=48",
        "model.depth=3",
        "train.log_every=7",
    )
    assert "Traceback" not in shown.stdout + shown.stderr, shown.stderr
    assert shown.returncode == 2
    what, *fields, hint = shown.stderr.splitlines()
    assert what.startswith("error: run tiny has a checkpoint at step 5 that was made with other")
    assert [line.strip() for line in fields] == ["model.width: 32 -> 48", "model.depth: 2 -> 3"]
    assert "run.name=" in hint


def write_checkpoint(recipe: Path, folder: Path, *overrides: str) -> None:
    """A checkpoint at step 5, as far as its meta data goes."""
    from pipeline.shards.shards import open_shards
    from pipeline.train.checkpoint import state
    from pipeline.train.run import plan_for

    config = load([str(recipe), *overrides])
    found = open_shards(str(folder / "shards.parquet"))
    machine = Machine(cpus=2, gpus=0, bfloat16=False)
    plan = plan_for(config, found, machine)
    meta = {"plan": plan.model_dump(mode="json")}
    state.save(folder / "tiny" / "checkpoints", 5, {}, meta)


@pytest.fixture
def checkpoint(recipe: Path, tmp_path: Path) -> tuple[Path, str]:
    """(run folder's parent with a checkpoint, digest of its shards)."""
    from pipeline.shards.shards import open_shards

    pq.write_table(ONE.rename_columns(["image", "label"]), tmp_path / "shards.parquet")
    write_checkpoint(recipe, tmp_path)
    return tmp_path, open_shards(str(tmp_path / "shards.parquet")).digest


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        ([], []),
        (["train.workers=1", "train.log_every=3", "evaluate.k=5", "track.enabled=true"], []),
        (["model.width=48"], ["model.width: 32 -> 48"]),
        (["optim.lr=1e-3", "run.seed=1"], ["run.seed: 0 -> 1", "optim.lr: 0.002 -> 0.001"]),
        (["optim.steps=41"], ["optim.steps: 40 -> 41"]),
    ],
)
def test_what_a_resume_says(
    checkpoint: tuple[Path, str], recipe: Path, overrides: list[str], refused: list[str]
) -> None:
    from pipeline.train.run import check_resume

    folder, digest = checkpoint
    config = load([str(recipe), *overrides])
    if not refused:
        found = check_resume(config, digest, RunFolder(folder / "tiny"))
        assert [change.partition(":")[0] for change in found] == [
            o.partition("=")[0] for o in overrides
        ]
        return
    with pytest.raises(TrainError) as caught:
        check_resume(config, digest, RunFolder(folder / "tiny"))
    first, *fields = caught.value.what.splitlines()
    assert first.endswith("made with other values:")
    assert [line.strip() for line in fields] == refused


def test_another_reading_order_is_no_resume(checkpoint: tuple[Path, str], recipe: Path) -> None:
    from pipeline.train.run import check_resume

    folder, digest = checkpoint
    config, place = load([str(recipe)]), RunFolder(folder / "tiny")
    with pytest.raises(TrainError, match=r"the row groups of the shards: \w+ -> other"):
        check_resume(config, digest, place, layout="other")
    with pytest.raises(TrainError, match=r"images shuffled together: \d+ -> 7"):
        check_resume(config, digest, place, window=7)


def test_other_images_are_no_resume(checkpoint: tuple[Path, str], recipe: Path) -> None:
    from pipeline.train.run import check_resume

    with pytest.raises(TrainError, match=r"the shards: \w+ -> other"):
        check_resume(load([str(recipe)]), "other", RunFolder(checkpoint[0] / "tiny"))
    assert check_resume(load([str(recipe)]), "other", RunFolder(checkpoint[0] / "new")) == []


CHAIN = ["pack", "curate", "pretrain", "evaluate", "export"]
SAID = [
    (["--fast"], "unknown option --fast", "options are --dry-run and --help"),
    (["--dry-run=yes"], "unknown option --dry-run=…", "--dry-run"),
    (["configs/zzz.yaml"], "no recipe at configs/zzz.yaml", "recipes are in configs/"),
    (["optim={lr:1}"], "optim: give its fields one by one", "--help"),
    (["run.folder=zz://bucket/runs"], "cannot open zz://bucket/runs", "s3://bucket/folder"),
]


@pytest.mark.parametrize(("arguments", "what", "hint"), SAID, ids=lambda x: str(x)[:30])
def test_other_mistakes(
    arguments: list[str], what: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        job.main(CHAIN, "doc", arguments)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert what in lines[0]
    assert hint in lines[1]


DATA = [
    (["pretrain"], [], "no images: neither data.shards nor data.source is set", "data.source="),
    (["pack"], [], "nothing to pack: data.source is empty", "data.source="),
    (["pretrain"], ["data.source=photos"], "photos is not packed yet", "jobs/pack.py"),
    (["pretrain"], ["data.shards=/not/there"], "/not/there", "data.shards"),
    (["evaluate"], [], "has no checkpoint in", "pretrain first"),
    (["export"], [], "has no checkpoint in", "pretrain first"),
    (["pack"], ["data.source=builtin:photos/all"], "no source builtin:photos/all", "/train and"),
]


@pytest.mark.parametrize(("stages", "arguments", "what", "hint"), DATA, ids=lambda x: str(x)[:30])
def test_stages_that_miss_something(
    stages: list[str],
    arguments: list[str],
    what: str,
    hint: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    with pytest.raises(SystemExit) as ended:
        job.main(stages, "doc", [f"run.folder={tmp_path}", "optim.steps=1", *arguments])
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert what in shown.err.splitlines()[0]
    assert hint in shown.err.splitlines()[-1]


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("pipeline.rounds.run", broken)
    with pytest.raises(ZeroDivisionError):
        job.main(["pack"], "doc", [])


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_DEBUG", "1")
    with pytest.raises(PipelineError):
        job.main(["pack"], "doc", ["optim.lrr=1"])


def test_help_wins_over_everything(capsys: pytest.CaptureFixture[str]) -> None:
    job.main(["pack"], "what it does", ["nothing.yaml", "optim.lrr=1", "--help"])
    shown = capsys.readouterr()
    assert shown.out.startswith("what it does\n")
    assert not shown.err


def test_the_lines_of_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    log.configure()
    logging.getLogger("pipeline.train").info("a line")
    logging.getLogger("pipeline.pack").warning("a warning")
    logging.getLogger("pipeline").error("an error")
    logging.getLogger("pipeline").debug("hidden")
    logging.getLogger("other").warning("not ours")
    assert capsys.readouterr().out == "a line\nwarning: a warning\nerror: an error\n"
    log.configure("[w3]")
    logging.getLogger("pipeline").info("a line")
    assert capsys.readouterr().out == "[w3] a line\n"
