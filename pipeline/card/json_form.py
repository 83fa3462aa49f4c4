"""A card as JSON has it, for people and for `files.py`, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from pipeline.card.card import Card, Confusion, Contender, Result, SetFacts, Verdict, WrongAnswer
from pipeline.evaluate.score import Interval


def content_of(card: Card) -> dict[str, Any]:
    """A card's fields as JSON has them."""
    content = {field.name: getattr(card, field.name) for field in fields(card)}
    content["verdict"] = vars(card.verdict)
    content["confusion"] = vars(card.confusion)
    content["reference"] = vars(card.reference)
    content["queries"] = card.queries and vars(card.queries)
    content["wrong"] = [vars(one) for one in card.wrong]
    content["contenders"] = [
        vars(one) | {"results": {name: _result(x) for name, x in one.results.items()}}
        for one in card.contenders
    ]
    return content


def _result(result: Result) -> dict[str, Any]:
    return {**vars(result.interval), "details": result.details}


def card_of(content: Mapping[str, Any]) -> Card:
    """The card that `content_of` took apart, without what each image adds.

    Raises:
        KeyError, TypeError, ValueError, IndexError: it is not as `content_of` made it.
    """
    values = {field.name: content[field.name] for field in fields(Card)}
    values["verdict"] = Verdict(**content["verdict"])
    values["reference"] = _set(content["reference"])
    values["queries"] = content["queries"] and _set(content["queries"])
    values["remarks"] = tuple(content["remarks"])
    values["confusion"] = _confusion(content["confusion"])
    values["wrong"] = tuple(
        WrongAnswer(**one | {"neighbours": tuple((x, c, s) for x, c, s in one["neighbours"])})
        for one in content["wrong"]
    )
    values["contenders"] = tuple(_contender(one) for one in content["contenders"])
    return Card(**values)


def _confusion(content: Mapping[str, Any]) -> Confusion:
    wrong = tuple((truth, answer, count) for truth, answer, count in content["wrong"])
    return Confusion(tuple(content["images"]), tuple(content["right"]), wrong)


def _set(content: Mapping[str, Any]) -> SetFacts:
    return SetFacts(**{**content, "class_names": tuple(content["class_names"])})


def _contender(content: Mapping[str, Any]) -> Contender:
    results = {}
    for name, one in content["results"].items():
        ends = (math.nan if one[end] is None else one[end] for end in ("value", "low", "high"))
        results[name] = Result(None, Interval(*ends), one["details"])
    return Contender(**{**content, "results": results})


def readable(value: Any, indent: str = "") -> str:
    """JSON with a line for each name, and lists of plain values on one line."""
    value = _plain(value)
    within = indent + " "
    if isinstance(value, dict) and value:
        lines = (f"{within}{json.dumps(k, ensure_ascii=False)}: {readable(v, within)}"
                 for k, v in value.items())  # fmt: skip
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(_plain(one), dict | list) for one in value):
        lines = (within + readable(one, within) for one in value)
        return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    return json.dumps(list(_plains(value)) if isinstance(value, list) else value,
                      ensure_ascii=False)  # fmt: skip


def _plains(values: Sequence[Any]) -> Iterator[Any]:
    return (_plain(one) for one in values)


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers of numpy and torch as Python's, none where not finite."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): one for name, one in value.items()}
    if isinstance(value, tuple | set | frozenset):
        return list(value)
    return value if value is None or isinstance(value, str | int | float | list) else str(value)
