"""Counts of the decisions: how many went where, from which source, and whether it adds up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.report.read import Samples, TableFiles, draws, ids
from pipeline.curate.report.words import REMOVED, STAGES
from pipeline.curate.rows.tables import REASONS

MANY_SOURCES = 20_000  # more are counted together
OTHERS = "(other sources)"
SAMPLE = 24  # rows of each reason and rule
MAP_ROWS = 20_000


@dataclass(frozen=True)
class Counts:
    """What the decisions say.

    Attributes:
        rows: decisions.
        by_source: images by source and reason.
        by_rule: images by reason and rule.
        parts: kept images by the part that keeps them.
        samples: up to 24 rows of each reason and rule, random by their id.
        mapped: up to 20,000 (row, reason), random by id.
        problems: sentences, each about something that does not add up.
    """

    rows: int
    by_source: Mapping[str, Mapping[str, int]]
    by_rule: Mapping[tuple[str, str], int]
    parts: Mapping[str, int]
    samples: Mapping[tuple[str, str], list[int]]
    mapped: list[tuple[int, str]]
    problems: tuple[str, ...]

    @property
    def reasons(self) -> Counter[str]:
        """Images by reason, all sources together."""
        total: Counter[str] = Counter()
        for counts in self.by_source.values():
            total.update(counts)
        return total

    @property
    def kept(self) -> int:
        """Images that stay."""
        return self.reasons["kept"]


@dataclass(frozen=True)
class Stage:
    """One step of the funnel: what goes, by reason, and how many are left."""

    name: str
    removed: Mapping[str, int]
    left: int


def funnel(reasons: Mapping[str, int], rows: int, ran: Mapping[str, bool]) -> list[Stage]:
    """The stages that ran or took something, in order of precedence.

    Args:
        reasons: images by reason.
        rows: images in all.
        ran: by reason, whether its stage ran; those that are not named did not.
    """
    stages, left = [], rows
    for name, taken in STAGES:
        removed = {reason: reasons.get(reason, 0) for reason in taken}
        left -= sum(removed.values())
        if any(removed.values()) or any(ran.get(reason) for reason in taken):
            stages.append(Stage(name, {k: v for k, v in removed.items() if v}, left))
    return stages


def count_decisions(tables: TableFiles, seed: int, rows_in: int | None) -> Counts:
    """One pass over the decisions; also learns which file holds which rows.

    Args:
        tables: its `first` is filled.
        seed: of the samples.
        rows_in: images that went in; default: rows of the fingerprints.
    """
    by_source: dict[str, Counter[str]] = {}
    by_rule: Counter[tuple[str, str]] = Counter()
    parts: Counter[str] = Counter()
    removed = Samples(SAMPLE, ["reason", "rule"], ["draw", "row"])
    mapped = Samples(MAP_ROWS, [], ["draw", "row"])
    rows, torn, wrong = 0, False, 0
    ends: list[tuple[int, int, str]] = []
    words = ["reason", "rule", "part", "source"]
    for file, table in tables.read("decisions", ["row", "image_id", "kept", *words]):
        if not len(table):
            continue
        for name in words:
            place = table.schema.get_field_index(name)
            table = table.set_column(place, name, pc.fill_null(table[name], ""))
        numbers = table["row"].to_numpy()
        torn |= bool(np.any(np.diff(numbers) != 1))
        ends.append((int(numbers[0]), int(numbers[-1]) + 1, file))
        rows += len(table)
        for one in table.group_by(["kept", *words]).aggregate([([], "count_all")]).to_pylist():
            source, reason, number = one["source"], one["reason"], one["count_all"]
            if source not in by_source and len(by_source) >= MANY_SOURCES:
                source = OTHERS
            by_source.setdefault(source, Counter())[reason] += number
            by_rule[reason, one["rule"]] += number
            parts[one["part"]] += number if one["kept"] else 0
            wrong += number if one["kept"] != (reason == "kept") else 0
        drawn = table.append_column("draw", pa.array(draws(ids(table["image_id"]), seed)))
        mapped.add(drawn.select(["draw", "row", "reason"]))
        gone = drawn.filter(pc.is_in(drawn["reason"], pa.array(REMOVED)))
        removed.add(gone.select(["draw", "row", "reason", "rule"]))
    ends.sort()
    tables.first = {file: first for first, _, file in ends}
    torn |= any(before[1] != after[0] for before, after in pairwise(ends))
    unknown = sorted({reason for reason, _ in by_rule} - set(REASONS))
    if rows_in is None:
        rows_in = tables.counted("fingerprint") if "fingerprint" in tables else rows
    problems = {
        "the rows of the decisions have gaps or come twice": torn,
        f"{wrong:,} decisions say kept with a reason, or the other way round": wrong > 0,
        f"reasons that are not known: {', '.join(unknown)}": bool(unknown),
        f"{rows_in:,} images went in, but there are {rows:,} decisions": rows_in != rows,
    }
    return Counts(
        rows=rows,
        by_source=by_source,
        by_rule=by_rule,
        parts=+parts,
        samples={key: [one["row"] for one in kept] for key, kept in removed.groups().items()},
        mapped=[(one["row"], one["reason"]) for one in mapped.rows()],
        problems=tuple(problem for problem, is_so in problems.items() if is_so),
    )
