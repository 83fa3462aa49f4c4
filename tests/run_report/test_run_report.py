"""The report of a run, read as a browser reads it: order, words, pictures, what is hidden."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.card.files import CARD, EVALUATE, read_card
from pipeline.card.verdict import verdict_of
from pipeline.report.units import bytes_of, time_of
from pipeline.run_report.curves import Curves, by_size
from pipeline.run_report.details import trimmed
from pipeline.run_report.facts import RunFacts
from pipeline.run_report.result import chosen_rows, compared, three_bars
from pipeline.run_report.words import metric_name, stage_name
from pipeline.run_report.write import LIMIT_BYTES, has_report, write_run_report
from tests.card.cards import card_of, contender
from tests.run_report.run_folders import (
    HASH,
    unlabelled_card,
    usual_card,
    usual_examples,
    write_run,
)

VOID = {"meta", "img", "br", "col"}
HEX = re.compile(r"[0-9a-f]{32}")
IDENTIFIER = re.compile(r"\b[a-z]+(_[a-z0-9]+)+\b|\b[a-z]+: [a-z_]+$")


class Page(HTMLParser):
    """Tags closed in order, and what a test asks for; `outside` is the text that nobody unfolds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.titles: list[str] = []
        self.outside = ""
        self.folded = ""
        self.statement = ""
        self.code = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            if tag in ("h1", "h2", "h3", "summary"):
                self.titles.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"style", "script"} & set(self.open):
            return
        if {"h1", "h2", "h3", "summary"} & set(self.open):
            self.titles[-1] += data
        if self.open and self.open[-1] == "p" and "statement" in (self._class("p") or ""):
            self.statement += data
        if "code" in self.open:
            self.code += data
        if "details" in self.open:
            self.folded += data
        else:
            self.outside += data

    def _class(self, tag: str) -> str:
        known = [attributes for name, attributes in self.tags if name == tag]
        return known[-1].get("class") or "" if known else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_result_comes_first_and_the_words_are_those_of_the_card(tmp_path: Path) -> None:
    facts = write_run(tmp_path, usual_card(), usual_examples())
    page = Page(write_run_report(facts).read_text())
    card = read_card(facts.path / "evaluate", terms=False)
    assert page.statement == card.verdict.text and card.verdict.text.startswith("Learnt")
    order = ["k-NN, 20 neighbours", "Learning", "Loss", "Neighbours", "What it sees", "Curation"]
    order += ["Data", "Cost", "Use it", "Details", "All scores", "All curves"]
    places = [next(i for i, t in enumerate(page.titles) if t.startswith(one)) for one in order]
    assert places == sorted(places)
    assert page.titles[0] == "leaves"
    said = page.outside
    assert said.index(card.verdict.text) < said.index("before training")
    assert said.index("before training") < said.index("while training")


def test_three_bars_are_the_values_of_the_card_with_their_intervals() -> None:
    card = usual_card()
    assert [one.role for one in compared(card)] == ["model", "step0", "colours"]
    bars = three_bars(card).bars
    for bar, one in zip(bars, compared(card), strict=True):
        interval = one.results[card.score].interval
        assert bar.parts[0][0] == interval.value and bar.ends == (interval.low, interval.high)
        assert bar.text.startswith(f"{interval.value:.2f} ±")
    assert [bar.name for bar in bars] == ["trained", "before training", "colours alone"]
    started = contender("init", 0.7, "dinov2_vits14")
    pixels = contender("raw_pixels", 0.9)
    other = card_of(card.contenders[0], started, pixels, *card.contenders[3:])
    names = [bar.name for bar in three_bars(other).bars]
    assert names == ["trained", "started from", "pixels alone"]


def test_no_machinery_is_visible(tmp_path: Path) -> None:
    facts = write_run(tmp_path, usual_card(), usual_examples())
    text = write_run_report(facts).read_text()
    page = Page(text)
    assert not HEX.search(page.outside) and HASH not in page.outside
    attributes = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if value and name not in ("src", "d", "points", "style")
    ]
    assert not any(HEX.search(value) for value in attributes if HASH not in value)
    for title in page.titles:
        assert not IDENTIFIER.search(title), title
    assert "34.5 MB" in page.outside and "88 MB" in page.outside and "34500000" not in page.outside
    assert "dino local" not in " ".join(page.titles) and "0 throughout" in page.folded
    assert "dino local" in page.folded and "the same throughout: workers 2" in page.folded


