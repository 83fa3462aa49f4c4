"""Numbers of a curation for MLflow: metrics, tables of at most 500 rows, and a note."""

from __future__ import annotations

from typing import Any

from pipeline.curate.report.report import balance, sentence
from pipeline.curate.report.summary import Summary
from pipeline.curate.report.words import REMOVED, name_of, share, similarity
from pipeline.report.units import time_of

TABLE_ROWS = 500

Columns = dict[str, list[Any]]


def metrics(summary: Summary) -> dict[str, float]:
    """By name, all below `curate/`; those of a stage that was off are not there."""
    counts = summary.counts.reasons
    values: dict[str, float] = {
        "rows_in": summary.rows,
        "kept": summary.kept,
        "problems": len(summary.counts.problems),
    }
    if summary.rows:
        values["kept_fraction"] = summary.kept / summary.rows
    values |= {f"removed/{reason}": counts[reason] for reason in REMOVED}
    if summary.threshold is not None:
        values["threshold"] = summary.threshold
    if (known := summary.calibration) is not None:
        names = {"expected_recall": "recall", "false_positive_rate": "reached"}
        names |= {"threshold_low": "low", "threshold_high": "high"}
        values |= {name: float(known[of]) for name, of in names.items() if known[of] is not None}
    if summary.edges is not None:
        values["pairs"] = summary.edges.above
    if (parts := summary.components) is not None:
        values["components"] = parts.count
        values["largest_component"] = parts.largest_size
        values["chained"] = parts.chained
    for leak in summary.leaks:
        values[f"leaks/{leak.name}"] = leak.rows
        values[f"leaked_images/{leak.name}"] = leak.leaked
    for one in summary.retrieved:
        name = f"{one.name}/{one.part}" if one.part else one.name
        values[f"retrieved/{name}"] = one.rows
        values[f"collisions/{name}"] = one.collisions
    if (clusters := summary.clusters) is not None:
        values["effective_concepts_before"] = clusters.tops.effective_before
        values["effective_concepts_after"] = clusters.tops.effective_after
        values["effective_leaves_before"] = clusters.leaves.effective_before
        values["effective_leaves_after"] = clusters.leaves.effective_after
        values["leaves"] = clusters.leaves.clusters
        values["leaves_unsampled"] = clusters.leaves.unsampled
    for step in summary.costs:
        name = step.name.replace("/", "_")
        values[f"seconds/{name}"] = step.seconds
        values[f"cpu_s/{name}"] = step.cpu_s
        values[f"peak_bytes/{name}"] = step.peak_bytes
    return {f"curate/{name}": float(value) for name, value in values.items()}


def tables(summary: Summary) -> dict[str, Columns]:
    """By name, each of at most 500 rows; those of a stage that was off are not there."""
    named = {"curate_reasons": _reasons(summary), "curate_sources": _sources(summary)}
    if summary.components is not None:
        named["curate_components"] = _components(summary)
    if summary.edges is not None:
        named["curate_pairs"] = _pairs(summary)
    if summary.leaks:
        named["curate_leaks"] = _leaks(summary)
    if summary.retrieved:
        named["curate_retrieved"] = {
            "set": [one.name for one in summary.retrieved],
            "part": [one.part for one in summary.retrieved],
            "seed_images": [one.images for one in summary.retrieved],
            "asked": [one.asked for one in summary.retrieved],
            "delivered": [one.rows for one in summary.retrieved],
            "collisions": [one.collisions for one in summary.retrieved],
        }
    if summary.costs:
        named["curate_cost"] = {
            "step": [step.name for step in summary.costs],
            "tasks": [len(step.accounts) for step in summary.costs],
            "reused": [step.reused for step in summary.costs],
            "rows": [int(step.total("rows")) for step in summary.costs],
            "bytes": [int(step.total("bytes")) for step in summary.costs],
            "seconds": [step.seconds for step in summary.costs],
            "cpu_s": [step.cpu_s for step in summary.costs],
            "peak_bytes": [step.peak_bytes for step in summary.costs],
        }
    return {
        name: {column: values[:TABLE_ROWS] for column, values in table.items()}
        for name, table in named.items()
    }


