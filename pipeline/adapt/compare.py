"""Before and after: what the card of the weights and that of the trained ones say together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.card.card import Card, Contender
from pipeline.card.words import UNLABELLED, detail_of, short_of, title_of, with_margin
from pipeline.evaluate.score import difference

SAME = 1e-4  # scores of the same weights on the same images, computed twice, differ by less
SEEN = ("image_size", "mean", "std")  # how a network sees images


@dataclass(frozen=True)
class Comparison:
    """What to say of two cards.

    Attributes:
        lines: for the console, each with its first word.
        rows: of a table: score, before, after, difference.
        warning: why the card before is not like the one after; or empty.
        one_card: the rows are of the card after alone: of the same images, seen in the same way.
    """

    lines: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, str, str, str], ...]
    warning: str = ""
    one_card: bool = False

    @property
    def note(self) -> str:
        """What to know of the rows."""
        alike = "The same images for both; differences with 95 % intervals."
        warning = f"{self.warning[:1].upper()}{self.warning[1:]}." if self.warning else ""
        return " ".join(filter(None, [alike if self.one_card or not warning else "", warning]))

    @property
    def table(self) -> dict[str, list[Any]]:
        """The rows as columns."""
        names = ("score", "before", "after", "difference")
        return {name: [row[i] for row in self.rows] for i, name in enumerate(names)}


def before_line(card: Card) -> str:
    """What the weights are worth as they are: the score that decides, and what stands beside it."""
    model = card.contenders[0]
    if card.score not in model.results or card.score in UNLABELLED:
        return f"no labels: {_unlabelled(model)}"
    beside = [
        f"{short_of(one.role, card.score)} {one.results[card.score].interval.value:.2f}"
        for one in card.contenders[1:]
        if card.score in one.results
    ]
    said = f"{title_of(card.score)} {with_margin(model.results[card.score].interval)}"
    return ", ".join([said, *beside])


def compared(before: Card | None, after: Card) -> Comparison:
    """The two cards side by side.

    The card after training holds the weights that it began with, too (`init`), scored anew on its
    own images. Where the card before is of the same images, both must say the same of them.

    Args:
        before: of the weights as they were; None: there is no such card.
        after: of the trained weights.
    """
    model = after.contenders[0]
    init = next((one for one in after.contenders if one.role == "init"), None)
    start = init if init is not None or before is None else before.contenders[0]
    if start is None:
        return Comparison((), ())
    rows = tuple(
        _row(name, start, model) for name in model.results if name in start.results and name
    )
    score = after.score
    if score in model.results and score in start.results and score not in UNLABELLED:
        lines = [
            ("before", f"{title_of(score)} {with_margin(start.results[score].interval)}"),
            ("after", f"{title_of(score)} {with_margin(model.results[score].interval)}"),
        ]
        if gain := _gain(score, start, model):
            lines[1] = ("after", f"{lines[1][1]} ({gain})")
    else:
        lines = [("before", _unlabelled(start)), ("after", _unlabelled(model))]
    return Comparison(tuple(lines), rows, _unlike(before, after, init), init is not None)


def _row(name: str, start: Contender, model: Contender) -> tuple[str, str, str, str]:
    title = ", ".join(filter(None, (title_of(name), detail_of(name))))
    values = [with_margin(one.results[name].interval) for one in (start, model)]
    return title, values[0], values[1], _gain(name, start, model)


def _gain(name: str, start: Contender, model: Contender) -> str:
    """The difference of a score with its interval, on the same images; "" without images."""
    was, now = start.results[name].score, model.results[name].score
    if was is None or now is None or was.images != now.images:
        return ""
    return with_margin(difference(now, was), sign=True)


def _unlabelled(one: Contender) -> str:
    named = [
        f"{title_of(name)} {one.results[name].interval.value:.3g}"
        for name in UNLABELLED
        if name in one.results
    ]
    return ", ".join(named) or "nothing was scored"


def _unlike(before: Card | None, after: Card, init: Contender | None) -> str:
    """Why the card before training is not of the same images, seen in the same way."""
    if before is None:
        return ""
    digests = [
        (one.reference.digest, one.queries.digest if one.queries else "") for one in (before, after)
    ]
    if digests[0] != digests[1]:
        anew = "what it started from is scored anew" if init else "before and after are not alike"
        return f"the card before training is of other images; {anew}"
    was = before.contenders[0]
    for name in SEEN:
        seen = [_plain(one.facts.get(name)) for one in (was, init or after.contenders[0])]
        if seen[0] != seen[1]:
            return f"the card before training has {name} {seen[0]}, the one after it {seen[1]}"
    score = after.score
    if init is not None and score in was.results and score in init.results:
        values = [one.results[score].interval.value for one in (was, init)]
        if not math.isclose(*values, rel_tol=0, abs_tol=SAME):
            return (
                f"the weights had {score} {values[0]:.4f} before training and have {values[1]:.4f} "
                "now, on the same images: something else has changed"
            )
    return ""


def _plain(value: Any) -> Any:
    return [round(float(x), 6) for x in value] if isinstance(value, list | tuple) else value


def numbers_before(card: Card) -> Mapping[str, float]:
    """Scores of the weights as they are, for MLflow."""
    return {f"eval/{n}": one.interval.value for n, one in card.contenders[0].results.items()}
