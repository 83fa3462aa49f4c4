"""All that the report of a curation says, gathered from its tables with bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.curate.report.clusters import Clusters, read_clusters
from pipeline.curate.report.copies import (
    Components,
    Edges,
    Looks,
    read_components,
    read_edges,
    read_looks,
)
from pipeline.curate.report.counts import Counts, Stage, count_decisions, funnel
from pipeline.curate.report.map import Map, read_map
from pipeline.curate.report.read import Shown, TableFiles
from pipeline.curate.report.sets import Leaks, Retrieved, read_leaks, read_retrieved
from pipeline.curate.steps.steps import Result
from pipeline.errors import DataError
from pipeline.uri import Place, public

# The table that says whether the stage of a reason ran.
TABLE_OF = {
    "undecodable": "fingerprint",
    "too_small": "quality",
    "duplicate_bytes": "exact",
    "leaks_evaluation": "leaks",
    "duplicate_near": "components",
    "not_retrieved": "retrieved",
    "balanced_out": "balanced",
}


@dataclass(frozen=True)
class Cost:
    """What a step took; `seconds` is the wall time of this run, without what was reused."""

    step: str
    tasks: int
    reused: int
    rows: int
    bytes: int
    seconds: float
    cpu_s: float
    peak_bytes: int

    @property
    def rows_per_s(self) -> float:
        """Of CPU time, which does not depend on what was reused; 0 where none was taken."""
        return self.rows / self.cpu_s if self.cpu_s > 0 else 0.0


@dataclass(frozen=True)
class Summary:
    """What the report shows; None or empty where a stage was off.

    Attributes:
        counts: images by source and reason, and samples of those that go.
        stages: the funnel.
        threshold: cosine above which two images are copies; None where nothing was compared.
        leak_threshold: the same for evaluation sets.
        calibration: as calibrate gives it.
        keepers: row that is kept instead of a row that is shown.
        shown: every image of the pile that has a place in the report, by row.
        costs: of each step.
    """

    counts: Counts
    stages: tuple[Stage, ...]
    threshold: float | None
    leak_threshold: float | None
    calibration: Mapping[str, Any] | None
    edges: Edges | None
    looks: Looks | None
    components: Components | None
    leaks: tuple[Leaks, ...]
    retrieved: tuple[Retrieved, ...]
    clusters: Clusters | None
    map: Map | None
    keepers: Mapping[int, int]
    shown: Mapping[int, Shown] = field(repr=False)
    costs: tuple[Cost, ...] = ()

    @property
    def rows(self) -> int:
        """Images that went in."""
        return self.counts.rows

    @property
    def kept(self) -> int:
        """Images that stay."""
        return self.counts.kept


def summarise(
    root: Place,
    *,
    results: Sequence[Result] = (),
    calibration: Mapping[str, Any] | None = None,
    threshold: float | None = None,
    leak_threshold: float | None = None,
    evaluation_sets: Mapping[str, str] | None = None,
    leaked: Mapping[str, int] | None = None,
    seed_sets: Mapping[str, str] | None = None,
    folders: Mapping[str, str] | None = None,
    rows_in: int | None = None,
    seed: int = 0,
) -> Summary:
    """Reads the tables file by file, by columns; pictures only of the rows that are shown.

    Args:
        root: folder of the curation.
        results: of the steps, for the costs.
        calibration: as calibrate gives it, or None.
        threshold: of copies; default: that of the calibration.
        leak_threshold: of evaluation sets; default: the same.
        evaluation_sets: by name a folder of their fingerprints, or "" (then without pictures).
        leaked: images of each evaluation set that have a match; needed where there are leaks.
        seed_sets: folders of fingerprints of seed sets, likewise.
        folders: tables by name (see NAMES of `read.py`); default: those that are below the root.
            Name them where a table of an earlier run may lie there whose stage is off now.
        rows_in: images that went in; default: rows of the fingerprints.
        seed: of the samples that are shown.

    Raises:
        DataError: there are no decisions, or a table is damaged.
    """
    tables = TableFiles(root, folders)
    if "decisions" not in tables:
        raise DataError(
            f"no decisions below {public(root)}", "a report is made of them: run the curation first"
        )
    counts = count_decisions(tables, seed, rows_in)
    if threshold is None and calibration is not None:
        threshold = float(calibration["threshold"])
    edges = None
    if "edges" in tables and threshold is not None:
        edges = read_edges(tables, threshold, seed)
    looks = read_looks(tables, seed) if "looks" in tables else None
    components = read_components(tables, seed) if "components" in tables else None
    leaks = read_leaks(tables, evaluation_sets or {}, leaked or {}) if "leaks" in tables else []
    retrieved = read_retrieved(tables, seed_sets or {}, seed) if "retrieved" in tables else []
    clusters = read_clusters(tables, seed) if "balanced" in tables else None
    places = read_map(tables, counts.mapped, seed)
    keepers = _keepers(tables, counts)
    rows = {row for sample in counts.samples.values() for row in sample} | set(keepers.values())
    rows |= set(looks.rows if looks else ())
    rows |= set(_rows_of(edges, components, leaks, retrieved, clusters, places))
    ran = {reason: name in tables for reason, name in TABLE_OF.items()}
    return Summary(
        counts=counts,
        stages=tuple(funnel(counts.reasons, counts.rows, ran)),
        threshold=threshold,
        leak_threshold=leak_threshold if leak_threshold is not None else threshold,
        calibration=calibration,
        edges=edges,
        looks=looks,
        components=components,
        leaks=tuple(leaks),
        retrieved=tuple(retrieved),
        clusters=clusters,
        map=places,
        keepers=keepers,
        shown=tables.shown(rows),
        costs=tuple(map(_cost, results)),
    )


def _keepers(tables: TableFiles, counts: Counts) -> dict[int, int]:
    """The row that stays instead of each sampled copy."""
    copies = [
        row
        for (reason, _), rows in counts.samples.items()
        if reason in ("duplicate_bytes", "duplicate_near")
        for row in rows
    ]
    equal = tables.column_of("exact", copies, "keeper")
    near = tables.column_of("components", copies, "keeper")
    keepers = {row: keeper for row, keeper in near.items() if keeper != row}
    return keepers | {row: keeper for row, keeper in equal.items() if keeper != row}


def _rows_of(
    edges: Edges | None,
    components: Components | None,
    leaks: Sequence[Leaks],
    retrieved: Sequence[Retrieved],
    clusters: Clusters | None,
    places: Map | None,
) -> Iterator[int]:
    for band in edges.bands if edges else ():
        for pair in band.pairs:
            yield from (pair.a, pair.b)
    if components:
        for one in (*components.largest, *components.random, *components.chains):
            yield from (member.row for member in one.members)
    for leak in leaks:
        yield from (match.row for match in (*leak.top, *leak.low))
    for part in retrieved:
        yield from (match.row for matches in part.seeds for match in matches)
    for sheet in clusters.sheets if clusters else ():
        yield from (row for row, _ in sheet.rows)
    yield from (row for _, _, row in (places.pictures if places else ()))


def _cost(result: Result) -> Cost:
    return Cost(
        step=result.step,
        tasks=len(result.accounts),
        reused=result.reused,
        rows=int(result.total("rows")),
        bytes=int(result.total("bytes")),
        seconds=result.seconds,
        cpu_s=result.cpu_s,
        peak_bytes=result.peak_bytes,
    )
