"""Patterns against the standard library's, and against lists written by hand."""

from __future__ import annotations

import itertools
import unicodedata
from pathlib import Path

import pytest

from pipeline.errors import DataError
from pipeline.pack.patterns import Pattern, is_pattern, split_list

TREE = ["a.jpg", "b.png", "c/1.jpg", "c/22.jpg", "c/d/3.jpg", "c/d/x.txt", "e1/4.jpg", "e2/5.jpg"]
NUMBERED = [f"{i:05d}.tar" for i in range(6)]


def fitting(pattern: str, paths: list[str]) -> list[str]:
    """Files that fit, or are in a folder that does."""
    walked = Pattern(pattern)
    fitted = []
    for path in paths:
        states = walked.start
        for name in path.split("/"):
            states = walked.step(states, name)
        if walked.accepts(states):
            fitted.append(path)
    return fitted


def test_stars_and_letters_are_those_of_pathlib(tmp_path: Path) -> None:
    for path in TREE:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    for pattern in ("*", "*.jpg", "**/*.jpg", "*/*.jpg", "c/**/*.jpg", "c/?.jpg", "e[12]/*",
                    "e[!1]/*", "**/[0-9].*", "c/d", "**", "c/*", "?1", "*/d/*"):  # fmt: skip
        there = set(tmp_path.glob(pattern))
        want = [p for p in TREE if there & {tmp_path / p, *(tmp_path / p).parents} - {tmp_path}]
        if pattern == "**":
            want = TREE
        assert fitting(pattern, TREE) == want, pattern


def test_braces() -> None:
    assert fitting("{00001..00003}.tar", NUMBERED) == NUMBERED[1:4]
    assert fitting("{3..1}.tar", NUMBERED) == []  # bash writes 1, not 00001
    assert fitting("{1..12}", [str(i) for i in range(20)]) == [str(i) for i in range(1, 13)]
    assert fitting("{08..11}", ["8", "08", "10", "11", "012"]) == ["08", "10", "11"]
    assert fitting("{a,c/{d,e}}/*", TREE) == ["c/d/3.jpg", "c/d/x.txt"]
    assert fitting("c/{1,2{2,3}}.jpg", TREE) == ["c/1.jpg", "c/22.jpg"]
    assert fitting("e{1..2}/*", TREE) == ["e1/4.jpg", "e2/5.jpg"]
    assert fitting("{a..c}.*", TREE) == ["a.jpg", "b.png"]
    assert fitting("{a}.jpg", ["a.jpg", "{a}.jpg"]) == ["{a}.jpg"]
    assert fitting("[z-a]*", TREE) == []
    assert fitting("x[", ["x["]) == ["x["]
    assert fitting("*a" * 25 + "b", ["a" * 200]) == []  # at once
    huge = Pattern("{0..999999999999999999}.tar")  # never written out
    assert huge.accepts(huge.step(huge.start, "7.tar"))
    assert "nothing has the number 0, 1, 2, ..." in huge.missing()[0]
    with pytest.raises(DataError, match="more than 1000 patterns"):
        Pattern("{a/b,c/d}" * 12)


def test_numbers_that_are_missing_are_named() -> None:
    pattern = Pattern("{000..005}.tar")
    for name in ("000.tar", "002.tar", "005.tar"):
        pattern.step(pattern.start, name)
    assert pattern.missing() == ["nothing has the number 001, 003, 004"]


def test_both_forms_of_umlauts_fit() -> None:
    for form, other in itertools.permutations(("NFC", "NFD")):
        typed, stored = (unicodedata.normalize(f, "Übung*") for f in (form, other))
        assert fitting(typed, [stored.replace("*", " 1")]) == [stored.replace("*", " 1")]


def test_every_sign_stands_for_itself_outside_of_patterns() -> None:
    for letter in map(chr, range(33, 127)):
        if not is_pattern(letter) and letter not in "/}":
            assert fitting(f"a{letter}*", [f"a{letter}b", "ab", "azb"])[0] == f"a{letter}b"


def test_commas_separate_but_in_braces() -> None:
    assert split_list("a, b/{c,d},e[,]f") == ["a", "b/{c,d}", "e[,]f"]