def test_the_page_needs_nothing_else_and_stays_small(tmp_path: Path) -> None:
    facts = write_run(tmp_path, usual_card(), usual_examples())
    path = write_run_report(facts)
    text = path.read_text()
    page = Page(text)
    assert path.stat().st_size < LIMIT_BYTES == 3_000_000
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "poster", "data", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:")
        if tag == "a":
            assert not (attributes["href"] or "").startswith("/")
    assert not re.search(r"@import|url\(|<link|<iframe|fetch\(|<script src", text)
    images = page.all("img")
    assert images and all(image.get("alt") for image in images)
    assert all(one.get("aria-label") for _, one in page.tags if one.get("role") == "img")


def test_neighbours_say_right_and_wrong_in_colour_and_sign(tmp_path: Path) -> None:
    facts = write_run(tmp_path, usual_card(), usual_examples())
    page = Page(write_run_report(facts).read_text())
    frames = [one["class"] for one in page.all("figure") if "tile" in (one.get("class") or "")]
    assert frames[:3] == ["tile query", "tile right", "tile wrong"]
    said = page.outside
    assert "✓ cat" in said and "✗ dog" in said and "0.91" in said and "1 of 2 shown" in said
    looks = [one["alt"] or "" for one in page.all("img")]
    assert "components of cat, step 0" in looks and "attention of cat, trained" in looks


def test_curation_is_five_numbers_and_a_link(tmp_path: Path) -> None:
    facts = write_run(tmp_path, usual_card())
    page = Page(write_run_report(facts).read_text())
    for number in ("1,000images in", "900kept", "60copies of another", "30fail a", "10copies of"):
        assert number in page.outside
    assert "curate/report.html" in [one["href"] for one in page.all("a")]
    off = replace(facts, results={k: v for k, v in facts.results.items() if k != "curate"})
    assert "Nothing was curated" in Page(write_run_report(off).read_text()).outside


def test_a_run_without_labels_has_the_verdict_of_its_card_and_no_bars(tmp_path: Path) -> None:
    facts = write_run(tmp_path, unlabelled_card())
    page = Page(write_run_report(facts).read_text())
    assert page.statement == unlabelled_card().verdict.text
    assert page.statement.startswith("No verdict on quality without labels")
    assert "What can be said without labels" in page.titles and "RankMe" in page.outside
    assert not any("neighbours" in title for title in page.titles) and "Loss" in page.titles
    assert "RankMe" in page.titles


def test_a_guarded_and_an_adapted_run_say_so(tmp_path: Path) -> None:
    card = usual_card()
    init = replace(card.contenders[1], role="init", name="dinov2_vits14")
    card = replace(card, contenders=(card.contenders[0], init, *card.contenders[2:]))
    card = replace(card, verdict=verdict_of(card))
    sentence = "Ended at step 20: k-NN fell below the start."
    done = {"text": "x", "step": 20, "guard": sentence}
    facts = write_run(tmp_path, card, pretrain=done)
    scores = ["k-NN, 10 neighbours", "k-NN, 20 neighbours", "retrieval, mAP", "RankMe"]
    change = {"score": scores, "before": ["0.50 ± 0.02"] * 4, "after": ["0.80 ± 0.02"] * 4}
    facts = replace(facts, change=change, change_note="The same images for both.")
    assert chosen_rows(facts)["score"] == [scores[1], scores[2]]
    text = write_run_report(facts).read_text()
    page = Page(text)
    assert "The same images for both" in text
    assert scores[0] in page.folded
    assert "Better than what it started from" in page.statement and sentence in page.statement
    assert page.titles.index("The guard ended the training") < page.titles.index("Before and after")
    assert "started from" in page.outside and "dinov2_vits14" in page.outside


def test_a_run_of_packing_alone_has_a_page_too(tmp_path: Path) -> None:
    facts = write_run(tmp_path, curate=None, pretrain=None, evaluate=None, export=None)
    page = Page(write_run_report(facts).read_text())
    assert "Data" in page.titles and not page.statement


def test_lines_to_copy_load_the_weights(tmp_path: Path) -> None:
    facts = write_run(tmp_path, usual_card())
    text = write_run_report(facts).read_text()
    page = Page(text)
    assert f"api.embedder_of({facts.place!r})" in page.code and "timm.create_model" in page.code
    assert text.count('<button class="copy"') == 2 and "navigator.clipboard" in text
    for snippet in page.code.split("import timm")[:1]:
        compile(snippet, "snippet", "exec")


def test_weights_at_a_uri_are_loaded_by_this_package_alone(tmp_path: Path) -> None:
    facts = write_run(tmp_path, usual_card())
    facts = replace(facts, folder=replace(facts.folder, uri="s3://bucket/runs/leaves"))
    code = Page(write_run_report(facts).read_text()).code
    assert "api.embedder_of('s3://bucket/runs/leaves')" in code and "timm" not in code


