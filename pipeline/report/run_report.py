"""The report of a run, put together from what is in its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.report.page import Chart, Picture, Section, Table, write_report
from pipeline.track.journal import FILE_NAME, read, read_steps


def run_report(
    folder: Path, title: str, subtitle: str = "", sections: Sequence[Section] = ()
) -> Path:
    """Writes `report.html` of a run folder and returns its path.

    After the given sections (plan, results) come, stage by stage, the curves of the journal, the
    latest picture of each key, and the tables.
    """
    kept: list[Section] = list(sections)
    stages = dict.fromkeys(event["run"] for _, event in read(folder / FILE_NAME))
    for stage in stages:
        kept += stage_curves(folder, stage)
        kept += _pictures(folder, stage)
        kept += _tables(folder, stage)
    path = folder / "report.html"
    write_report(path, title, kept, subtitle)
    return path


def stage_curves(folder: Path, stage: str) -> list[Section]:
    """The charts of a stage from its journal: one a group of metrics (the text before `/`)."""
    rows = read_steps(folder / FILE_NAME, stage)
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for step, values in rows.items():
        for name, value in values.items():
            group, _, label = name.rpartition("/")
            groups.setdefault(group, {}).setdefault(label, []).append((step, value))
    first = ["eval", "loss", "health"]
    order = sorted(groups, key=lambda g: (first.index(g) if g in first else len(first), g))
    return [
        Chart(series, f"{stage}: {group or 'metrics'}", last=True)
        for group in order
        for series in _by_size(groups[group])
        if any(len(points) > 1 for points in series.values())  # one point is no curve
    ]


def _by_size(series: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """Splits series so that none is flattened by one 20 times as large on the same axis."""
    sizes = {
        name: max((abs(y) for _, y in points if math.isfinite(y)), default=0.0)
        for name, points in series.items()
    }
    charts: list[dict[str, Any]] = []
    smallest = 0.0
    for name in sorted(sizes, key=lambda name: sizes[name]):
        if not charts or (smallest and sizes[name] > 20 * smallest):
            charts.append({})
            smallest = 0.0
        smallest = smallest or sizes[name]
        charts[-1][name] = series[name]
    return charts


def _pictures(folder: Path, stage: str) -> list[Section]:
    latest: dict[str, tuple[int, str]] = {}
    for _, event in read(folder / FILE_NAME, having=b'"picture"'):
        if event["run"] == stage and "picture" in event:
            spec = event["picture"]
            latest[spec["key"]] = (event["step"], spec["file"])
    return [
        Picture(folder / file, f"{stage}: {key.removeprefix('pictures/')}", f"step {step:,}")
        for key, (step, file) in latest.items()
        if (folder / file).exists()
    ]


def _tables(folder: Path, stage: str) -> list[Section]:
    tables: list[Section] = []
    for path in sorted((folder / "tables" / stage).glob("*.json")):
        data = json.loads(path.read_text())
        columns = {name: [row[i] for row in data["data"]] for i, name in enumerate(data["columns"])}
        tables.append(Table(columns, f"{stage}: {path.stem}"))
    return tables
