"""The section of the report about the threshold: what it is, where from, how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.curate.report_summary import Summary
from pipeline.curate.report_words import COLOURS, images, share, similarity
from pipeline.track.charts import Bar, Bars, Curve
from pipeline.track.gallery import Heading, Numbers
from pipeline.track.plane import Mark
from pipeline.track.report import Section

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
    found: list[Section] = [Heading("How the threshold was chosen", _story(known)), _numbers(known)]
    threshold = float(known["threshold"])
    line = (Mark(threshold, f"threshold {similarity(threshold)}"),)
    curve = [(float(t), float(r), float(f)) for t, r, f in known["curve"]]
    positive = [f for _, _, f in curve if f > 0]
    if curve:
        found += [
            Curve(
                {"recall": [(t, 100 * r) for t, r, _ in curve]},
                "Copies found",
                "Higher thresholds miss more copies.",
                x_label="threshold",
                y_label="% of copies found",
                y_range=(0.0, 100.0),
                marks=line,
                colours={"recall": COLOURS["duplicate_near"]},
            ),
            Curve(
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
        found.append(Bars(bars, "Copies found, by what was done to them", said, whole=1.0))
    return found


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
