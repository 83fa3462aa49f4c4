"""The report in a browser: on a phone, in the dark, on paper, and what it fetches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.run_report.write import write_run_report
from tests.run_report.run_folders import usual_card, usual_examples, write_run
from tests.serve.browser import new_page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return write_run_report(write_run(folder, usual_card(), usual_examples()))


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_never_scrolls_sideways(browser: Any, report: Path, width: int) -> None:
    page = new_page(browser, viewport={"width": width, "height": 800})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    for _ in range(2):  # folded, then with all unfolded
        sizes = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert sizes[0] <= sizes[1]
        page.evaluate("document.querySelectorAll('details').forEach(x => { x.open = true })")
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    page.context.close()


def test_dark_and_paper_have_their_own_colours(browser: Any, report: Path) -> None:
    page = new_page(browser, color_scheme="dark")
    page.goto(report.as_uri())
    ink = "getComputedStyle(document.body).getPropertyValue('--paper').trim()"
    dark = page.evaluate(ink)
    page.emulate_media(media="print", color_scheme="dark")
    assert dark != page.evaluate(ink) == "#fff"
    assert page.evaluate("getComputedStyle(document.querySelector('details')).display") == "none"
    page.context.close()


def test_the_button_copies_the_lines(browser: Any, report: Path) -> None:
    page = new_page(browser, permissions=["clipboard-read", "clipboard-write"])
    page.goto(report.as_uri())
    page.click("button.copy")
    page.wait_for_function("document.querySelector('button.copy').textContent == 'Copied'")
    selected = page.evaluate("getSelection().toString()")
    assert selected.startswith("from pipeline import api")
    page.context.close()