def note(summary: Summary) -> str:
    """Markdown; its first line is the result, because that is what a list of runs shows."""
    problems = summary.counts.problems
    checked = f"**The balance does not hold:** {'; '.join(problems)}." if problems else ""
    lines = [sentence(summary), "", checked or balance(summary)]
    counts = summary.counts.reasons
    used = [reason for reason in REMOVED if counts[reason]]
    if used:
        lines += ["", "| left out because | images | share |", "|---|---:|---:|"]
        lines += [
            f"| {name_of(reason)} (`{reason}`) | {counts[reason]:,} "
            f"| {share(counts[reason], summary.rows)} |"
            for reason in used
        ]
    said = []
    if (known := summary.calibration) is not None:
        threshold = f"Threshold {similarity(float(known['threshold']))}"
        if known["recall"] is not None:
            threshold += (
                f": {share(float(known['recall']), 1)} of copies are expected to be found, with "
                f"{float(known['target']):.1g} of the pairs of different images"
            )
        said.append(f"{threshold}.")
        if known["warning"]:
            said.append(f"**Mind:** {known['warning']}.")
    for leak in summary.leaks:
        of = f" of {leak.images:,}" if leak.images else ""
        said.append(f"Of the evaluation set {leak.name}, {leak.leaked:,}{of} images leaked.")
    if summary.costs:
        wall, cpu = (sum(getattr(c, n) for c in summary.costs) for n in ("seconds", "cpu_s"))
        said.append(f"It took {time_of(wall)}, and {time_of(cpu)} of CPU time in all.")
    return "\n".join([*lines, *(["", *said] if said else []), "", "Pictures: `report.html`."])


def _reasons(summary: Summary) -> Columns:
    rules = sorted(summary.counts.by_rule.items(), key=lambda kv: (-kv[1], kv[0]))
    return {
        "reason": [reason for (reason, _), _ in rules],
        "rule": [rule for (_, rule), _ in rules],
        "images": [n for _, n in rules],
        "share": [n / summary.rows for _, n in rules],
    }


def _sources(summary: Summary) -> Columns:
    """Sources by size; those beyond 499 are added up, so that the columns do too."""
    reasons = ["kept", *(r for r in REMOVED if summary.counts.reasons[r])]
    by_size = sorted(summary.counts.by_source.items(), key=lambda kv: (-sum(kv[1].values()), kv[0]))
    lines = [[source, sum(of.values()), *(of.get(r, 0) for r in reasons)] for source, of in by_size]
    if len(lines) > TABLE_ROWS:
        smaller = list(zip(*(line[1:] for line in lines[TABLE_ROWS - 1 :]), strict=True))
        lines[TABLE_ROWS - 1 :] = [["(others)", *map(sum, smaller)]]
    names = ["source", "in", *reasons]
    return {name: [line[i] for line in lines] for i, name in enumerate(names)}


def _components(summary: Summary) -> Columns:
    """How many there are of each size, the largest first."""
    parts = summary.components
    assert parts is not None
    sizes = sorted(parts.sizes.items(), reverse=True)
    return {"size": [size for size, _ in sizes], "components": [n for _, n in sizes]}


def _pairs(summary: Summary) -> Columns:
    assert summary.edges is not None
    rows = [(pair, band) for band in summary.edges.bands for pair in band.pairs]
    shown = summary.shown

    def name(row: int) -> str:
        return shown[row].image_id if row in shown else str(row)

    return {
        "a": [name(pair.a) for pair, _ in rows],
        "b": [name(pair.b) for pair, _ in rows],
        "similarity": [pair.similarity for pair, _ in rows],
        "copies": [band.copies for _, band in rows],
    }


def _leaks(summary: Summary) -> Columns:
    rows = [(leak, match) for leak in summary.leaks for match in (*leak.top, *leak.low)]
    return {
        "set": [leak.name for leak, _ in rows],
        "evaluation_image": [match.query.hex() for _, match in rows],
        "image": [summary.shown[m.row].image_id if m.row in summary.shown else "" for _, m in rows],
        "similarity": [match.similarity for _, match in rows],
    }
