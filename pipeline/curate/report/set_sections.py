"""Sections of the report about other sets: evaluation images in the pile, and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.curate.report.clusters import Level, ranked
from pipeline.curate.report.map import GRID
from pipeline.curate.report.sets import BINS, Leaks, Match, Retrieved
from pipeline.curate.report.summary import Summary
from pipeline.curate.report.tiles import GONE, KEEP, match_group, other, tile
from pipeline.curate.report.words import (
    COLOURS,
    images,
    listed,
    name_of,
    share,
    similarity,
)
from pipeline.curate.rows.tables import REASONS
from pipeline.report.page import (
    Bar,
    Bars,
    Chart,
    Fold,
    Gallery,
    Group,
    Heading,
    Histogram,
    Mark,
    Mosaic,
    Points,
    Section,
    Table,
    Text,
)
from pipeline.report.units import bytes_of, time_of

BARS = 4  # fewer are a sentence, not a chart
LONGEST = 6  # steps that are shown


def leak_sections(summary: Summary) -> list[Section]:
    """Per evaluation set: how much of it is in the pile, and which images."""
    if not summary.leaks:
        return []
    removed = summary.counts.reasons["leaks_evaluation"]
    direct = sum(leak.rows for leak in summary.leaks)
    text = (
        f"{images(removed)} {'is' if removed == 1 else 'are'} left out because models are tested "
        "with a copy of them."
        if removed
        else "No image of the pile is a copy of an image that models are tested with."
    )
    rules = summary.counts.by_rule
    sets = summary.leaks
    if not any(leak.leaked or leak.rows for leak in sets):
        named = [f"{leak.name} ({images(leak.images)})" if leak.images else leak.name
                 for leak in sets]  # fmt: skip
        return [Heading("Evaluation images in the pile", f"{text} Looked for: {listed(named)}.")]
    columns: Mapping[str, Sequence[Any]] = {
        "evaluation set": [leak.name for leak in sets],
        "its images": [leak.images or "–" for leak in sets],
        "of them in the pile": [leak.leaked for leak in sets],
        "share": [share(leak.leaked, leak.images) for leak in sets],
        "images of the pile that match it best": [leak.rows for leak in sets],
        "left out for it": [rules.get(("leaks_evaluation", leak.name), 0) for leak in sets],
    }
    if (more := removed - direct) > 0:
        text += (
            f" {direct:,} of them match themselves, {more:,} belong to a group of copies in which "
            "another one does."
        )
    sections: list[Section] = [Heading("Evaluation images in the pile", text)]
    sections.append(Table(columns, "By evaluation set"))
    return sections + [part for leak in sets if leak.rows for part in _leak(summary, leak)]


def _leak(summary: Summary, leak: Leaks) -> list[Section]:
    def groups(matches: tuple[Match, ...]) -> list[Group]:
        known = leak.pictures
        return [match_group(summary, one, leak.name, known.get(one.query)) for one in matches]

    text = "Dashed frame: the image of the evaluation set; beside it the image of the pile."
    sections: list[Section] = [
        Gallery(groups(leak.top), f"{leak.name}: the most alike", text, flow=True)
    ]
    if leak.low:
        words = "If these are different images, the threshold is too low."
        title = f"{leak.name}: the least alike that still count"
        sections.append(Gallery(groups(leak.low), title, words, flow=True, wide=False))
        limit = summary.leak_threshold
        marks = (Mark(limit, f"threshold {similarity(limit)}"),) if limit is not None else ()
        sections.append(_histogram(leak.counts, f"{leak.name}: how alike the matches are", marks))
    return sections


def seed_sections(summary: Summary) -> list[Section]:
    """Per seed set: what it asked for and got."""
    if not summary.retrieved:
        return []
    sets = summary.retrieved
    gone = summary.counts.reasons["not_retrieved"]
    columns: Mapping[str, Sequence[Any]] = {
        "seed set": [one.name for one in sets],
        "by": [one.part or "–" for one in sets],
        "seed images": [one.images or "–" for one in sets],
        "asked for": [one.asked for one in sets],
        "images delivered": [one.rows for one in sets],
        "collisions": [one.collisions for one in sets],
        "share of collisions": [share(one.collisions, one.asked) for one in sets],
        "clusters": [one.clusters or "–" for one in sets],
    }
    text = (
        "A collision is an image that several seed images ask for; it is taken once. "
        f"{images(gone)} that no seed asked for {'is' if gone == 1 else 'are'} left out."
    )
    sections: list[Section] = [Heading("Images like the seed sets", text), Table(columns)]
    for one in sets:
        if one.rows:
            sections += _seeds(summary, one)
    rows = [
        row
        for (reason, _), sample in summary.counts.samples.items()
        if reason == "not_retrieved"
        for row in sample
    ]
    if rows:
        left = Group([tile(summary, row) for row in rows])
        sections.append(Gallery([left], "Left out: like no seed image", "By chance.", wide=False))
    return sections


def _seeds(summary: Summary, one: Retrieved) -> list[Section]:
    groups = []
    for matches in one.seeds:
        query = matches[0].query
        tiles = [other(one.pictures.get(query), query, "seed image")]
        tiles += [tile(summary, m.row, first=f"{similarity(m.similarity)} alike") for m in matches]
        groups.append(Group(tiles))
    title = f"{one.name}: seed images and what came for them"
    text = "Seed images by chance (dashed frame), each with the most alike of its images."
    return [
        Gallery(groups, title, text),
        _histogram(one.counts, f"{one.name}: how alike what came is", ()),
    ]


def _histogram(counts: tuple[int, ...], title: str, marks: tuple[Mark, ...]) -> Section:
    used = [i for i, n in enumerate(counts) if n]
    if len(used) < BARS:
        low, high = -1 + 2 * used[0] / BINS, -1 + 2 * (used[-1] + 1) / BINS
        what = f"All {images(sum(counts))} have a similarity"
        return Text(f"{what} of {low:.2f} to {high:.2f}.", title, wide=False)
    first, last = max(0, used[0] - 2), min(BINS, used[-1] + 3)
    step = 2 / BINS
    ends = [round(-1 + step * i, 9) for i in range(first, last + 1)]
    if marks and marks[0].value < ends[0]:
        first = int((marks[0].value + 1) / step)
        ends = [round(-1 + step * i, 9) for i in range(first, last + 1)]
    return Histogram(
        ends,
        counts[first:last],
        title,
        x_label="similarity",
        marks=marks,
        colours=(COLOURS["leaks_evaluation"],) * 2 if marks else (COLOURS["not_retrieved"],) * 2,
    )


# ---- Sections of the report about the whole: clusters, the map, and what it cost.


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
    sections: list[Section] = [Heading("Balance between concepts", text), Table(columns)]
    sections += [_ranks(name, level) for name, level in levels]
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
    sections.append(Gallery(groups, "A few clusters of the top level", words))
    return sections


def _ranks(name: str, level: Level) -> Section:
    if level.clusters < BARS:
        return Text(
            f"Images before: {listed([f'{n:,}' for n in level.before.tolist()])}; "
            f"after: {listed([f'{n:,}' for n in level.after.tolist()] or ['none'])}.",
            f"Sizes of the {name}",
        )
    return Chart(
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
    layout = summary.map
    if layout is None:
        return []
    groups: dict[str, list[tuple[float, float]]] = {}
    for reason in REASONS:
        mine = [i for i, one in enumerate(layout.reasons) if one == reason]
        if mine:
            groups[name_of(reason)] = [tuple(layout.places[i]) for i in mine]  # type: ignore[misc]
    colours = {name_of(reason): COLOURS[reason] for reason in REASONS}
    how = (
        f"the two main directions of their vectors ({layout.method}), which hold "
        f"{share(layout.explained, 1)} of their differences"
        if layout.explained
        else layout.method
    )
    text = (
        f"{images(len(layout.rows))} by chance, laid out by {how}. Images that look alike are "
        "close to one another."
    )
    pictures = [
        (x, y, tile(summary, row, frame="" if summary.shown[row].reason == "kept" else GONE))
        for x, y, row in layout.pictures
        if row in summary.shown
    ]
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
    steps = summary.costs
    if not steps:
        return []
    columns: Mapping[str, Sequence[Any]] = {
        "step": [s.name for s in steps],
        "wall time, this run": [time_of(s.seconds) for s in steps],
        "CPU time": [time_of(s.cpu_s) for s in steps],
        "rows": [int(s.total("rows")) for s in steps],
        "rows/s of CPU": [f"{s.total('rows') / s.cpu_s:,.0f}" if s.cpu_s else "–" for s in steps],
        "written": [bytes_of(s.total("bytes")) for s in steps],
        "peak memory": [bytes_of(s.peak_bytes) if s.peak_bytes else "–" for s in steps],
        "tasks": [len(s.accounts) for s in steps],
        "reused": [s.reused for s in steps],
    }
    wall, cpu = sum(s.seconds for s in steps), sum(s.cpu_s for s in steps)
    text = (
        f"{time_of(wall)} of this run, {time_of(cpu)} of CPU time in all; "
        f"{sum(s.reused for s in steps):,} of {sum(len(s.accounts) for s in steps):,} tasks were "
        "finished before and used again."
    )
    longest = sorted(steps, key=lambda s: -s.cpu_s)[:LONGEST]
    bars = [Bar(_step(s.name), ((s.cpu_s, "var(--c0)"),), time_of(s.cpu_s)) for s in longest]
    if left := steps[LONGEST:]:
        spent = cpu - sum(s.cpu_s for s in longest)
        bars.append(Bar(f"{len(left):,} other steps", ((spent, "var(--c6)"),), time_of(spent)))
    return [
        Heading("What it cost", text),
        Bars(bars, "CPU time, the longest steps"),
        Fold([Table(columns)], "All steps", "time, memory and bytes of each"),
    ]


def _step(name: str) -> str:
    """`looks, edges, looked` of `looks/edges/looked`."""
    return name.replace("/", ", ").replace("_", " ")
