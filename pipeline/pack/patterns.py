"""Patterns for paths: `*`, `?`, `[a-z]`, `**`, `{a,b}`, `{000..127}`, and lists with commas.

A pattern that fits a folder takes all that is in it. Text is compared in Unicode's form C, so a
pattern that is typed fits names that macOS has stored.
"""

from __future__ import annotations

import fnmatch
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.errors import DataError

SPECIAL = "*?[{"
MAX_ALTERNATIVES = 1000  # that braces around a `/` may make
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_LETTERS = re.compile(r"([a-zA-Z])\.\.([a-zA-Z])")


def is_pattern(text: str) -> bool:
    """Whether a path has characters that may stand for others."""
    return any(letter in text for letter in SPECIAL)


def split_list(text: str) -> list[str]:
    """The parts between commas; those inside braces or brackets do not separate."""
    parts, depth = [""], 0
    for letter in text:
        depth = max(0, depth + (letter in "{[") - (letter in "}]"))
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


@dataclass
class _Range:
    """`{low..high}`: numbers, with leading zeros where one of the two has them."""

    low: int
    high: int
    width: int  # 0: without leading zeros
    seen: set[int] = field(default_factory=set)

    def fits(self, text: str) -> bool:
        number = int(text)
        shown = f"{number:0{self.width}d}"
        if text == shown and self.low <= number <= self.high:
            self.seen.add(number)
            return True
        return False

    def missing(self) -> tuple[int, list[str]]:
        """How many numbers were never seen, and the first three."""
        count = self.high - self.low + 1 - len(self.seen)
        first: list[str] = []
        for number in range(self.low, self.high + 1):
            if len(first) == min(3, count):
                break
            if number not in self.seen:
                first.append(f"{number:0{self.width}d}")
        return count, first


class _Name:
    """One part of a pattern between slashes."""

    def __init__(self, text: str) -> None:
        self.ranges: list[_Range] = []
        text = unicodedata.normalize("NFC", text)
        # The library's own is quick with any number of stars, and knows no braces.
        self.regex = re.compile(self._translated(text) if "{" in text else fnmatch.translate(text))

    def fits(self, name: str) -> bool:
        match = self.regex.fullmatch(unicodedata.normalize("NFC", name))
        return match is not None and all(
            # a range in an alternative that was not taken has no text
            text is None or of.fits(text)
            for text, of in zip(match.groups(), self.ranges, strict=True)
        )

    def _translated(self, text: str) -> str:
        out, at = "", 0
        while at < len(text):
            letter, tail = text[at], text[at + 1 :]
            at += 1
            if letter == "*":
                out += "" if out.endswith(".*") else ".*"
            elif letter == "?":
                out += "."
            elif letter == "[" and (end := tail.find("]", 2 if tail[:1] in ("!", "^") else 1)) > 0:
                out += _letters_of(tail[:end])
                at += end + 1
            elif letter == "{" and (end := _closing(tail)) >= 0:
                out += self._braces(tail[:end])
                at += end + 1
            else:
                out += re.escape(letter)
        return out

    def _braces(self, inside: str) -> str:
        if numbers := _RANGE.fullmatch(inside):
            low, high = sorted(int(text) for text in numbers.groups())
            padded = any(text.lstrip("-").startswith("0") and len(text.lstrip("-")) > 1
                         for text in numbers.groups())  # fmt: skip
            width = max(len(text) for text in numbers.groups()) if padded else 0
            self.ranges.append(_Range(low, high, width))
            return r"(-?[0-9]{1,19})"
        if letters := _LETTERS.fullmatch(inside):
            low_letter, high_letter = sorted(letters.groups())
            return f"[{low_letter}-{high_letter}]"
        parts = _alternatives(inside)
        if len(parts) == 1:  # as shells have it: braces around one word are braces
            return re.escape("{") + self._translated(inside) + re.escape("}")
        return "(?:" + "|".join(self._translated(part) for part in parts) + ")"


def _letters_of(inside: str) -> str:
    negated = inside[:1] in ("!", "^")
    letters = inside[negated:].replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
    letters = (
        letters.replace("^", "\\^").replace("&", "\\&").replace("~", "\\~").replace("|", "\\|")
    )
    try:
        re.compile(f"[{letters}]")
    except re.error:  # [z-a]: nothing fits it
        return "(?!)"
    return f"[{'^' * negated}{letters}]"


def _closing(text: str) -> int:
    """Where the brace that was opened before `text` closes; -1 where it does not."""
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return at
    return -1


def _alternatives(inside: str) -> list[str]:
    parts, depth = [""], 0
    for letter in inside:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _without_slashes_in_braces(text: str) -> Iterator[str]:
    """The pattern for each choice of the alternatives that hold a `/`."""
    at = 0
    while (at := text.find("{", at)) >= 0:
        end = _closing(text[at + 1 :])
        inside = text[at + 1 : at + 1 + end]
        if end >= 0 and "/" in inside:
            for part in _alternatives(inside):
                yield from _without_slashes_in_braces(text[:at] + part + text[at + end + 2 :])
            return
        at += 1
    yield text


States = frozenset[tuple[int, int]]


class Pattern:
    """A pattern with slashes, walked from folder to folder.

    `start` is the state at the top; `step` is the state one name further down: empty where nothing
    below can fit. `accepts` says whether the file or folder that was reached fits.
    """

    def __init__(self, text: str) -> None:
        texts: list[str] = []
        for text_ in _without_slashes_in_braces(text):
            texts.append(text_)
            if len(texts) > MAX_ALTERNATIVES:
                raise DataError(
                    f"the braces of {text} make more than {MAX_ALTERNATIVES} patterns",
                    hint="use * in data.source, or name a folder.",
                )
        self.names: list[list[_Name | None]] = [  # None: **
            [None if name == "**" else _Name(name) for name in part.split("/") if name]
            for part in texts
        ]
        self.start = self._closed((at, 0) for at in range(len(texts)))

    def _closed(self, states: Iterable[tuple[int, int]]) -> States:
        reached = set(states)
        for at, i in list(reached):
            names = self.names[at]
            while i < len(names) and names[i] is None:  # ** stands for no folder, too
                i += 1
                reached.add((at, i))
        return frozenset(reached)

    def step(self, states: States, name: str) -> States:
        """The state below, of a file or folder with this name."""
        reached = []
        for at, i in states:
            names = self.names[at]
            if i == len(names) or (part := names[i]) is None:
                reached.append((at, i))
            elif part.fits(name):
                reached.append((at, i + 1))
        return self._closed(reached)

    def accepts(self, states: States) -> bool:
        """Whether what was reached fits; with a folder, all that is in it."""
        return any(i == len(self.names[at]) for at, i in states)

    def deep(self, states: States) -> bool:
        """Whether files of any depth below may fit."""
        return any(i == len(self.names[at]) or self.names[at][i] is None for at, i in states)

    def missing(self) -> list[str]:
        """Sentences about numbers of a range that no name had."""
        said = []
        for part in {id(n): n for names in self.names for n in names if n is not None}.values():
            for each in part.ranges:
                count, first = each.missing()
                if each.seen and count:
                    more = ", ..." if count > len(first) else ""
                    said.append(f"nothing has the number {', '.join(first)}{more}")
        return said
