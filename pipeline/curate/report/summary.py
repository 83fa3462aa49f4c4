"""All that the report of a curation says, gathered from its tables with bounded memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from pipeline.curate.steps.steps import Step
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
class Facts:
    """What the tables do not say.

    Attributes:
        steps: that ran, for the costs.
        calibration: as calibrate gives it, or None.
        threshold: of copies; default: that of the calibration.
        leak_threshold: of evaluation sets; default: the same.
        evaluation_sets: by name a folder of their fingerprints, or "" (then without pictures).
        leaked: images of each evaluation set that have a match; needed where there are leaks.
        seed_sets: folders of fingerprints of seed sets, likewise.
        rows_in: images that went in; default: rows of the fingerprints.
        seed: of the samples that are shown.
    """

    steps: Sequence[Step] = ()
    calibration: Mapping[str, Any] | None = None
    threshold: float | None = None
    leak_threshold: float | None = None
    evaluation_sets: Mapping[str, str] = field(default_factory=dict)
    leaked: Mapping[str, int] = field(default_factory=dict)
    seed_sets: Mapping[str, str] = field(default_factory=dict)
    rows_in: int | None = None
    seed: int = 0


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
        costs: steps that ran.
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
    costs: tuple[Step, ...] = ()

    @property
    def rows(self) -> int:
        """Images that went in."""
        return self.counts.rows

    @property
    def kept(self) -> int:
        """Images that stay."""
        return self.counts.kept


NO_FACTS = Facts()


def summarise(
    root: Place, facts: Facts = NO_FACTS, folders: Mapping[str, str] | None = None
) -> Summary:
    """Reads the tables file by file, by columns; pictures only of the rows that are shown.

    Args:
        root: folder of the curation.
        facts: what the tables do not say.
        folders: tables by name (see NAMES of `read.py`); default: those that are below the root.
            Name them where a table of an earlier run may lie there whose stage is off now.

    Raises:
        DataError: there are no decisions, or a table is damaged.
    """
    tables, seed = TableFiles(root, folders), facts.seed
    if "decisions" not in tables:
        raise DataError(
            f"no decisions below {public(root)}", "a report is made of them: run the curation first"
        )
    counts = count_decisions(tables, seed, facts.rows_in)
    threshold = facts.threshold
    if threshold is None and facts.calibration is not None:
        threshold = float(facts.calibration["threshold"])
    edges = None
    if "edges" in tables and threshold is not None:
        edges = read_edges(tables, threshold, seed)
    looks = read_looks(tables, seed) if "looks" in tables else None
    components = read_components(tables, seed) if "components" in tables else None
    leaks = read_leaks(tables, facts.evaluation_sets, facts.leaked) if "leaks" in tables else []
    retrieved = read_retrieved(tables, facts.seed_sets, seed) if "retrieved" in tables else []
    clusters = read_clusters(tables, seed) if "balanced" in tables else None
    places = read_map(tables, counts.mapped, seed)
    keepers = _keepers(tables, counts)
    rows = {row for sample in counts.samples.values() for row in sample} | set(keepers.values())
    for part in (edges, looks, components, *leaks, *retrieved, clusters, places):
        rows.update(part.shown if part else ())
    ran = {reason: name in tables for reason, name in TABLE_OF.items()}
    return Summary(
        counts=counts,
        stages=tuple(funnel(counts.reasons, counts.rows, ran)),
        threshold=threshold,
        leak_threshold=threshold if facts.leak_threshold is None else facts.leak_threshold,
        calibration=facts.calibration,
        edges=edges,
        looks=looks,
        components=components,
        leaks=tuple(leaks),
        retrieved=tuple(retrieved),
        clusters=clusters,
        map=places,
        keepers=keepers,
        shown=tables.shown(rows),
        costs=tuple(facts.steps),
    )


def _keepers(tables: TableFiles, counts: Counts) -> dict[int, int]:
    """The row that stays instead of each sampled copy; of equal files it counts first."""
    copies = [
        row
        for (reason, _), rows in counts.samples.items()
        if reason in ("duplicate_bytes", "duplicate_near")
        for row in rows
    ]
    keepers: dict[int, int] = {}
    for name in ("components", "exact"):
        of = tables.column_of(name, copies, "keeper")
        keepers |= {row: keeper for row, keeper in of.items() if keeper != row}
    return keepers
