"""The report of a curation: one page, pictures and numbers for MLflow. Reads tables, needs no Ray.

summary = summarise(root, Facts(steps=steps, calibration=calibration))
write(path, summary)
tracker.metrics(0, metrics(summary))
for key, pixels in pictures(summary).items():
    tracker.picture(f"curate/{key}", 0, pixels)
for name, columns in tables(summary).items():
    tracker.table(name, columns)
tracker.note(note(summary))

Here is the page: the result, the funnel, the reasons and the images that rules removed. What is
said of copies and of other sets is in `copy_sections` and `set_sections`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.curate.report.copy_sections import copy_sections
from pipeline.curate.report.set_sections import (
    cluster_sections,
    cost_sections,
    leak_sections,
    map_sections,
    seed_sections,
)
from pipeline.curate.report.summary import Summary
from pipeline.curate.report.tiles import keeper_tile, tile
from pipeline.curate.report.words import (
    COLOURS,
    REMOVED,
    RULES,
    WORDS,
    images,
    largest,
    listed,
    name_of,
    phrase,
    share,
)
from pipeline.report.page import (
    Bar,
    Bars,
    Column,
    Gallery,
    Group,
    Heading,
    Matrix,
    Numbers,
    Section,
    Text,
    write_report,
)

LIMIT_BYTES = 8_000_000
QUALITY = ("undecodable", "too_small", "aspect", "flat")
UNREADABLE = 10  # shown; there is nothing to see
SOURCES = 30  # rows of the table; the others are added up in one


def write(path: Path, summary: Summary, title: str = "Curation", subtitle: str = "") -> None:
    """Writes the report as one HTML file of at most 8 MB that needs nothing else."""
    write_report(path, title, sections(summary), subtitle, limit=LIMIT_BYTES)


def sections(summary: Summary) -> list[Section]:
    """The whole report in its order; what was off does not appear."""
    page = [_result(summary), *_where(summary), *_rules(summary)]
    page += copy_sections(summary)
    page += leak_sections(summary)
    page += seed_sections(summary)
    page += cluster_sections(summary)
    page += map_sections(summary)
    page += cost_sections(summary)
    return page


def sentence(summary: Summary) -> str:
    """The result: how many stay, how many go, mostly why."""
    if not summary.rows:
        return "No images went in, so none are kept."
    gone = summary.rows - summary.kept
    verb = "is" if summary.rows == 1 else "are"
    part = share(summary.kept, summary.rows)
    said = f"{summary.kept:,} of {images(summary.rows)} {verb} kept ({part})"
    if not gone:
        return f"{said}; nothing was left out."
    reasons = {reason: summary.counts.reasons[reason] for reason in REMOVED}
    why = [phrase(n, reason) for reason, n in largest(reasons)]
    if len(why) > 4:
        others = gone - sum(n for _, n in largest(reasons)[:3])
        why = [*why[:3], f"{others:,} have one of {len(why) - 3} other reasons"]
    why = why or ["their reasons are not known"]
    return f"{said}; {gone:,} {'is' if gone == 1 else 'are'} left out: {listed(why)}."


def balance(summary: Summary) -> str:
    """Whether all that went in is accounted for."""
    removed = summary.rows - summary.kept
    sources = len(summary.counts.by_source)
    of = f"in total and for each of {sources:,} sources" if sources > 1 else "in total"
    return (
        f"The balance holds: {summary.rows:,} in = {summary.kept:,} kept + {removed:,} left out, "
        f"{of}. Every image has exactly one reason."
    )


def _result(summary: Summary) -> Section:
    problems = summary.counts.problems
    numbers = [
        (f"{summary.rows:,}", "images in"),
        (f"{summary.kept:,}", f"kept ({share(summary.kept, summary.rows)})"),
        (f"{summary.rows - summary.kept:,}", "left out"),
    ]
    if summary.components:
        numbers.append((f"{summary.components.count:,}", "groups of copies"))
    if summary.leaks:
        leaked = sum(leak.leaked for leak in summary.leaks)
        numbers.append((f"{leaked:,}", "evaluation images found in the pile"))
    if summary.clusters:
        tops = summary.clusters.tops
        numbers.append(
            (
                f"{tops.effective_before:,.0f} → {tops.effective_after:,.0f}",
                "effective number of concepts",
            )
        )
    said = sentence(summary)
    return Numbers(
        numbers,
        text=said,
        note="" if problems else f"✓ {balance(summary)}",
        problem="The balance does not hold: " + "; ".join(problems) + "." if problems else "",
    )


def _where(summary: Summary) -> list[Section]:
    if not summary.rows:
        return []
    total = summary.rows
    bars = [Bar("images in", ((total, COLOURS["kept"]),), f"{total:,}")]
    before = total
    for stage in summary.stages:
        gone = [(count, COLOURS[reason]) for reason, count in stage.removed.items()]
        removed = before - stage.left
        why = listed([phrase(n, r) for r, n in stage.removed.items()] or ["none go"])
        bars.append(
            Bar(
                stage.name,
                ((stage.left, COLOURS["kept"]), *gone),
                f"{stage.left:,} ({share(stage.left, total)})",
                f"− {removed:,}: {why}" if len(stage.removed) > 1 else why,
            )
        )
        before = stage.left
    funnel = Bars(
        bars,
        "The funnel: of all images, how many …",
        "Green is what is left after a stage, other colours what it took. An image that several "
        "stages would take counts at the first of them.",
        whole=total,
        head=("stage", "left"),
    )
    counts = summary.counts.reasons
    reasons = [
        Bar(
            name_of(reason),
            ((counts[reason], COLOURS[reason]),),
            f"{counts[reason]:,} ({share(counts[reason], total)})",
            WORDS[reason].meaning,
        )
        for reason in ("kept", *REMOVED)
        if counts[reason]
    ]
    meanings = Bars(reasons, "Reasons, and what they mean", whole=total, head=("reason", "images"))
    head = Heading("What was left out, and why", "Every image that went in has one reason.")
    if summary.kept == total:  # nothing to chart
        return [head, Text(f"All {images(total)} stay.")]
    took = sum(bool(stage.removed) for stage in summary.stages)
    sources = [_sources(summary)] if len(summary.counts.by_source) > 1 else []
    return [head, *([funnel] if took > 1 else []), meanings, *sources]


def _sources(summary: Summary) -> Section:
    counts = summary.counts.reasons
    used = [reason for reason in REMOVED if counts[reason]]
    unknown = sorted(set(counts) - {"kept", *REMOVED})
    columns = [Column("in", "images that went in"), Column("kept", "", COLOURS["kept"])]
    columns += [Column(name_of(r), f"{WORDS[r].meaning} ({r})", COLOURS[r]) for r in used]
    columns += [Column(reason) for reason in unknown]

    def line(of: Mapping[str, int]) -> list[int]:
        return [sum(of.values()), *(of.get(r, 0) for r in ("kept", *used, *unknown))]

    by_size = sorted(summary.counts.by_source.items(), key=lambda kv: (-sum(kv[1].values()), kv[0]))
    above = _above(list(summary.counts.by_source))
    rows = {source.removeprefix(above) or "(unknown)": line(of) for source, of in by_size[:SOURCES]}
    if len(by_size) > SOURCES:
        smaller = [line(of) for _, of in by_size[SOURCES:]]
        rows[f"{len(smaller):,} smaller sources"] = [
            sum(part) for part in zip(*smaller, strict=True)
        ]
    return Matrix(
        columns,
        rows,
        line(counts),
        corner="source",
        title="From which source",
        note="In each row, “in” is the sum of the other columns. Shading is the share of the "
        "source's images.",
    )


def _above(sources: Sequence[str]) -> str:
    """The input that all sources are folders of, which need not be said of each: `pool/`."""
    inputs = {source.partition("/")[0] for source in sources}
    whole = all(source.partition("/")[2] for source in sources)
    return f"{inputs.pop()}/" if len(inputs) == 1 and whole else ""


def _rules(summary: Summary) -> list[Section]:
    counts = summary.counts
    groups = []
    for (reason, rule), rows in counts.samples.items():
        if reason not in QUALITY:
            continue
        number = counts.by_rule[reason, rule]
        said = RULES.get(rule, "")
        title = f"{name_of(reason)}: {images(number)}"
        tiles = []
        for row in rows:
            one = summary.shown.get(row)
            value = one.score if one else None
            words = f"{value:.3g}" if value is not None else _error(one.error if one else "")
            tiles.append(tile(summary, row, first=words))
        if reason == "undecodable":
            tiles = tiles[:UNREADABLE]
        about = f"Below each: {said}. The limit is quality.{rule}." if said else ""
        groups.append((reason, Group(tiles, title, about)))
    groups.sort(key=lambda kv: QUALITY.index(kv[0]))
    sections: list[Section] = []
    if groups:
        sections.append(
            Heading("Images that fail a quality rule", "At most 24 of each, by chance.")
        )
        sections.append(Gallery([group for _, group in groups]))
    sections += _others(summary)
    return sections


def _others(summary: Summary) -> list[Section]:
    """Equal files with what is kept instead of them."""
    rows = [
        row
        for (reason, rule), sample in summary.counts.samples.items()
        if reason == "duplicate_bytes" or (reason == "duplicate_near" and rule == "pixels")
        for row in sample
    ]
    groups = []
    for row in rows[:12]:
        if row in summary.keepers:
            keeper = keeper_tile(summary, summary.keepers[row])
            groups.append(Group([keeper, tile(summary, row)], close=True))
    if not groups:
        return []
    number = sum(
        count
        for (reason, rule), count in summary.counts.by_rule.items()
        if reason == "duplicate_bytes" or rule == "pixels"
    )
    text = f"{images(number)}, equal in every byte or in every pixel to one that stays (framed)."
    return [Heading("The same file or the same pixels", text), Gallery(groups, flow=True)]


def _error(error: str) -> str:
    return error if len(error) <= 60 else f"{error[:57]}…"
