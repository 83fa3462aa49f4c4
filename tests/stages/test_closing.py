"""The last lines of a whole run: the verdict is the last, and only what is there is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load
from pipeline.context import Context
from pipeline.stages.console.brief import brief
from pipeline.stages.console.closing import closing, say_verdict
from pipeline.storage.run_folder import RunFolder


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


def test_a_run_says_less_of_its_plan_than_a_dry_run() -> None:
    lines = ["model  a", "objective  b", "expect  c", "       d", "steps  e", "       f"]
    assert brief(lines) == ["model  a", "steps  e", "       f"]
