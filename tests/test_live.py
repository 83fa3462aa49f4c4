"""The line on a terminal: progress is written over, results scroll; a log has none of it."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from pipeline import live, log
from pipeline.heartbeat import HEART, PROGRESS


@pytest.fixture
def screen() -> Iterator[tuple[live.LiveLine, io.StringIO]]:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=80, color_system=None)
    handler = live.LiveLine(console)
    root = logging.getLogger("pipeline")
    before, root.handlers[:] = root.handlers[:], [handler]
    root.setLevel(logging.INFO)
    yield handler, written
    root.handlers[:] = before
    handler.close()


def test_progress_is_written_over_and_results_scroll(
    screen: tuple[live.LiveLine, io.StringIO],
) -> None:
    handler, written = screen
    logger = logging.getLogger("pipeline.train")
    logger.log(PROGRESS, "step 050/200 | eta 12s")
    assert "step 050/200 | eta 12s" in written.getvalue()
    logger.log(PROGRESS, "still       pretrain: step 60 of 200")
    assert "still" not in written.getvalue()
    written.truncate(0)
    logger.info("pretrain    finished [at] step 200")
    handler.show("evaluate: 3 of 14 scores", 7.0)
    shown = written.getvalue()
    assert "pretrain    finished [at] step 200\n" in shown  # brackets are no markup
    assert "━" in shown and "evaluate: 3 of 14 scores, 7 s" in shown
    assert "\x1b[2K" in shown  # the line before is erased
    handler.show("", 0.0)
    logger.warning("a word")
    assert "warning: a word\n" in written.getvalue()


def test_a_bar_is_as_long_as_what_is_counted() -> None:
    for text, full in (
        ("step 050/200", live.BAR // 4),
        ("evaluate: 7 of 14 scores", live.BAR // 2),
        ("vector 1,000 of 2,000 into its list", live.BAR // 2),
        ("0 of 0 tasks", 0),
    ):
        cells = live.bar(text)
        assert len(cells) == live.BAR + 1
        assert sum(x.end - x.start for x in cells.spans if x.style == "green") == full, text
    assert not live.bar("starting Ray")


def test_without_a_terminal_lines_are_plain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    log.configure()
    with live.terminal():
        assert HEART.live is None
        logging.getLogger("pipeline").log(PROGRESS, "step 1/2")
    assert capsys.readouterr().out == "step 1/2\n"


def test_on_a_terminal_the_line_ends_with_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("PIPELINE_DEBUG", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log.configure()
    before = logging.getLogger("pipeline").handlers[:]
    with live.terminal():
        assert HEART.live is not None
        assert isinstance(logging.getLogger("pipeline").handlers[0], live.LiveLine)
    assert HEART.live is None and logging.getLogger("pipeline").handlers == before
    monkeypatch.setenv("TERM", "dumb")
    with live.terminal():
        assert HEART.live is None
