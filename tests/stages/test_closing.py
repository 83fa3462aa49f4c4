"""The last lines of a whole run: the verdict is the last, and only what is there is named."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from pipeline.card.files import CARD, EVALUATE
from pipeline.config.load import load
from pipeline.context import Context
from pipeline.stages import chain
from pipeline.stages.console.brief import brief
from pipeline.stages.console.closing import closing, say_verdict
from pipeline.storage.run_folder import RunFolder
from tests.run_report.run_folders import journal, usual_card, write_run


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """A whole run below this folder, with a search page and weights, and no curation."""
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.of(str(tmp_path / "runs"), "x")
    for name in ("search/search.html", "curate/report.html"):
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).touch()
    context = Context(load(["run.name=x", "data.source=photos/"]), folder)
    context.results = {
        "evaluate": {"verdict": "Better than colours."},
        "export": {"formats": {"dinov2": "", "huggingface": ""}},
        "embed": {},
        "search": {},
    }
    return context


def test_where_things_are_then_what_to_do_then_the_verdict(
    context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="pipeline"):
        say_verdict(context, "http://127.0.0.1:5000/#/x")
    assert caplog.messages == [
        "report      runs/x/report.html",
        "search      runs/x/search/search.html",
        "weights     runs/x/weights/huggingface",
        "mlflow      http://127.0.0.1:5000/#/x",
        "next        python jobs/search.py vectors=runs/x query=PHOTO.jpg",
        "            python jobs/serve.py model=runs/x vectors=runs/x/vectors",
        "verdict     Better than colours.",
    ]
    assert len(caplog.messages) <= 10


def test_a_single_stage_says_its_verdict_alone(
    context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    context.only = True
    with caplog.at_level("INFO", logger="pipeline"):
        say_verdict(context)
    assert caplog.messages == ["verdict     Better than colours."]


def test_without_vectors_they_are_what_comes_next(context: Context) -> None:
    del context.results["embed"]
    assert closing(context, "")[-1] == (
        "next", "python jobs/embed.py model=runs/x data.source=photos/",
    )  # fmt: skip


def test_a_name_with_a_space_is_quoted(context: Context) -> None:
    del context.results["embed"]
    context.config = load(["run.name=x", "data.source=my photos/"])
    (_, line) = closing(context, "")[-1]
    assert shlex.split(line)[2:] == ["model=runs/x", "data.source=my photos/"]


def test_a_run_says_less_of_its_plan_than_a_dry_run() -> None:
    lines = ["model  a", "objective  b", "expect  c", "       d", "steps  e", "       f"]
    assert brief(lines) == ["model  a", "steps  e", "       f"]


@pytest.fixture
def finished(tmp_path: Path) -> Context:
    """A run that its guard ended in an earlier start, with the marks of all its stages."""
    done = {"text": "x", "step": 20, "status": "guarded", "guard": "Ended at step 20."}
    facts = write_run(tmp_path, usual_card(), pretrain=done)
    for name, result in facts.results.items():
        facts.folder.mark_done(name, "key", dict(result))
    return Context(facts.config, facts.folder, stages=chain.STAGES)


def told(context: Context) -> list[dict[str, Any]]:
    """What the report tells the page of the pipeline's run: its lines of the journal."""
    path = context.folder.path
    before = (path / "metrics.jsonl").stat().st_size
    with journal(path) as context.tracking:
        chain._report(context)
    lines = (path / "metrics.jsonl").read_bytes()[before:].splitlines()
    events = [json.loads(line) for line in lines]
    return [event for event in events if event["run"] == "pipeline"]


def test_a_guarded_run_is_said_to_be_so_after_a_restart_too(finished: Context) -> None:
    events = told(finished)
    assert {"status": "guarded"} in [event.get("tags") for event in events]
    (note,) = (event["note"] for event in events if "note" in event)
    assert usual_card().verdict.text in str(note) or "| what" in str(note)
    assert (finished.folder.path / "report.html").is_file()


def test_a_damaged_card_does_not_end_a_run_that_is_finished(
    finished: Context, caplog: pytest.LogCaptureFixture
) -> None:
    (finished.folder.path / EVALUATE / CARD).write_text("{")
    with caplog.at_level("WARNING", logger="pipeline"):
        told(finished)
    assert "without the card" in caplog.text
    assert (finished.folder.path / "report.html").is_file()
