"""Counts of the decisions: how many went where, from which source, and whether it adds up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.report.read import Smallest, TableFiles, draws, hex_ids
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
    samples: dict[tuple[str, str], Smallest] = {}
    mapped = Smallest(MAP_ROWS)
    rows, problems, torn, wrong = 0, [], 0, 0
    columns = ["image_id", "kept", "reason", "rule", "part", "source", "row"]
    ends: list[tuple[int, int, str]] = []
    for file, table in tables.read("decisions", columns):
        if not len(table):
            continue
        table = _filled(table)
        numbers = table["row"].to_numpy()
        torn += int(np.any(np.diff(numbers) != 1))
        ends.append((int(numbers[0]), int(numbers[-1]) + 1, file))
        rows += len(table)
        wrong += int(pc.sum(pc.xor(table["kept"], pc.equal(table["reason"], "kept"))).as_py())
        for source, reason, rule, number in _groups(table):
            if source not in by_source and len(by_source) >= MANY_SOURCES:
                source = OTHERS
            by_source.setdefault(source, Counter())[reason] += number
            by_rule[reason, rule] += number
        stays = table.filter(table["kept"])["part"]
        parts.update({one["values"]: one["counts"] for one in pc.value_counts(stays).to_pylist()})
        drawn = draws(hex_ids(table["image_id"]), seed)
        reasons = table["reason"].combine_chunks()
        mapped.offer(drawn, partial(_item, numbers, reasons))
        _sample(table, drawn, samples)
    ends.sort()
    tables.first = {file: first for first, _, file in ends}
    if torn or any(a[1] != b[0] for a, b in pairwise(ends)):
        problems.append("the rows of the decisions have gaps or come twice")
    if wrong:
        problems.append(f"{wrong:,} decisions say kept with a reason, or the other way round")
    unknown = sorted({reason for reason, _ in by_rule} - set(REASONS))
    if unknown:
        problems.append(f"reasons that are not known: {', '.join(unknown)}")
    expected = rows_in if rows_in is not None else _counted(tables, rows)
    if expected != rows:
        problems.append(f"{expected:,} images went in, but there are {rows:,} decisions")
    return Counts(
        rows=rows,
        by_source=by_source,
        by_rule=by_rule,
        parts=parts,
        samples={key: [row for (row,) in kept.items()] for key, kept in sorted(samples.items())},
        mapped=mapped.items(),
        problems=tuple(problems),
    )


def _counted(tables: TableFiles, rows: int) -> int:
    return tables.counted("fingerprint") if "fingerprint" in tables else rows


def _filled(table: pa.Table) -> pa.Table:
    """Without nulls in the columns of words."""
    for name in ("reason", "rule", "part", "source"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pc.fill_null(table[name], ""))
    return table


def _groups(table: pa.Table) -> list[tuple[str, str, str, int]]:
    grouped = table.group_by(["source", "reason", "rule"]).aggregate([([], "count_all")])
    columns = (grouped[name].to_pylist() for name in ("source", "reason", "rule", "count_all"))
    return list(zip(*columns, strict=True))


def _item(numbers: np.ndarray[Any, Any], reasons: pa.Array, place: int) -> tuple[int, str]:
    return int(numbers[place]), reasons[place].as_py()


def _sample(
    table: pa.Table,
    drawn: np.ndarray[Any, np.dtype[np.float64]],
    samples: dict[tuple[str, str], Smallest],
) -> None:
    numbers = table["row"].to_numpy()
    both = pc.binary_join_element_wise(table["reason"], table["rule"], "\n").combine_chunks()
    coded = both.dictionary_encode()
    codes = coded.indices.to_numpy()
    for code, name in enumerate(coded.dictionary.to_pylist()):
        reason, _, rule = name.partition("\n")
        if reason in REMOVED:
            mine = np.flatnonzero(codes == code)
            kept = samples.setdefault((reason, rule), Smallest(SAMPLE))
            rows = numbers[mine]
            kept.offer(drawn[mine], lambda place, rows=rows: (int(rows[place]),))  # type: ignore[misc]