def test_time_of_stages_inside_of_a_round_counts_once(tmp_path: Path) -> None:
    facts = write_run(tmp_path, usual_card())
    rows = [
        {"run": "round-1", "open": {}, "attempt": 1, "ts": 1_000},
        {"run": "round-1/pretrain", "open": {}, "attempt": 1, "ts": 2_000},
        {"run": "round-1/pretrain", "end": "FINISHED", "ts": 7_202_000},
        {"run": "round-1", "end": "FINISHED", "ts": 7_203_000},
    ]
    with (facts.path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert facts.seconds()["round-1"] == 7202 and facts.seconds()["round-1/pretrain"] == 7200
    outside = Page(write_run_report(facts).read_text()).outside
    assert "2 h 0 minin all stages" in outside and "4 h" not in outside


def test_a_damaged_card_is_said_and_the_rest_of_the_page_stands(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = write_run(tmp_path, usual_card())
    (facts.path / EVALUATE / CARD).write_text("{")
    with caplog.at_level("WARNING", logger="pipeline"):
        again = RunFacts.of(facts.config, facts.folder, facts.results)
    assert again.card is None and "without the card" in caplog.text
    assert "Curation" in Page(write_run_report(again).read_text()).titles


def test_a_page_is_missed_where_it_is_gone_or_older_than_a_stage(tmp_path: Path) -> None:
    facts = write_run(tmp_path, usual_card())
    assert not has_report(facts.folder, ["pack", "export"])
    facts.folder.mark_done("pack", "key", {})
    write_run_report(facts)
    assert has_report(facts.folder, ["pack", "export"])
    facts.folder.mark_done("export", "key", {})
    stamp = (facts.path / "report.html").stat().st_mtime_ns + 10**9
    os.utime(facts.path / "export" / "_done.json", ns=(stamp, stamp))
    assert has_report(facts.folder, ["pack"]) and not has_report(facts.folder, ["pack", "export"])


def test_the_run_in_mlflow_is_linked_where_its_address_is_known(tmp_path: Path) -> None:
    facts = write_run(tmp_path, usual_card())
    assert facts.mlflow() == ""
    known = {"uri": "http://host:5000", "experiment_id": "3", "runs": {"pipeline": HASH}, "sent": 1}
    text = json.dumps({"key": "k", "servers": {"http://host:5000": known}})
    (facts.path / "track.json").write_text(text)
    links = [one["href"] for one in Page(write_run_report(facts).read_text()).all("a")]
    address = f"http://host:5000/#/experiments/3/runs/{HASH}?workflowType=machine_learning"
    assert address in links
    local = text.replace("http://host:5000", "sqlite:////a/b.db")
    (facts.path / "track.json").write_text(local)
    assert facts.mlflow() == ""


def test_flat_curves_are_told_apart_from_moving_ones() -> None:
    steps = {n: {"a": 0.0, "b": 2.0, "c": float(n), "once": 1.0} for n in range(5)}
    steps = {n: row if n < 1 else {k: v for k, v in row.items() if k != "once"}
             for n, row in steps.items()}  # fmt: skip
    curves = Curves.of(steps)
    assert set(curves.moving) == {"c"} and curves.flat == {"a": 0.0, "b": 2.0}
    split = by_size({"small": [(0, 0.1), (1, 0.2)], "large": [(0, 9.0), (1, 10.0)]})
    assert [set(part) for part in split] == [{"small"}, {"large"}]


@pytest.mark.parametrize(
    "said, expected",
    [
        (metric_name("eval/knn20_top1"), "k-NN, 20 neighbours"),
        (metric_name("optim/grad_norm"), "gradient norm"),
        (metric_name("perf/data_wait_fraction"), "share of data wait"),
        (metric_name("perf/memory_gib"), "memory (GiB)"),
        (stage_name("round-1/pretrain"), "training, round 1"),
        (time_of(4.21), "4.2 s"),
        (time_of(59.6), "1 min 0 s"),
        (time_of(7500), "2 h 5 min"),
        (time_of(180_000), "2 d 2 h"),
        (bytes_of(1_530_000), "1.53 MB"),
    ],
)
def test_words(said: str, expected: str) -> None:
    assert said == expected


def test_white_around_a_picture_is_cut_off(tmp_path: Path) -> None:
    pixels = np.full((90, 90, 3), 255, np.uint8)
    pixels[10:30, 20:60] = 7
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert trimmed(tmp_path / "a.png").shape == (20, 40, 3)
    Image.fromarray(np.full((9, 9, 3), 255, np.uint8)).save(tmp_path / "b.png")
    assert trimmed(tmp_path / "b.png").shape == (9, 9, 3)
