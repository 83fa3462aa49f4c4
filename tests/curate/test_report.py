"""The page, the grids and the numbers: complete, well-formed, self-contained, small, escaped."""

from __future__ import annotations

import io
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.curate.report import report
from pipeline.curate.report.numbers import metrics, note, tables
from pipeline.curate.report.pictures import CELL, GAP, Cell, Line, pictures, square
from pipeline.curate.report.report import sections, sentence, write
from pipeline.curate.report.summary import Facts, Summary, summarise
from pipeline.curate.report.words import (
    RGB,
    STAGES,
    WORDS,
    phrase,
    share,
    similarity,
)
from pipeline.curate.rows.tables import REASONS
from pipeline.report.page import Gallery, Group, Tile, render
from pipeline.report.units import time_of
from pipeline.track.names import metric_name, picture_key
from tests.curate.conftest import summarised
from tests.curate.made_up import HOSTILE, Run, calibration, write_run

VOID = {"meta", "img", "br", "col"}


class Page(HTMLParser):
    """Checks that tags are closed in order; collects what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.titles: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2", "h3", "h4"):
            self.titles.append(data)
        if {"td", "th"} & set(self.open) and self.cells:
            self.cells[-1][-1] += data


CHAPTERS = {
    "Copies": "components",
    "Pairs near the threshold": "edges",
    "Evaluation images in the pile": "leaks",
    "Images like the seed sets": "retrieved",
    "Balance between concepts": "balanced",
}


@pytest.fixture(scope="module")
def page(summary: Summary, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write(path, summary, "Curation <of> demo", "preset & more")
    return path.read_text()


def test_the_page_is_whole_small_and_needs_nothing_else(page: str) -> None:
    parsed = Page(page)
    assert len(page.encode()) < report.LIMIT_BYTES
    for _, attributes in parsed.attributes:
        for name in ("src", "href", "data", "poster", "srcset", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#"))
    assert not re.search(r"https?://|@import|url\(|<script|<link|<iframe|\son\w+=", page)
    targets = {attributes.get("id") for _, attributes in parsed.attributes}
    links = [a["href"] for tag, a in parsed.attributes if tag == "a"]
    assert links and all(link and link[1:] in targets for link in links)
    assert len(set(links)) == len(links)


def test_every_picture_says_what_it_is(page: str) -> None:
    images = [a for tag, a in Page(page).attributes if tag == "img"]
    assert len(images) > 300 and all(a.get("alt") for a in images)
    charts = [a for tag, a in Page(page).attributes if a.get("role") == "img"]
    assert len(charts) > 8 and all(a.get("aria-label") for a in charts)


def test_names_from_outside_are_escaped(page: str) -> None:
    assert "<script" not in page and "alert('1')" not in page
    assert "web/&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;&#34;&amp;&#39;" in page
    assert "Curation &lt;of&gt; demo" in page and "cannot identify image &lt;file&gt;" in page


def test_the_source_table_adds_up(run: Run, page: str) -> None:
    cells = Page(page).cells
    start = next(i for i, row in enumerate(cells) if row and row[0] == "source")
    names = ["kept", *(r for r in REASONS[1:] if run.reasons()[r])]
    assert cells[start][1:] == ["in", *(WORDS[reason].name for reason in names)]
    expected = Counter((row.source, row.reason) for row in run.rows)
    table = {}
    for line in cells[start + 1 :]:
        table[line[0]] = [int(cell.replace(",", "")) for cell in line[1:]]
        if line[0] == "total":
            break
    total = table.pop("total")
    assert set(table) == {row.source for row in run.rows} and HOSTILE in table
    for source, (whole, *parts) in table.items():
        assert parts == [expected[source, reason] for reason in names] and whole == sum(parts)
    assert total == [sum(column) for column in zip(*table.values(), strict=True)]
    assert total[0] == len(run.rows) == sum(total[1:])


def test_many_sources_are_added_up_in_one_row(summary: Summary, tmp_path: Path) -> None:
    from dataclasses import replace

    many = {f"s{i:03d}": Counter({"kept": i, "flat": 1}) for i in range(100)}
    counts = replace(summary.counts, by_source=many, rows=sum(range(100)) + 100)
    write(tmp_path / "r.html", replace(summary, counts=counts))
    cells = Page((tmp_path / "r.html").read_text()).cells
    smaller = next(row for row in cells if row and row[0] == "70 smaller sources")
    assert smaller[1:] == [f"{sum(range(70)) + 70:,}", f"{sum(range(70)):,}", "70"]


def test_the_first_lines_are_the_result_and_the_balance(run: Run, page: str) -> None:
    kept = run.reasons()["kept"]
    assert page.index(f"{kept:,} of 2,000 images are kept") < page.index("The funnel")
    assert f"2,000 in = {kept:,} kept + {2000 - kept:,} left out" in page


def test_chapters_come_in_the_order_of_the_work(page: str) -> None:
    titles = Page(page).titles
    order = [
        "What was left out, and why",
        "Images that fail a quality rule",
        "The same file or the same pixels",
        "Copies",
        "Pairs near the threshold",
        "How the threshold was chosen",
        "Evaluation images in the pile",
        "Images like the seed sets",
        "Balance between concepts",
        "Map",
        "What it cost",
    ]
    assert [title for title in titles if title in order] == order
    for title in ("The largest groups", "Groups picked by chance", "Suspected chains"):
        assert title in titles


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_stage_that_was_off_is_not_in_the_report(run: Run, tmp_path: Path, chapter: str) -> None:
    names = ["decisions", "fingerprint", "quality", "exact", *CHAPTERS.values()]
    folders = {n: str(run.root / n) for n in names if n != CHAPTERS[chapter]}
    summary = summarise(run.root, Facts(leaked=run.leaked, threshold=0.9), folders)
    write(tmp_path / "r.html", summary)
    titles = Page((tmp_path / "r.html").read_text()).titles
    assert chapter not in titles
    assert {c for c in CHAPTERS if c in titles} == set(CHAPTERS) - {chapter}
    assert "How the threshold was chosen" not in titles and "What it cost" not in titles


def test_no_images_at_all(tmp_path: Path) -> None:
    empty = write_run(tmp_path / "run", images=0, files=1)
    summary = summarised(empty)
    assert summary.rows == 0 and sentence(summary) == "No images went in, so none are kept."
    everything(summary, tmp_path)


def test_one_image(tmp_path: Path) -> None:
    one = write_run(tmp_path / "run", images=1, files=1, off=["balanced", "retrieved"])
    summary = summarised(one)
    said = everything(summary, tmp_path)
    assert sentence(summary) == "1 of 1 image is kept (100\u00a0%); nothing was left out."
    assert "No two images are copies" in said and "Map" not in Page(said).titles
    assert "Images that fail a quality rule" not in Page(said).titles


def test_nothing_removed_and_everything_removed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", images=40, files=2, off=["balanced", "retrieved", "leaks"])
    for reason, expected in (("kept", "40 of 40 images are kept"), ("flat", "0 of 40 images")):
        for row in run.rows:
            row.reason, row.rule, row.part = reason, "", ""
        from tests.curate import made_up

        made_up._write(run, 2, {"balanced", "retrieved", "leaks", "edges", "components"})
        folders = {n: str(run.root / n) for n in ("fingerprint", "quality", "exact", "decisions")}
        said = everything(summarise(run.root, folders=folders), tmp_path)
        assert expected in said and not summarise(run.root, folders=folders).counts.problems


def everything(summary: Summary, folder: Path) -> str:
    """Makes all there is, and checks that it is well-formed."""
    write(folder / "r.html", summary)
    said = (folder / "r.html").read_text()
    Page(said)
    for pixels in pictures(summary).values():
        assert pixels.shape[0] == pixels.shape[1]
    assert all(np.isfinite(v) for v in metrics(summary).values())
    assert note(summary).splitlines()[0] == sentence(summary)
    tables(summary)
    return said


def test_too_large_a_report_gets_smaller_pictures(
    summary: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "LIMIT_BYTES", 1_000_000)
    write(tmp_path / "r.html", summary)
    said = (tmp_path / "r.html").read_text()
    assert len(said.encode()) <= 1_000_000 and "Suspected chains" in Page(said).titles


def test_twenty_thousand_points_fit(summary: Summary, tmp_path: Path) -> None:
    from dataclasses import replace

    assert summary.map is not None
    places = np.random.default_rng(0).random((20_000, 2))
    wide = replace(
        summary.map, places=places, rows=tuple(range(20_000)), reasons=("kept",) * 20_000
    )
    write(tmp_path / "a.html", summary)
    write(tmp_path / "b.html", replace(summary, map=wide))
    more = (tmp_path / "b.html").stat().st_size - (tmp_path / "a.html").stat().st_size
    assert 0 < more < 300_000


def test_grids_are_square_and_show_the_images(run: Run, summary: Summary) -> None:
    grids = pictures(summary)
    names = {"removed", "copies", "borderline", "leaks", "seeds", "clusters", "map"}
    assert set(grids) == names
    for name, pixels in grids.items():
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        assert pixels.shape[0] == pixels.shape[1] and picture_key(f"curate/{name}")
    first = summary.components and summary.components.largest[0].members[0]
    assert first
    frame = grids["copies"][0:5, 116:228]
    assert np.all(frame == np.array(RGB["kept"]))
    inner = grids["copies"][5:107, 121:223].astype(float)
    with Image.open(io.BytesIO(run.rows[first.row].thumbnail)) as image:
        grown = np.asarray(image.convert("RGB").resize((102, 102))).astype(float)
    assert abs(inner.mean() - grown.mean()) < 25


@pytest.mark.parametrize(
    "lengths, columns, white",
    [([1], 2, 0.5), ([3], 3, 0.5), ([2, 2], 3, 0.4), ([6] * 7, 7, 0), ([20] * 9, 9, 0)],
)
def test_grids_of_a_few_pictures_are_small(lengths: list[int], columns: int, white: float) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (50, 50), "red").save(stream, "JPEG")
    lines = [Line("name", [Cell(stream.getvalue())] * n) for n in lengths]
    pixels = square(lines)
    assert pixels.shape == (columns * CELL + (columns - 1) * GAP,) * 2 + (3,)
    step = CELL + GAP
    cells = [
        pixels[y * step + CELL // 2, x * step + CELL // 2]
        for y in range(columns)
        for x in range(1, columns)
    ]
    shown = sum(int(cell[0]) > 200 and int(cell[1]) < 90 for cell in cells)
    assert shown == min(sum(lengths), len(cells)) and shown >= (1 - white) * len(cells)


def test_metrics_are_the_counts(run: Run, summary: Summary) -> None:
    values, reasons = metrics(summary), run.reasons()
    assert values["curate/rows_in"] == 2000 and values["curate/kept"] == reasons["kept"]
    removed = {r: values[f"curate/removed/{r}"] for r in REASONS if r != "kept"}
    assert removed == {r: reasons[r] for r in removed}
    assert values["curate/kept"] + sum(removed.values()) == 2000
    assert values["curate/components"] == len(run.components)
    assert values["curate/largest_component"] == max(map(len, run.components.values()))
    assert values["curate/leaks/cats"] == reasons["leaks_evaluation"]
    assert values["curate/threshold"] == 0.9 and values["curate/expected_recall"] == 0.914
    assert values["curate/effective_concepts_after"] > values["curate/effective_concepts_before"]
    assert values["curate/seconds/fingerprint"] == 40
    assert all(metric_name(name) == name and isinstance(values[name], float) for name in values)


def test_tables_are_rectangular_and_short(run: Run, summary: Summary) -> None:
    named = tables(summary)
    assert len(named) == 7
    for columns in named.values():
        assert len({len(values) for values in columns.values()}) == 1
        assert all(len(values) <= 500 for values in columns.values())
    sources = named["curate_sources"]
    assert sum(sources["in"]) == 2000 and sum(sources["kept"]) == run.reasons()["kept"]
    sizes = named["curate_components"]
    assert sum(sizes["components"]) == len(run.components)


def test_more_than_500_sources_are_added_up(summary: Summary) -> None:
    from dataclasses import replace

    many = {f"s{i:04d}": Counter({"kept": 2}) for i in range(1200)}
    counts = replace(summary.counts, by_source=many, rows=2400)
    sources = tables(replace(summary, counts=counts))["curate_sources"]
    assert len(sources["in"]) == 500 and sum(sources["in"]) == sum(sources["kept"]) == 2400


def test_the_note_begins_with_the_result(run: Run, summary: Summary) -> None:
    lines = note(summary).splitlines()
    assert lines[0].startswith(f"{run.reasons()['kept']:,} of 2,000 images are kept")
    assert "| same file again (`duplicate_bytes`) |" in note(summary)
    assert len(note(summary)) < 8000


def test_a_broken_balance_is_the_first_thing_said(summary: Summary, tmp_path: Path) -> None:
    from dataclasses import replace

    broken = replace(summary, counts=replace(summary.counts, problems=("3 images are lost",)))
    write(tmp_path / "r.html", broken)
    said = (tmp_path / "r.html").read_text()
    assert said.index("The balance does not hold: 3 images are lost.") < said.index("are kept")
    assert "The balance holds" not in said
    assert "**The balance does not hold:** 3 images are lost." in note(broken)


def test_how_sure_the_threshold_is_is_said(run: Run, tmp_path: Path) -> None:
    known = calibration() | {"warning": "12 images are few"}
    write(tmp_path / "r.html", summarise(run.root, Facts(leaked=run.leaked, calibration=known)))
    said = (tmp_path / "r.html").read_text()
    assert "0.880 – 0.915" in said and "1 in 625,000" in said
    assert "copies of 500 of the images were made in nine ways" in said
    assert "37 pairs of the sample were copies of each other and did not count." in said
    assert 'class="problem">Mind: 12 images are few. Look at the pairs near' in said
    default = {name: None for name in ("low", "high", "reached", "recall")}
    known |= default | {"recalls": {}, "curve": [], "copies": 0}
    write(tmp_path / "r.html", summarise(run.root, Facts(leaked=run.leaked, calibration=known)))
    said = (tmp_path / "r.html").read_text()
    assert "It is a default: there were too few images to measure one." in said


def test_a_threshold_set_by_hand_counts(run: Run, tmp_path: Path) -> None:
    summary = summarise(run.root, Facts(leaked=run.leaked, threshold=0.95))
    write(tmp_path / "r.html", summary)
    assert "How the threshold was chosen" not in (tmp_path / "r.html").read_text()
    assert summary.edges is not None
    assert summary.edges.above == sum(s > 0.95 for _, _, s in run.edges)


def test_small_pictures_are_enlarged() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (32, 20), "red").save(stream, "JPEG")
    page = render("t", [Gallery([Group([Tile(stream.getvalue())])])])
    assert 'class="enlarged"' in page and 'width="96" height="60"' in page
    stream = io.BytesIO()
    Image.new("RGB", (60, 96), "red").save(stream, "JPEG")
    page = render("t", [Gallery([Group([Tile(stream.getvalue())])])])
    assert 'class="enlarged"' not in page and 'width="60" height="96"' in page


def test_words_exist_for_every_reason() -> None:
    for words in (WORDS, RGB):
        assert set(words) == set(REASONS)
    assert sorted(r for _, stage in STAGES for r in stage) == sorted(set(REASONS) - {"kept"})
    assert len({words.colour for words in WORDS.values()}) == len(REASONS)
    assert len(set(RGB.values())) == len(REASONS)


@pytest.mark.long
def test_every_section_is_drawn_at_every_size(summary: Summary) -> None:
    for side in (1200, 250, 120):
        Page(render("t", sections(summary), side=side))


@pytest.mark.parametrize(
    "part, whole, said",
    [
        (0, 10, "0 %"),
        (10, 10, "100 %"),
        (1, 100_000, "< 0.1 %"),
        (99_999, 100_000, "> 99.9 %"),
        (1, 3, "33.3 %"),
        (0, 0, "–"),
    ],
)
def test_shares_never_round_to_none_or_all(part: int, whole: int, said: str) -> None:
    assert share(part, whole).replace("\u00a0", " ") == said


def test_numbers_in_words() -> None:
    assert [phrase(n, "balanced_out") for n in (1, 1200)] == [
        "1 is too many of its kind",
        "1,200 are too many of their kind",
    ]
    assert phrase(1, "duplicate_near") == "1 is a copy of another image"
    assert phrase(1, "duplicate_bytes") == "1 is a file that comes twice"
    assert phrase(1, "flat") == "1 shows almost nothing"
    assert phrase(1, "undecodable") == "1 cannot be read"
    assert similarity(1.0) == "1.000" and similarity(0.99996) == "> 0.999"
    assert similarity(0.8765) == "0.876" or similarity(0.8765) == "0.877"
    assert [time_of(s) for s in (0.4, 59.7, 60, 3599.6, 7500)] == [
        "0.4 s",
        "1 min 0 s",
        "1 min 0 s",
        "1 h 0 min",
        "2 h 5 min",
    ]
