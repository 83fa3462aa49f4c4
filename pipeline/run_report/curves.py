"""Curves of the journal: k-NN and loss to begin with, all others folded; flat ones are said."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.report.page import Chart, Fold, Mark, Section, Text
from pipeline.run_report.facts import RunFacts, Steps
from pipeline.run_report.words import GROUPS, metric_name, stage_name, unit_of

FIRST = ("eval", "loss", "health", "optim", "perf", "data")
BOTH_CHANGE = "Student and teacher both change, so it need not fall."
NO_LABELS = (
    "Without labels nothing says how good the vectors are. A rank that falls towards 1 is a "
    "collapse."
)
SCORE = re.compile(r"(^|/)(knn\d+_top1|segmentation_\w+_miou)$")
HEALTHY = ("eval/rank_me", "health/effective_rank", "health/feature_std")

Series = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Curves:
    """The metrics of a stage.

    Attributes:
        moving: series by metric that have two values and more, which differ.
        flat: by metric the one value that it has throughout.
    """

    moving: Series
    flat: Mapping[str, float]

    @classmethod
    def of(cls, steps: Steps) -> Curves:
        """From metrics by step."""
        series: Series = {}
        for step, values in steps.items():
            for name, value in values.items():
                series.setdefault(name, []).append((float(step), value))
        series = {name: rows for name, rows in series.items() if len(rows) > 1}
        flat = {}
        for name, rows in series.items():
            first = rows[0][1]
            if math.isfinite(first) and all(y == first for _, y in rows):
                flat[name] = first
        moving = {name: rows for name, rows in series.items() if name not in flat}
        return cls(moving, flat)


def learning(facts: RunFacts) -> Iterator[Section]:
    """The score while training and the loss; without labels the rank of the vectors."""
    curves = Curves.of(facts.steps("pretrain"))
    marks = _kept(facts)
    yield from _scores(facts, curves, marks)
    losses = [name for name in curves.moving if name.rpartition("/")[2] == "total"]
    if losses:
        series, grey = {"loss": curves.moving[losses[0]]}, {"loss": "var(--c6)"}
        yield Chart(series, "Loss", BOTH_CHANGE, marks=marks, colours=grey)


def _scores(facts: RunFacts, curves: Curves, marks: tuple[Mark, ...]) -> Iterator[Section]:
    """The curve of the score that chose the checkpoint; without labels that of the rank."""
    moving = {name: rows for name, rows in curves.moving.items() if SCORE.search(name)}
    flat = {name: value for name, value in curves.flat.items() if SCORE.search(name)}
    if moving:
        name = _deciding(facts, list(moving))
        title, share = f"{metric_name(name)}, while training", "share right" * ("knn" in name)
        series = {metric_name(name): moving[name]}
        yield Chart(series, title, _limited(facts), y_label=share, marks=marks)
    elif flat:
        name = _deciding(facts, list(flat))
        said = f"{flat[name]:.3g} at every evaluation, so there is no curve."
        yield Text(said, f"{metric_name(name)}, while training", wide=False)
    elif there := [name for name in HEALTHY if name in curves.moving]:
        title = metric_name(there[0])
        title = title[:1].upper() + title[1:]
        yield Chart({title: curves.moving[there[0]]}, title, NO_LABELS, marks=marks)


def _deciding(facts: RunFacts, names: list[str]) -> str:
    """The metric that chose the checkpoint, else the one of the card, else the first."""
    best = facts.result("pretrain").get("best") or {}
    score = facts.card.score if facts.card else ""
    wanted = (str(best.get("name", "")), f"eval/{score}", f"eval/knn{facts.config.evaluate.k}_top1")
    return next((name for name in wanted if name in names), names[0])


def _kept(facts: RunFacts) -> tuple[Mark, ...]:
    """A line at the step whose weights are the result."""
    step = facts.result("evaluate").get("step")
    return (Mark(float(step), f"step {step:,} is kept"),) if isinstance(step, int) and step else ()


def _limited(facts: RunFacts) -> str:
    """Whether values while training are of fewer images than the bars."""
    limit, card = facts.config.evaluate.during_training, facts.card
    sets = [one.images for one in (card.reference, card.queries) if one] if card else []
    if limit is None or not any(number > limit for number in sets):
        return ""
    return (
        f"At most {limit:,} images of each set are asked while training, so values differ from "
        "those of the bars."
    )


def all_curves(facts: RunFacts) -> Fold | None:
    """Every curve, a chart for each group of metrics; None where there is none."""
    sections: list[Section] = []
    said: list[str] = []
    for stage in facts.stages():
        curves = Curves.of(facts.steps(stage))
        sections += _charts(stage, curves.moving)
        zeros = [metric_name(name) for name, value in curves.flat.items() if value == 0]
        others = [f"{metric_name(n)} {v:,.4g}" for n, v in curves.flat.items() if v != 0]
        where = f"{stage_name(stage)[:1].upper()}{stage_name(stage)[1:]}: "
        if zeros:
            said.append(f"{where}0 throughout, so without a chart: {', '.join(zeros)}.")
        if others:
            said.append(f"{where}the same throughout: {', '.join(others)}.")
    if said:
        sections.append(Text("\n\n".join(said)))
    if not sections:
        return None
    return Fold(sections, "All curves", "losses, rates, health, speed")


def _charts(stage: str, series: Series) -> Iterator[Chart]:
    groups: dict[tuple[str, str], Series] = {}
    for name, rows in series.items():
        groups.setdefault((name.rpartition("/")[0], unit_of(name)), {})[name] = rows
    ranks = {group: rank for rank, group in enumerate(FIRST)}
    for key in sorted(groups, key=lambda key: (ranks.get(key[0], len(FIRST)), *key)):
        group = key[0]
        title = GROUPS.get(group, group.replace("_", " ").replace("/", ", ") or "Metrics")
        title = title if stage == "pretrain" else f"{title}: {stage_name(stage)}"
        for part in by_size(groups[key]):
            yield Chart({metric_name(name): rows for name, rows in part.items()}, title, last=True)


def by_size(series: Series) -> list[Series]:
    """Splits series so that none is flattened by one 20 times as large on the same axis."""
    sizes = {
        name: max((abs(y) for _, y in rows if math.isfinite(y)), default=0.0)
        for name, rows in series.items()
    }
    charts: list[Series] = []
    smallest = 0.0
    for name in sorted(sizes, key=lambda name: sizes[name]):
        if not charts or (smallest and sizes[name] > 20 * smallest):
            charts.append({})
            smallest = 0.0
        smallest = smallest or sizes[name]
        charts[-1][name] = series[name]
    return charts
