"""Bars of a page, as a table: each with its number in words, and its interval where it has one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Bar:
    """A bar: its parts as (value, colour of CSS), and what stands before and behind it.

    Attributes:
        name: before it.
        parts: values that add up to its length, with their colours.
        text: behind it.
        tip: below its name, smaller.
        ends: of the interval around its length, drawn as a whisker.
        group: bars of a group have its name above them.
        whole: the value of a full bar, where bars of a section have scales of their own.
    """

    name: str
    parts: Sequence[tuple[float, str]]
    text: str = ""
    tip: str = ""
    ends: tuple[float, float] | None = None
    group: str = ""
    whole: float = 0.0


@dataclass(frozen=True)
class Bars:
    """Horizontal bars, as a table that reads well aloud and without styles.

    Attributes:
        whole: the value of a full bar; default: the largest of its group, whiskers counted.
        head: above the names and above the words behind the bars.
    """

    bars: Sequence[Bar]
    title: str = ""
    text: str = ""
    whole: float = 0.0
    head: tuple[str, str] = ("", "")
    wide: bool = True
    note: str = ""
    kind = "bars"

    def groups(self) -> Iterator[tuple[str, list[Bar]]]:
        """Bars by their group, in their order."""
        for name, bars in groupby(self.bars, key=lambda bar: bar.group):
            yield name, list(bars)

    def widths(self, bar: Bar) -> list[tuple[float, str]]:
        """Width in percent and colour of each part; what is there at all can be seen."""
        whole = self._whole(bar)
        return [
            (max(100 * value / whole, 0.25), colour) for value, colour in bar.parts if value > 0
        ]

    def whisker(self, bar: Bar) -> tuple[float, float] | None:
        """Left end and width in percent of the interval, where there is one."""
        if bar.ends is None or not all(map(math.isfinite, bar.ends)) or bar.ends[0] == bar.ends[1]:
            return None
        whole = self._whole(bar)
        left, right = (min(100.0, max(0.0, 100 * end / whole)) for end in bar.ends)
        return left, right - left

    def _whole(self, bar: Bar) -> float:
        if bar.whole or self.whole:
            return bar.whole or self.whole
        group = [one for one in self.bars if one.group == bar.group]
        lengths = [sum(value for value, _ in one.parts) for one in group]
        lengths += [one.ends[1] for one in group if one.ends]
        return max(filter(math.isfinite, lengths), default=0) or 1.0
