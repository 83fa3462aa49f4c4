"""What few readers need, folded: scores, curves, what stages said, tables, pictures, the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.report.page import Fold, Links, Picture, Section, Table
from pipeline.run_report.curves import all_curves
from pipeline.run_report.facts import RunFacts
from pipeline.run_report.result import all_scores
from pipeline.run_report.words import stage_name
from pipeline.track import journal

ELSEWHERE = ("curate", "evaluate")  # stages whose tables their own pages show better
TABLES = {"recipe": "The recipe, and why", "bad_images": "Files that are no usable images"}
PICTURES = {"crops": "Crops as the student sees them; what a mask hides is violet"}
FILES = ("config.yaml", "plan.yaml", "metrics.jsonl")


def details(facts: RunFacts) -> Iterator[Section]:
    """All that is folded, one line each."""
    if facts.card and (table := all_scores(facts.card)):
        remarks = [f"{one.rstrip('.')}." for one in facts.card.remarks]
        note = " ".join([*remarks, "Whole pages with mistakes: see the link to all scores."])
        yield Fold([Table(table.columns, note=note)], "All scores", "with 95 % intervals")
    if facts.change:
        yield Fold([Table(facts.change)], "Before and after", "all scores")
    if fold := all_curves(facts):
        yield fold
    if pictures := list(_pictures(facts)):
        yield Fold(pictures, "Pictures of the training", "crops and masks")
    if said := {name: str(r["text"]) for name, r in facts.results.items() if r.get("text")}:
        names = [stage_name(name) for name in said]
        table = Table({"stage": names, "result": list(said.values())})
        yield Fold([table], "What each stage said", "one sentence each")
    if tables := list(_tables(facts)):
        yield Fold(tables, "Tables", ", ".join(one.title.lower() for one in tables))
    there = [(name, name) for name in FILES if (facts.path / name).is_file()]
    if there:
        yield Fold([Links(there)], "Files", "the recipe, the plan, the journal")


def _tables(facts: RunFacts) -> Iterator[Table]:
    for stage in facts.stages():
        if stage.rpartition("/")[2] in ELSEWHERE:
            continue
        for path in sorted((facts.path / "tables" / stage).glob("*.json")):
            columns = _columns(path)
            if any(columns.values()):
                title = next((TABLES[x] for x in TABLES if path.stem.startswith(x)), "")
                yield Table(columns, title or path.stem.replace("_", " ").capitalize())


def _columns(path: Path) -> Mapping[str, list[Any]]:
    data = json.loads(path.read_text())
    return {
        name.replace("_", " "): [row[i] for row in data["data"]]
        for i, name in enumerate(data["columns"])
    }


def _pictures(facts: RunFacts) -> Iterator[Picture]:
    """The latest of each kind that nothing above shows."""
    latest: dict[str, tuple[int, str]] = {}
    for _, event in journal.read(facts.path / journal.FILE_NAME, having=b'"picture"'):
        if event["run"] == "pretrain" and "picture" in event:
            spec = event["picture"]
            latest[spec["key"].rpartition("/")[2]] = (int(event["step"]), spec["file"])
    for key, title in PICTURES.items():
        if key in latest and (facts.path / latest[key][1]).is_file():
            step, file = latest[key]
            yield Picture(trimmed(facts.path / file), title, f"step {step:,}")


def trimmed(path: Path) -> Any:
    """A picture without the white around it."""
    import numpy as np
    from PIL import Image, ImageChops

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    box = ImageChops.invert(image).getbbox()
    return np.asarray(image.crop(box) if box else image)
