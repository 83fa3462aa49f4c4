"""Sections that draw themselves: what is drawn lies where the numbers say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from pipeline.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis
from pipeline.report.page import (
    Bar,
    Bars,
    Chart,
    Code,
    Column,
    Gallery,
    Group,
    Heading,
    Histogram,
    Mark,
    Matrix,
    Mosaic,
    Numbers,
    Points,
    Section,
    Statement,
    Text,
    Tile,
    render,
    write_report,
)
from pipeline.report.pictures import shrunk
from tests.data import encoded


def drawn(section: Section, side: int = 1200) -> str:
    """The section on a page, without what is around it."""
    return render("t", [section], side=side).partition("</header>")[2]


def jpeg(width: int, height: int) -> bytes:
    return encoded(Image.new("RGB", (width, height), (200, 30, 30)), "JPEG")


def test_axes_put_values_in_proportion() -> None:
    line = Axis.over([2, 12], 5, tight=True)
    assert [line.share(v) for v in (2, 7, 12, 99, -5)] == [0, 0.5, 1, 1, 0]
    log = Axis.over([1, 10_000], 6, log=True)
    assert [log.share(v) for v in (1, 100, 10_000)] == [0, pytest.approx(0.5), 1]
    assert log.ticks == (1, 10, 100, 1000, 10_000)
    assert Axis.over([], 5).share(3) >= 0 and Axis.over([0.0, 5.0], 5, log=True).low > 0


def test_bars_of_a_histogram_have_heights_of_their_counts() -> None:
    chart = drawn(
        Histogram(
            [0, 1, 2, 3],
            [10, 0, 5],
            marks=(Mark(2.0, "limit <2>"),),
            colours=("var(--c6)", "var(--c0)"),
        )
    )
    bars = re.findall(
        r'<rect x="([\d.]+)" y="[\d.]+" .*?height="([\d.]+)" style="fill:(.*?)"', chart
    )
    (x0, tall, first), (x1, short, last) = bars
    assert float(tall) == pytest.approx(2 * float(short), abs=0.2)
    assert float(x1) - float(x0) == pytest.approx((WIDTH - LEFT - RIGHT) * 2 / 3, abs=0.2)
    assert (first, last) == ("var(--c6)", "var(--c0)") and "limit &lt;2&gt;" in chart
    (mark,) = re.findall(r'class="mark" d="M([\d.]+)', chart)
    assert float(mark) == pytest.approx(LEFT + (WIDTH - LEFT - RIGHT) * 2 / 3, abs=0.2)


def test_a_curve_on_log_axes_is_straight_for_a_power() -> None:
    rows = [(float(x), float(x**2)) for x in (1, 10, 100)]
    chart = drawn(Chart({"square": rows}, x_log=True, y_log=True))
    (points,) = re.findall(r'points="([^"]+)"', chart)
    (ax, ay), (bx, by), (cx, cy) = (tuple(map(float, p.split(","))) for p in points.split())
    assert bx - ax == pytest.approx(cx - bx, abs=0.2) and by - ay == pytest.approx(cy - by, abs=0.2)
    assert ay == pytest.approx(HEIGHT - BOTTOM, abs=0.1) and cy == pytest.approx(TOP, abs=0.1)
    assert "no values" in drawn(Chart({"none": [(0.0, 0.0)]}, y_log=True))


def test_parts_of_a_bar_have_widths_of_their_values() -> None:
    bars = [Bar("a<b", ((30, "red"), (0, "blue"), (10, "green")), "40 & more", "tip")]
    said = drawn(Bars(bars, whole=50))
    assert re.findall(r"width:([\d.]+)%;background:(\w+)", said) == [
        ("60.00", "red"),
        ("20.00", "green"),
    ]
    assert "a&lt;b" in said and "40 &amp; more" in said


def test_points_are_drawn_once_each_and_named() -> None:
    groups = {"kept": [(0.0, 0.0), (1.0, 1.0)], "gone": [(0.5, 0.5)]}
    said = drawn(Points(groups, {"kept": "green", "gone": "red"}))
    assert said.count("h0") == 3 and "M20 580h0M980 20h0" in said and "kept (2)" in said


def test_the_matrix_shades_by_the_share_of_its_row() -> None:
    columns = [Column("in"), Column("kept")]
    said = drawn(Matrix(columns, {"x": [200, 50], "y": [0, 0]}, [200, 50]))
    assert "--share:25.0%" in said and 'class="number none"' in said and "25 % of 200" in said


def test_tiles_shrink_and_what_is_no_picture_stays_blank() -> None:
    same, width, height = shrunk(jpeg(90, 40), 96)
    assert same == jpeg(90, 40) and (width, height) == (90, 40)
    small, width, height = shrunk(jpeg(90, 40), 45)
    assert (width, height) == (45, 20) and len(small) < len(same)
    assert shrunk(b"not a picture", 45)[0] == b""
    tiles = [Tile(jpeg(90, 40), ("one", "two"), alt="a 'b'", tip="<x>"), Tile(b"zz", alt="none")]
    said = drawn(Gallery([Group(tiles * 20, "title")]), 120)
    assert 'alt="a &#39;b&#39;"' in said and "&lt;x&gt;" in said and "no picture" in said
    assert said.count("<figure") == 6 and "and 34 more" in said


def test_chapters_are_listed_and_linked(tmp_path: Path) -> None:
    numbers = Numbers([("5", "images")], text="lead", problem="wrong")
    sections = [numbers, Heading("Part <1>", "about"), Text("x", "Card"), Heading("End")]
    write_report(tmp_path / "r.html", "t", sections)
    said = (tmp_path / "r.html").read_text()
    assert re.findall(r'<a href="#([\w-]+)"', said) == ["part-1", "end"]
    assert 'id="part-1"' in said and "<h3>Card</h3>" in said and "Part &lt;1&gt;" in said
    assert said.index(">wrong<") < said.index(">lead<")
    write_report(tmp_path / "r.html", "t", [Text("x", "Card")])
    assert "<nav" not in (tmp_path / "r.html").read_text()


def test_a_mosaic_places_what_is_a_picture() -> None:
    tiles = [(2, 0, Tile(jpeg(90, 40), alt="a")), (0, 1, Tile(b"", alt="b", frame="gone"))]
    said = drawn(Mosaic(tiles, (24, 14)))
    assert said.count("<img") == 1 and "grid-column:3;grid-row:1" in said and "repeat(24," in said


def test_bars_have_whiskers_where_their_intervals_are() -> None:
    bars = Bars(
        [
            Bar("a", [(0.5, "red")], "0.50 ± 0.10", ends=(0.4, 0.6), group="first"),
            Bar("b", [(0.8, "red")], "0.80", ends=(0.8, 0.8), group="first"),
            Bar("c", [(0.9, "red")], "0.90", ends=(0.7, 1.2), group="second"),
        ],
        whole=1.0,
    )
    page = render("t", [bars])
    assert re.findall(r'<u style="left:([\d.]+)%;width:([\d.]+)%', page) == [
        ("40.00", "20.00"),
        ("70.00", "30.00"),  # cut off at the end of a full bar
    ]
    assert page.count('scope="rowgroup"') == 2 and page.index("first") < page.index("second")
    free = Bars([Bar("a", [(0.5, "red")], ends=(0.4, 1.0))])
    assert "width:50.00%;background:red" in render("t", [free])  # the whisker is the longest


def test_a_statement_has_a_sign_and_code_keeps_its_lines() -> None:
    page = render("t", [Statement("Learnt <b>", "good"), Statement("No."), Code("a\n  b < c")])
    assert "✓</span>Learnt &lt;b&gt;" in page and "?</span>No." in page
    assert "<code>a\n  b &lt; c</code>" in page
