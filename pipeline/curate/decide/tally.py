"""How many images went in, from where, and what became of them: counted, checked, told.

An image is told of by its source: its input set, and the top folder in it where there are few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.rows.tables import PARTS, REASONS, InputFile, Inputs
from pipeline.curate.steps.steps import Account, Output, Step

SAID_SOURCES = 3  # in the log; the report has them all
FEW = 50  # folders that are told apart in a set; with more of them nobody would read the table


@dataclass(frozen=True)
class Sources:
    """How images of a set are named.

    Attributes:
        set: name of the input set.
        root: folders above all of its images, as parts of their paths.
        folders: names right below the root, where they are few; else none.
    """

    set: str
    root: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    def names(self, paths: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.object_]]:
        """`set/folder` of each path, or `set`."""
        known = set(self.folders)
        depth = len(self.root)
        plain = pc.dictionary_encode(_folders(paths)).combine_chunks()
        if isinstance(plain, pa.ChunkedArray):
            plain = plain.unify_dictionaries().combine_chunks()
        if not len(plain):
            return np.zeros(0, object)
        named = []
        for folder in plain.dictionary.to_pylist():
            below = folder.split("/")[depth : depth + 1]
            fits = below and below[0] in known
            named.append(f"{self.set}/{below[0]}" if fits else self.set)
        by_row: np.ndarray[Any, np.dtype[np.object_]] = np.array(named, object)[
            plain.indices.to_numpy(zero_copy_only=False)
        ]
        return by_row


def list_folders(out: Output, file: InputFile, prints: Step) -> Account:
    """Task: what folders the images of one file are in, `root` and up to FEW `folders` below."""
    paths = prints.read(file.name, ["source"])["source"]
    distinct = sorted(set(pc.unique(_folders(paths)).to_pylist()))
    root, below = _below([tuple(name.split("/")) if name else () for name in distinct])
    return {
        "rows": len(paths),
        "set": file.set,
        "root": list(root),
        "folders": sorted(below)[: FEW + 1],
        "empty": not distinct,
    }


def sources_of(accounts: Sequence[Account]) -> dict[str, Sources]:
    """By set, from the accounts of `list_folders`."""
    sources = {}
    for name in dict.fromkeys(account["set"] for account in accounts):
        mine = [a for a in accounts if a["set"] == name and not a["empty"]]
        root, below = _below([tuple(a["root"]) for a in mine])
        for account in mine:
            if tuple(account["root"]) == root:
                below |= set(account["folders"])
        few = tuple(sorted(below)) if 1 < len(below) <= FEW else ()
        sources[name] = Sources(name, root, few)
    return sources


def _below(folders: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], set[str]]:
    """The common root of folders, and the names right below it."""
    if not folders:
        return (), set()
    low, high = min(folders), max(folders)
    depth = 0
    while depth < min(len(low), len(high)) and low[depth] == high[depth]:
        depth += 1
    return low[:depth], {folder[depth] for folder in folders if len(folder) > depth}


def _folders(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """The folder of each path; "" where it has none."""
    return pc.replace_substring_regex(pc.fill_null(paths, ""), r"(?s)/?[^/]*\z", "")


@dataclass(frozen=True)
class Tally:
    """Counts of all decisions.

    Attributes:
        rows: images that went in.
        reasons: by source, of every reason that occurs there (`kept` is one).
        parts: by source, of what is kept.
    """

    rows: int
    reasons: dict[str, dict[str, int]]
    parts: dict[str, dict[str, int]]

    @classmethod
    def of(cls, inputs: Inputs, accounts: Sequence[Account]) -> Tally:
        """From the accounts of `decide`, held against the files that went in.

        Raises:
            RuntimeError: an image is missing or was counted twice.
        """
        reasons, parts = (
            {
                source: _sum(account[name].get(source, {}) for account in accounts)
                for source in sorted({source for account in accounts for source in account[name]})
            }
            for name in ("counts", "parts")
        )
        tally = cls(inputs.rows, reasons, parts)
        tally.check([int(account["kept"]) for account in accounts])
        return tally

    def check(self, kept: Sequence[int]) -> None:
        """Holds that in = kept + removed, per source and in total, and that kept = its parts.

        Args:
            kept: images that are kept, counted elsewhere (in files, or in shards).

        Raises:
            RuntimeError: it does not.
        """
        unknown = {r for counts in self.reasons.values() for r in counts} - set(REASONS)
        total = sum(sum(counts.values()) for counts in self.reasons.values())
        by_part = {source: sum(counts.values()) for source, counts in self.parts.items()}
        by_reason = {s: c["kept"] for s, c in self.reasons.items() if c.get("kept")}
        if unknown or total != self.rows or sum(kept) != self.kept or by_part != by_reason:
            raise RuntimeError(
                f"images were lost or counted twice: {self.rows} in, {total} decided, "
                f"{self.kept} kept, {sum(kept)} in the files, {by_part} by part: {self.reasons}"
            )

    @property
    def kept(self) -> int:
        """Images that are kept."""
        return self.total().get("kept", 0)

    def total(self) -> dict[str, int]:
        """Counts of all sources together, in the order of REASONS."""
        totals = _sum(self.reasons.values())
        return {reason: totals[reason] for reason in REASONS if reason in totals}

    def total_parts(self) -> dict[str, int]:
        """What is kept by part, all sources together."""
        totals = _sum(self.parts.values())
        return {part: totals[part] for part in PARTS if part in totals}

    def line(self) -> str:
        """`3,528 in = 3,440 kept + 60 duplicate_near + …`."""
        return _line(self.rows, self.total())

    def lines(self) -> list[str]:
        """One line for each source, the largest first, where there are several."""
        if len(self.reasons) < 2:
            return []
        order = sorted(self.reasons, key=lambda s: (-sum(self.reasons[s].values()), s))
        lines = [
            f"{source}: {_line(sum(self.reasons[source].values()), self.reasons[source])}"
            for source in order[:SAID_SOURCES]
        ]
        smaller = order[SAID_SOURCES:]
        if smaller:
            counts = _sum(self.reasons[source] for source in smaller)
            lines.append(f"{len(smaller)} more sources: {_line(sum(counts.values()), counts)}")
        return lines


def _sum(many: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counts of several together; what comes nowhere is not there."""
    total: Counter[str] = Counter()
    for counts in many:
        total.update(counts)
    return dict(+total)


def _line(rows: int, counts: dict[str, int]) -> str:
    removed = [f"{counts[r]:,} {r}" for r in REASONS[1:] if counts.get(r)]
    return f"{rows:,} in = " + " + ".join([f"{counts.get('kept', 0):,} kept", *removed])
