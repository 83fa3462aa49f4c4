"""Sections of the report about the whole: clusters, the map, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.curate.report_clusters import Level, ranked
from pipeline.curate.report_map import GRID
from pipeline.curate.report_mosaic import Mosaic
from pipeline.curate.report_summary import Summary
from pipeline.curate.report_tiles import KEEP, tile
from pipeline.curate.report_words import COLOURS, images, name_of, seconds, share, size
from pipeline.curate.tables import REASONS
from pipeline.track.charts import Bar, Bars, Curve, Points
from pipeline.track.gallery import Gallery, Group, Heading
from pipeline.track.report import Section, Table


def cluster_sections(summary: Summary) -> list[Section]:
    """Sizes of the clusters before and after, and pictures of a few."""
    parts = summary.clusters
    if parts is None or not parts.considered:
        return []
    levels = [("clusters of the top level", parts.tops), ("finest clusters", parts.leaves)]
    if parts.tops.clusters == parts.leaves.clusters and (
        parts.tops.before.tolist() == parts.leaves.before.tolist()
    ):
        levels = levels[1:]
    text = (
        f"{parts.chosen:,} of {images(parts.considered)} are chosen, so that large clusters do not "
        "drown small ones. The effective number is how many clusters of equal size would be as "
        "diverse; higher is more even."
    )
    columns: Mapping[str, Sequence[Any]] = {
        "": [name for name, _ in levels],
        "clusters": [level.clusters for _, level in levels],
        "effective before": [round(level.effective_before, 1) for _, level in levels],
        "effective after": [round(level.effective_after, 1) for _, level in levels],
        "largest before": [_largest(level.before) for _, level in levels],
        "largest after": [_largest(level.after) for _, level in levels],
        "left unsampled": [level.unsampled for _, level in levels],
    }
    found: list[Section] = [Heading("Balance between concepts", text), Table(columns)]
    found += [_ranks(name, level) for name, level in levels]
    groups = [
        Group(
            [
                tile(summary, row, first="chosen" if yes else "not chosen", frame=KEEP * yes)
                for row, yes in sheet.rows
            ],
            f"{images(sheet.before)}, {sheet.after:,} chosen",
        )
        for sheet in parts.sheets
        if sheet.rows
    ]
    words = "From the largest to the smallest; images by chance. A cluster should show one thing."
    found.append(Gallery(groups, "A few clusters of the top level", words))
    return found


def _ranks(name: str, level: Level) -> Section:
    return Curve(
        {"before": ranked(level.before), "after": ranked(level.after)},
        f"Sizes of the {name}",
        "From the largest cluster to the smallest, both axes logarithmic. A flat line is an even "
        "sample.",
        x_label="rank of the cluster",
        y_label="images",
        x_log=True,
        y_log=True,
        colours={"before": "var(--c6)", "after": COLOURS["kept"]},
    )


def _largest(sizes: object) -> str:
    numbers = list(sizes)  # type: ignore[call-overload]
    return f"{numbers[0]:,} ({share(numbers[0], sum(numbers))})" if numbers else "–"


def map_sections(summary: Summary) -> list[Section]:
    """Where the images lie that go and those that stay, and what is there to see."""
    found = summary.map
    if found is None:
        return []
    groups: dict[str, list[tuple[float, float]]] = {}
    for reason in REASONS:
        mine = [i for i, one in enumerate(found.reasons) if one == reason]
        if mine:
            groups[name_of(reason)] = [tuple(found.places[i]) for i in mine]  # type: ignore[misc]
    colours = {name_of(reason): COLOURS[reason] for reason in REASONS}
    how = (
        f"the two main directions of their vectors ({found.method}), which hold "
        f"{share(found.explained, 1)} of their differences"
        if found.explained
        else found.method
    )
    text = (
        f"{images(len(found.rows))} by chance, laid out by {how}. Images that look alike are close "
        "to one another."
    )
    pictures = [(x, y, summary.shown[row]) for x, y, row in found.pictures if row in summary.shown]
    return [
        Heading("Map", text),
        Points(groups, colours, "What became of images, by place"),
        Mosaic(
            pictures,
            GRID,
            "What is there",
            "One image of each place. Faded ones are left out.",
        ),
    ]


def cost_sections(summary: Summary) -> list[Section]:
    """Time, memory and bytes of each step."""
    costs = summary.costs
    if not costs:
        return []
    wall, cpu = sum(c.seconds for c in costs), sum(c.cpu_s for c in costs)
    columns: Mapping[str, Sequence[Any]] = {
        "step": [c.step for c in costs],
        "wall time, this run": [seconds(c.seconds) for c in costs],
        "CPU time": [seconds(c.cpu_s) for c in costs],
        "rows": [c.rows for c in costs],
        "rows/s of CPU": [f"{c.rows_per_s:,.0f}" if c.rows_per_s else "–" for c in costs],
        "written": [size(c.bytes) for c in costs],
        "peak memory": [size(c.peak_bytes) if c.peak_bytes else "–" for c in costs],
        "tasks": [c.tasks for c in costs],
        "reused": [c.reused for c in costs],
    }
    reused = sum(c.reused for c in costs)
    text = (
        f"{seconds(wall)} of this run, {seconds(cpu)} of CPU time in all; {reused:,} of "
        f"{sum(c.tasks for c in costs):,} tasks were finished before and used again."
    )
    bars = [Bar(c.step, ((c.cpu_s, "var(--c0)"),), seconds(c.cpu_s)) for c in costs]
    return [
        Heading("What it cost", text),
        Bars(bars, "CPU time of each step"),
        Table(columns, "Steps"),
    ]
