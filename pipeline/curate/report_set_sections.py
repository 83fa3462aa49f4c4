"""Sections of the report about other sets: evaluation images in the pile, and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.curate.report_sets import BINS, Leaks, Match, Retrieved
from pipeline.curate.report_summary import Summary
from pipeline.curate.report_tiles import match_tiles, other, tile
from pipeline.curate.report_words import COLOURS, images, share, similarity
from pipeline.track.charts import Histogram
from pipeline.track.gallery import Gallery, Group, Heading
from pipeline.track.plane import Mark
from pipeline.track.report import Section, Table


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
    columns: Mapping[str, Sequence[Any]] = {
        "evaluation set": [leak.name for leak in sets],
        "its images": [leak.images or "–" for leak in sets],
        "of them in the pile": [leak.leaked for leak in sets],
        "share": [share(leak.leaked, leak.images) for leak in sets],
        "images of the pile that match it best": [leak.rows for leak in sets],
        "left out for it": [rules.get(("leaks_evaluation", leak.name), 0) for leak in sets],
    }
    found: list[Section] = [Heading("Evaluation images in the pile", text)]
    found.append(Table(columns, "By evaluation set"))
    if removed > direct:
        more = removed - direct
        found[0] = Heading(
            "Evaluation images in the pile",
            f"{text} {direct:,} of them match themselves, {more:,} belong to a group of copies "
            "in which another one does.",
        )
    for leak in sets:
        if leak.rows:
            found += _leak(summary, leak)
    return found


def _leak(summary: Summary, leak: Leaks) -> list[Section]:
    def groups(matches: tuple[Match, ...]) -> list[Group]:
        return [
            Group(
                match_tiles(summary, match, leak.name, leak.pictures.get(match.query)),
                below=f"{similarity(match.similarity)} alike",
                close=True,
            )
            for match in matches
        ]

    text = "Dashed frame: the image of the evaluation set; beside it the image of the pile."
    found: list[Section] = [
        Gallery(groups(leak.top), f"{leak.name}: the most alike", text, flow=True)
    ]
    if leak.low:
        words = "If these are different images, the threshold is too low."
        title = f"{leak.name}: the least alike that still count"
        found.append(Gallery(groups(leak.low), title, words, flow=True, wide=False))
    if leak.low:
        limit = summary.leak_threshold
        marks = (Mark(limit, f"threshold {similarity(limit)}"),) if limit is not None else ()
        found.append(_histogram(leak.counts, f"{leak.name}: how alike the matches are", marks))
    return found


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
    found: list[Section] = [Heading("Images like the seed sets", text), Table(columns)]
    for one in sets:
        if one.rows:
            found += _seeds(summary, one)
    rows = [
        row
        for (reason, _), some in summary.counts.samples.items()
        if reason == "not_retrieved"
        for row in some
    ]
    if rows:
        left = Group(
            [tile(summary, row, first=f"{summary.shown[row].image_id[:8]}…") for row in rows]
        )
        found.append(Gallery([left], "Left out: like no seed image", "By chance.", wide=False))
    return found


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
