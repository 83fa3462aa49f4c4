"""Sections of the report about copies: examples, similarities, sizes, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.curate.report.copies import BIN, Band, Component, Looks, Pair
from pipeline.curate.report.pictures import component_text, member_tile, pair_tiles
from pipeline.curate.report.summary import Summary
from pipeline.curate.report.words import COLOURS, images, share, similarity
from pipeline.report.page import (
    Bar,
    Bars,
    Chart,
    Gallery,
    Group,
    Heading,
    Histogram,
    Mark,
    Numbers,
    Section,
)

FRAME = (
    "A green frame marks an image that stays; below the others, how alike they are to it. That may "
    "be less than the threshold, where they are like another member of their group."
)
CHAINS = " Of a group with several green frames, some images were too unlike the first one."


def copy_sections(summary: Summary) -> list[Section]:
    """What the search for copies found, and how the threshold was chosen."""
    sections: list[Section] = []
    if summary.components is not None:
        sections += _groups(summary)
    if summary.edges is not None and summary.edges.count:
        sections += _pairs(summary)
    if summary.looks is not None and summary.looks.pairs:
        sections += _looks(summary.looks, summary)
    return sections + threshold_sections(summary)


def _looks(looks: Looks, summary: Summary) -> list[Section]:
    differ = looks.pairs - looks.same - looks.undecided
    text = (
        f"Of {looks.pairs:,} pairs above the threshold that hold groups together, {looks.same:,} "
        f"show the same; {differ:,} differ somewhere, and both images stay."
    )
    if looks.undecided:
        text += f" About {looks.undecided:,} nothing could be said, so they stay too."
    if not looks.apart:
        return [Heading("The second look", text)]
    groups = [
        Group(pair_tiles(summary, Pair(one.a, one.b, one.similarity)), below=one.text, close=True)
        for one in looks.apart
    ]
    title = "Looked alike, kept"
    return [Heading("The second look", text), Gallery(groups, title, flow=True, wide=False)]


def _groups(summary: Summary) -> list[Section]:
    parts = summary.components
    assert parts is not None
    gone = summary.counts.reasons["duplicate_near"]
    text = (
        f"{parts.rows:,} images are in {parts.count:,} groups of copies; {gone:,} of them are "
        f"left out for it. The largest group has {images(parts.largest_size)}."
        if parts.count
        else "No two images are copies of one another."
    )
    sections: list[Section] = [Heading("Copies", text)]
    if summary.edges is not None and summary.edges.count:
        sections.append(_similarities(summary))
    if not parts.count:
        return sections
    sections.append(
        Chart(
            {"groups": [(float(size), float(n)) for size, n in parts.sizes.items()]},
            "Groups by size",
            "Both axes are logarithmic. Most groups should be pairs; a few huge ones mean "
            "placeholders, logos, or a threshold that is too low.",
            x_label="images in a group",
            y_label="groups",
            x_log=True,
            y_log=True,
            stems=True,
        )
    )
    about = FRAME + CHAINS if parts.chains else FRAME
    sections.append(_gallery(summary, parts.largest, "The largest groups", about))
    if parts.count > len(parts.largest):
        sections.append(_gallery(summary, parts.random, "Groups picked by chance", FRAME))
    if parts.chains:
        sections.append(
            _gallery(
                summary,
                parts.chains,
                "Suspected chains",
                f"A is like B and B like C, but A is not like C: {images(parts.chained)} "
                f"{'is' if parts.chained == 1 else 'are'} too unlike the first image kept of "
                "their group (orange frames). Where chains are split, such images get a keeper of "
                "their own.",
            )
        )
    return sections


def _gallery(summary: Summary, components: Sequence[Component], title: str, text: str) -> Section:
    groups = [
        Group(
            [member_tile(summary, member) for member in one.members],
            component_text(one),
        )
        for one in components
    ]
    return Gallery(groups, title, text, flow=True)


def _pairs(summary: Summary) -> list[Section]:
    edges, threshold = summary.edges, summary.threshold
    assert edges is not None
    assert threshold is not None
    galleries: list[Section] = []
    for band in edges.bands:
        verdict = "looked at" if band.copies else "not copies"
        groups = [
            Group(
                pair_tiles(summary, pair),
                below=f"{similarity(pair.similarity)}: {verdict}",
                close=True,
            )
            for pair in sorted(band.pairs, key=lambda pair: pair.similarity)
        ]
        galleries.append(Gallery(groups, _band(band), flow=True, wide=False))
    head = Heading(
        "Pairs near the threshold",
        f"Pairs more alike than {similarity(threshold)} get a second look at their details, which "
        "says whether they are copies. Copies below the line call for a lower threshold.",
    )
    charts = [] if summary.components is not None else [_similarities(summary)]
    return [head, *charts, *galleries]


def _similarities(summary: Summary) -> Section:
    edges, threshold = summary.edges, summary.threshold
    assert edges is not None
    assert threshold is not None
    line = (Mark(threshold, f"threshold {similarity(threshold)}"),)
    return Histogram(
        edges.bins,
        edges.counts,
        "How alike the compared pairs are",
        f"{edges.above:,} pairs above the threshold, {edges.count - edges.above:,} below it. Only "
        "pairs that hold groups together are kept, so large groups have few.",
        x_label=f"similarity (bars of {BIN:g})",
        y_label="pairs",
        y_log=max(edges.counts) > 50 * max(1, sorted(edges.counts)[len(edges.counts) // 2]),
        marks=line,
        colours=("var(--c6)", COLOURS["duplicate_near"]),
    )


def _band(band: Band) -> str:
    low = f"{similarity(band.low)} to " if band.low > 0 else "up to "
    high = similarity(min(1.0, band.high))
    verdict = "looked at" if band.copies else "not copies"
    return f"{low}{high}: {band.count:,} {'pair' if band.count == 1 else 'pairs'}, {verdict}"


# ---- The section of the report about the threshold: what it is, where from, how sure it is.


# What was done to the images, as it is told; the keys are those of `attacks.ATTACKS`.
DONE = {
    "jpeg": "saved as a poor JPEG (quality 30)",
    "half": "made half as large",
    "crop": "cropped to 60 to 90 % of the area",
    "mirror": "mirrored",
    "light": "other brightness and contrast",
    "blur": "blurred",
    "overlay": "framed, with a line of text",
    "grey": "made grey",
    "rotate": "turned by 5 degrees",
}


def threshold_sections(summary: Summary) -> list[Section]:
    """How the threshold was chosen, and what it finds; nothing where it was not calibrated."""
    known = summary.calibration
    if known is None:
        return []
    sections: list[Section] = [
        Heading("How the threshold was chosen", _story(known)),
        _numbers(known),
    ]
    threshold = float(known["threshold"])
    line = (Mark(threshold, f"threshold {similarity(threshold)}"),)
    curve = [(float(t), float(r), float(f)) for t, r, f in known["curve"]]
    positive = [f for _, _, f in curve if f > 0]
    if curve:
        sections += [
            Chart(
                {"recall": [(t, 100 * r) for t, r, _ in curve]},
                "Copies found",
                "Higher thresholds miss more copies.",
                x_label="threshold",
                y_label="% of copies found",
                y_range=(0.0, 100.0),
                marks=line,
                colours={"recall": COLOURS["duplicate_near"]},
            ),
            Chart(
                {"false": [(t, f) for t, _, f in curve]},
                "Different images taken for copies",
                "Logarithmic; where the line ends, no pair was."
                if len(positive) < len(curve)
                else "Logarithmic.",
                x_label="threshold",
                y_label="share of pairs",
                y_log=True,
                marks=line,
                colours={"false": COLOURS["leaks_evaluation"]},
            ),
        ]
    bars = [
        Bar(
            DONE.get(str(name), str(name)),
            ((float(part), COLOURS["duplicate_near"]),),
            share(float(part), 1),
        )
        for name, part in sorted(known["recalls"].items(), key=lambda kv: (-kv[1], kv[0]))
    ]
    if bars:
        said = "Of copies made in each way, the share that is found at the threshold."
        sections.append(Bars(bars, "Copies found, by what was done to them", said, whole=1.0))
    return sections


def _story(known: Mapping[str, Any]) -> str:
    if known["recall"] is None:
        return "It is a default: there were too few images to measure one."
    text = (
        f"{images(int(known['images']))} of this very set, drawn by chance, were compared with "
        f"each other: {int(known['negatives']):,} pairs of different images. The threshold lies "
        f"where {_rare(float(known['target']))} such pairs would be taken for copies"
    )
    if known["extrapolated"]:
        text += " (so few are not counted: the shape of the tail says where they begin)"
    text += (
        f". Then copies of {int(known['attacked']):,} of the images were made in nine ways, to "
        "see how many of them are found."
    )
    if known["copies"]:
        pairs = "1 pair" if known["copies"] == 1 else f"{int(known['copies']):,} pairs"
        text += f" {pairs} of the sample were copies of each other and did not count."
    return text


def _numbers(known: Mapping[str, Any]) -> Section:
    threshold = float(known["threshold"])
    numbers = [(similarity(threshold), "threshold")]
    if known["low"] is not None:
        span = f"{similarity(float(known['low']))} – {similarity(float(known['high']))}"
        numbers.append((span, "where it would lie with other images of the set (95 %)"))
    if known["recall"] is not None:
        numbers.append((share(float(known["recall"]), 1), "of the copies made are found"))
    if known["reached"] is not None:
        what = "pairs of one half of the images pass the threshold of the other half"
        numbers.append((_counted(float(known["reached"]), int(known["negatives"])), what))
    warning = str(known["warning"])
    problem = f"Mind: {warning}. Look at the pairs near the threshold." if warning else ""
    return Numbers(numbers, problem=problem)


def _rare(rate: float) -> str:
    return f"one in {1 / rate:,.0f}"


def _counted(rate: float, pairs: int) -> str:
    return f"1 in {1 / rate:,.0f}" if rate > 0 else f"none of {pairs:,}"
