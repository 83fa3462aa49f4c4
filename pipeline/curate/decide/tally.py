"""How many images went in, were kept and were removed for which reason: counted, checked, told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.curate.decide.decide import PARTS
from pipeline.curate.rows.tables import REASONS, Inputs
from pipeline.curate.steps.steps import Account

SAID_SOURCES = 12  # in the log; the report has them all


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
        reasons: dict[str, dict[str, int]] = {}
        parts: dict[str, dict[str, int]] = {}
        for account in accounts:
            for name, total in (("counts", reasons), ("parts", parts)):
                for source, counts in account[name].items():
                    into = total.setdefault(source, {})
                    for what, count in counts.items():
                        into[what] = into.get(what, 0) + count
        tally = cls(inputs.rows, dict(sorted(reasons.items())), dict(sorted(parts.items())))
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
        totals = {
            reason: sum(counts.get(reason, 0) for counts in self.reasons.values())
            for reason in REASONS
        }
        return {reason: count for reason, count in totals.items() if count}

    def total_parts(self) -> dict[str, int]:
        """What is kept by part, all sources together."""
        counts = {part: sum(c.get(part, 0) for c in self.parts.values()) for part in PARTS}
        return {part: count for part, count in counts.items() if count}

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
            counts: dict[str, int] = {}
            for source in smaller:
                for reason, count in self.reasons[source].items():
                    counts[reason] = counts.get(reason, 0) + count
            lines.append(f"{len(smaller)} more sources: {_line(sum(counts.values()), counts)}")
        return lines


def _line(rows: int, counts: dict[str, int]) -> str:
    removed = [f"{counts[r]:,} {r}" for r in REASONS[1:] if counts.get(r)]
    return f"{rows:,} in = " + " + ".join([f"{counts.get('kept', 0):,} kept", *removed])
