"""The report: self-contained, small, well-formed, and its curves where the numbers are."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipeline.report.charts import HEIGHT, WIDTH, label, labels, thin, ticks
from pipeline.report.page import (
    LIMIT_BYTES,
    Chart,
    Links,
    Picture,
    Table,
    Text,
    render,
    write_report,
)

VOID = {"meta", "img", "br", "col"}


class Balanced(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_report_stands_alone_and_stays_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    sections = [
        Text("k-NN <91 %> & more\n\nsecond", "Result"),
        Table({"id": range(300), "why": ["<b>"] * 300, "x": np.linspace(0, 1, 300)}, "Bad"),
        Chart({"a": [(0, 1.0), (1, math.nan), (2, 3.0)], "b": []}, "Loss"),
        Chart({}, "Nothing"),
        *[Picture(noise, f"p{i}", "noise") for i in range(12)],
    ]
    path = tmp_path / "report.html"
    write_report(path, "Run <x>", sections, "subtitle")
    page = path.read_text()
    assert path.stat().st_size <= LIMIT_BYTES
    sources = Balanced(page).sources
    assert len(sources) == 12 and all(s.startswith("data:image/jpeg;base64,") for s in sources)
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)
    assert "k-NN &lt;91 %&gt; &amp; more" in page and "<b>" not in page.split("<td ")[1]
    assert page.startswith("<!doctype html>") and "no values" in page
    assert "and 100 more rows" in page


def test_curves_go_through_the_values() -> None:
    rows = [(0.0, 2.0), (50.0, 10.0), (100.0, 6.0)]
    page = render("t", [Chart({"loss": rows})])
    (line,) = re.findall(r'points="([^"]+)"', page)
    places = [tuple(map(float, pair.split(","))) for pair in line.split()]
    xs, ys = zip(*places, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert (ys[2] - ys[0]) / (ys[1] - ys[0]) == pytest.approx(4 / 8, abs=0.01)
    assert ys[1] < ys[2] < ys[0]  # larger values are higher
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    torn = [(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.0), (4, math.inf)]
    gaps = render("t", [Chart({"loss": torn}, last=True)])
    assert gaps.count("<polyline") == 1 and gaps.count("<circle") == 1
    assert "loss <b>1</b>" in gaps and "3 step: 1" in gaps


@pytest.mark.parametrize(
    "low, high", [(0, 1), (-3, 7), (9.81, 9.83), (0, 0), (5, 5), (1e-6, 4e-3), (-1e9, 1e9)]
)
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    marks = ticks(low, high, 5)
    assert marks[0] <= low and marks[-1] >= high and 2 <= len(marks) <= 12
    steps = np.diff(marks)
    assert np.allclose(steps, steps[0])
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-6
    assert len({label(tick) for tick in marks}) == len(marks)


def test_labels_of_near_ticks_differ() -> None:
    near = [1.5440, 1.5442, 1.5444]
    assert labels(near) == ["1.544", "1.5442", "1.5444"]
    assert labels([0.0, 0.5, 1.0]) == ["0", "0.5", "1"] and labels([5.0, 5.0]) == ["5", "5"]


def test_thinning_keeps_the_ends_of_each_bucket() -> None:
    rows = [(float(i), math.sin(i / 50)) for i in range(10_000)]
    rows[4321] = (4321.0, 99.0)
    kept = thin(rows, lambda point: math.isfinite(point[1]))
    assert len(kept) <= 402 and (4321.0, 99.0) in kept
    assert kept == sorted(kept)


def test_a_template_of_ones_own_extends_the_page(tmp_path: Path) -> None:
    mine = tmp_path / "mine.html.j2"
    mine.write_text(
        "{% extends 'page.html.j2' %}{% block body %}<form>{{ word }}</form>{% endblock %}"
    )
    page = render("Serve", [], template=mine, values={"word": "<script>"})
    Balanced(page)
    assert "<form>&lt;script&gt;</form>" in page and "<h1>Serve</h1>" in page and "--ink:" in page


def test_a_picture_is_pixels_or_a_file_or_bytes(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.zeros((30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    encoded = (tmp_path / "a.png").read_bytes()
    for image in (pixels, pixels[..., 0], tmp_path / "a.png", encoded):
        page = render("t", [Picture(image, "title", "caption")], side=20)
        assert 'width="20" height="15"' in page and "caption" in page
    assert "no picture" in render("t", [Picture(b"nothing", "title")])


def test_links_lead_to_other_pages_and_are_escaped() -> None:
    page = render("Report", [Links([("search: <b>", "search/search.html?a=1&b=2")], "Pages")])
    link = '<a href="search/search.html?a=1&amp;b=2">search: &lt;b&gt;</a>'
    assert link in page and "<h2>Pages</h2>" in page
