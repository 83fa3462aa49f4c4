"""Sections of the report about copies: examples, similarities, sizes, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.curate.report.copies import BIN, Band, Component, Components, Edges, Looks
from pipeline.curate.report.summary import Summary
from pipeline.curate.report.tiles import component_group, pair
from pipeline.curate.report.words import COLOURS, images, listed, share, similarity
from pipeline.report.page import (
    Bar,
    Bars,
    Chart,
    Gallery,
    Heading,
    Histogram,
    Mark,
    Numbers,
    Section,
    Text,
)

BARS = 4  # fewer are a sentence, not a chart

FRAME = (
    "A green frame marks an image that stays; below the others, how alike they are to it. That may "
    "be less than the threshold, where they are like another member of their group."
)
CHAINS = " Of a group with several green frames, some images were too unlike the first one."


def copy_sections(summary: Summary) -> list[Section]:
    """What the search for copies found, and how the threshold was chosen."""
    sections: list[Section] = []
    edges = summary.edges if summary.edges and summary.edges.count else None
    bars = [_similarities(summary, edges)] if edges else []
    if summary.components is not None:
        head, *groups = _groups(summary, summary.components)
        sections += [head, *bars, *groups]
    if edges:
        head, *bands = _pairs(summary, edges)
        sections += [head, *([] if summary.components else bars), *bands]
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
    groups = [pair(summary, (one.a, one.b), one.text) for one in looks.apart]
    title = "Looked alike, kept"
    return [Heading("The second look", text), Gallery(groups, title, flow=True)]


def _groups(summary: Summary, parts: Components) -> list[Section]:
    gone = summary.counts.reasons["duplicate_near"]
    text = (
        f"{parts.rows:,} images are in {parts.count:,} groups of copies; {gone:,} of them are "
        f"left out for it. The largest group has {images(parts.largest_size)}."
        if parts.count
        else "No two images are copies of one another."
    )
    if not parts.count:
        return [Heading("Copies", text)]
    sizes = _sizes(parts)

    def gallery(components: Sequence[Component], title: str, about: str) -> Section:
        return Gallery(
            [component_group(summary, one) for one in components], title, about, flow=True
        )

    about = FRAME + CHAINS if parts.chains else FRAME
    sections: list[Section] = [Heading("Copies", text), sizes]
    sections.append(gallery(parts.largest, "The largest groups", about))
    if parts.count > len(parts.largest):
        sections.append(gallery(parts.random, "Groups picked by chance", FRAME))
    if parts.chains:
        about = (
            f"A is like B and B like C, but A is not like C: {images(parts.chained)} "
            f"{'is' if parts.chained == 1 else 'are'} too unlike the first image kept of their "
            "group (orange frames). Where chains are split, such images get a keeper of their own."
        )
        sections.append(gallery(parts.chains, "Suspected chains", about))
    return sections


def _sizes(parts: Components) -> Section:
    """How many groups there are of each size; of few sizes a sentence."""
    if len(parts.sizes) < BARS:
        said = [
            f"{n:,} group{'s' * (n != 1)} of {size:,} images" for size, n in parts.sizes.items()
        ]
        return Text(f"There {'is' if sum(parts.sizes.values()) == 1 else 'are'} {listed(said)}.",
                    "Groups by size")  # fmt: skip
    return Chart(
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


def _pairs(summary: Summary, edges: Edges) -> list[Section]:
    assert summary.threshold is not None
    head = Heading(
        "Pairs near the threshold",
        f"Pairs more alike than {similarity(summary.threshold)} get a second look at their "
        "details, which says whether they are copies. Copies below the line call for a lower "
        "threshold.",
    )
    galleries: list[Section] = []
    for band in edges.bands:
        verdict = "looked at" if band.copies else "not copies"
        groups = [
            pair(summary, (one.a, one.b), f"{similarity(one.similarity)}: {verdict}")
            for one in sorted(band.pairs, key=lambda one: one.similarity)
        ]
        galleries.append(Gallery(groups, _band(band), flow=True, wide=False))
    return [head, *galleries]


def _similarities(summary: Summary, edges: Edges) -> Section:
    assert summary.threshold is not None
    if sum(bool(count) for count in edges.counts) < BARS:
        return Text(
            f"{edges.above:,} pairs lie above the threshold of {similarity(summary.threshold)}, "
            f"{edges.count - edges.above:,} below it.",
            "How alike the compared pairs are",
        )
    middle = max(1, sorted(edges.counts)[len(edges.counts) // 2])
    return Histogram(
        edges.bins,
        edges.counts,
        "How alike the compared pairs are",
        f"{edges.above:,} pairs above the threshold, {edges.count - edges.above:,} below it. Only "
        "pairs that hold groups together are kept, so large groups have few.",
        x_label=f"similarity (bars of {BIN:g})",
        y_label="pairs",
        y_log=max(edges.counts) > 50 * middle,  # else most bars could not be seen
        marks=(_line(summary.threshold),),
        colours=("var(--c6)", COLOURS["duplicate_near"]),
    )


def _line(threshold: float) -> Mark:
    return Mark(threshold, f"threshold {similarity(threshold)}")


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
    line = (_line(float(known["threshold"])),)
    curve = [(float(t), float(r), float(f)) for t, r, f in known["curve"]]
    positive = [f for _, _, f in curve if f > 0]
    if curve and len({r for _, r, _ in curve}) == 1 and not positive:
        said = f"At every threshold {share(curve[0][1], 1)} of the copies are found and no pair of "
        sections.append(Text(f"{said}different images is taken for copies."))
    elif curve:
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
        f"where one in {1 / float(known['target']):,.0f} such pairs would be taken for copies"
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


def _counted(rate: float, pairs: int) -> str:
    return f"1 in {1 / rate:,.0f}" if rate > 0 else f"none of {pairs:,}"
