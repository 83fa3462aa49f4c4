"""Two or more cards on one page: whether they can be compared, and if so, which model is better.

Cards are compared where their scores are of the same images, by their digests, and their settings
are the same. What is not the same is said, and then no difference is shown: two numbers of other
images say nothing together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.card.card import Card, Confusion, Contender, SetFacts, Verdict
from pipeline.card.case import Gain, gain, is_comparable
from pipeline.card.files import card_folder, read_card
from pipeline.card.shown.page import deciding_bars, group_of, mood_of, number_of, words_of
from pipeline.card.verdict import verdict_of
from pipeline.card.words import UNLABELLED, chosen, with_margin
from pipeline.errors import ConfigError, DataError, shortened
from pipeline.evaluate.score import Interval
from pipeline.report.page import Heading, Section, Statement, Table, Text, write_report
from pipeline.storage.places import resolve_uri
from pipeline.storage.transfer import read_bytes
from pipeline.uri import Place, parent, public

PAGE = "compare.html"
RECIPE = "config.yaml"  # of a run folder
SIMPLE = ("raw_pixels", "colours", "majority")
PLACES = ("run", "track", "resources")  # sections of a recipe that change nothing that is learnt
FIELDS = 60  # of recipes that differ and are shown


@dataclass(frozen=True)
class Compared:
    """A score of two models on the same images.

    Attributes:
        score: its name.
        one: the first model.
        other: the second one.
        gain: by how much the second is better.
    """

    score: str
    one: Contender
    other: Contender
    gain: Gain

    @property
    def ahead(self) -> Interval:
        """By how much the higher one is better."""
        one = self.gain.shown
        return Interval(-one.value, -one.high, -one.low) if one.value < 0 else one

    @property
    def better(self) -> str:
        """Which one is better, where the interval allows to say it."""
        if self.gain.is_better:
            return self.other.name
        if self.gain.is_worse:
            return self.one.name
        return "cannot be told" if self.gain.is_unclear else "no difference"


def compare_cards(places: Sequence[Place], out: Path) -> str:
    """Writes `compare.html` into a folder.

    Args:
        places: of two or more cards, as `files.read_card` takes them.
        out: local folder.

    Returns:
        the verdict in one or two sentences.

    Raises:
        DataError: fewer than two cards, or a place without one.
    """
    if len(places) < 2:
        raise DataError(
            f"one card alone cannot be compared: {len(places)} given",
            "name two or more: evaluate.cards=[runs/a,runs/b]",
        )
    cards = [read_card(place) for place in places]
    named = distinct(cards, [_short(place) for place in places])
    unlike = list(differences_of(named))
    card = merged(named)
    scores = [] if unlike else list(compared(card))
    card = replace(card, verdict=_verdict(card, unlike))
    sections = _sections(card, named, unlike, scores)
    sections += _recipes(places)
    names = " and ".join(one.name for one in card.contenders if one.role == "model")
    out.mkdir(parents=True, exist_ok=True)
    write_report(out / PAGE, "Comparison", sections, shortened(names))
    return card.verdict.text


def distinct(cards: Sequence[Card], names: Sequence[str]) -> list[Card]:
    """The cards with models whose names differ: a name that is there twice gets its card's."""
    models = [one.name for card in cards for one in card.contenders if one.role == "model"]
    twice = {name for name in models if models.count(name) > 1}
    result = []
    for number, (card, name) in enumerate(zip(cards, names, strict=True), 1):
        where = name if names.count(name) == 1 else f"card {number}"
        renamed = {old: f"{old} ({where})" for old in twice}
        contenders = tuple(
            replace(
                one,
                name=renamed.get(one.name, one.name) if one.role == "model" else one.name,
                of=renamed.get(one.of, one.of),
            )
            for one in card.contenders
        )
        result.append(replace(card, contenders=contenders))
    return result


def differences_of(cards: Sequence[Card]) -> Iterator[str]:
    """Why scores of these cards cannot be compared, a sentence each; nothing where they can."""
    first = cards[0]
    for number, card in enumerate(cards[1:], 2):
        if card.score != first.score:
            yield (
                f"Card 1 decides by {group_of(first.score)}, card {number} by "
                f"{group_of(card.score)}."
            )
        for what in ("reference", "queries"):
            one, other = getattr(first, what), getattr(card, what)
            if _digest(one) != _digest(other):
                yield (
                    f"The {what} of card {number} {_set(other)}, that of card 1 {_set(one)}: these "
                    "are other images."
                )
        for name in dict.fromkeys([*first.settings, *card.settings]):
            one, other = first.settings.get(name), card.settings.get(name)
            if one != other:
                values = f"{_value(one)} on card 1 and {_value(other)} on card {number}"
                yield f"The setting {name.replace('_', ' ')} is {values}."


def merged(cards: Sequence[Card]) -> Card:
    """All models on one card, with what each began as, and the simple baselines once."""
    first = cards[0]
    contenders: list[Contender] = []
    for card in cards:
        for one in card.contenders:
            simple = any(one.role == x.role for x in contenders if x.role in SIMPLE)
            only = next(x.name for x in card.contenders if x.role == "model")
            if not simple:
                of = one.of if one.role in ("model", *SIMPLE) else one.of or only
                contenders.append(replace(one, of=of))
    order = {"model": 0, "step0": 1, "init": 1, "untrained": 1}
    ordered = sorted(contenders, key=lambda one: order.get(one.role, 2))
    return replace(first, contenders=tuple(ordered), confusion=Confusion(), wrong=(), remarks=())


def compared(card: Card) -> Iterator[Compared]:
    """Every score that two models have of the same images: the first model with each other one."""
    first, *others = (one for one in card.contenders if one.role == "model")
    for other in others:
        for name, result in first.results.items():
            back = other.results.get(name)
            if name in UNLABELLED or back is None:
                continue
            if is_comparable(result.score, back.score):
                assert result.score is not None and back.score is not None
                decides = name == card.score  # other scores chose no checkpoint
                best_of = (other.best_of, first.best_of) if decides else (1, 1)
                yield Compared(name, first, other, gain(back.score, result.score, best_of))


def _verdict(card: Card, unlike: Sequence[str]) -> Verdict:
    if not unlike:
        return verdict_of(card)
    more = f" ({len(unlike) - 1} more reasons on the page)" if len(unlike) > 1 else ""
    return Verdict("", f"No verdict, for these cards cannot be compared: {unlike[0]}{more}")


def _sections(
    card: Card, cards: Sequence[Card], unlike: Sequence[str], scores: Sequence[Compared]
) -> list[Section]:
    sections: list[Section] = [Statement(card.verdict.text, mood_of(card.verdict))]
    several = [chosen(one.name, one.best_of) for one in card.contenders if one.best_of > 1]
    if several and not unlike:
        text = "; ".join(several)
        sections.append(Text(f"{text}. Differences of {group_of(card.score)} allow for that."))
    if unlike:
        sections.append(Text("\n".join(unlike), "Why they cannot be compared"))
    elif any(card.score in one.results for one in card.contenders):
        sections.append(deciding_bars(card))
    for first, other in dict.fromkeys((x.one.name, x.other.name) for x in scores):
        rows = [x for x in scores if x.other.name == other]
        sections.append(Table(_rows(rows), f"{first} and {other}"))
    if not unlike and (left_out := _left_out(card, scores)):
        sections.append(Text(left_out, "Not compared"))
    sections.append(Heading("What differs"))
    models = [one for one in card.contenders if one.role == "model"]
    facts = {one.name: one.facts for one in models}
    sections.append(_differing(facts, "Networks", "The networks were used in the same way."))
    if not unlike:
        alone = [name for name in UNLABELLED if any(name in one.results for one in models)]
        if alone:
            columns: dict[str, list[Any]] = {"number": [group_of(name) for name in alone]}
            for one in models:
                known = (one.results.get(name) for name in alone)
                columns[one.name] = [number_of(x) if x else "" for x in known]
            sections.append(Table(columns, "Without labels"))
    sections.append(Table({
        "card": [f"{number}" for number in range(1, len(cards) + 1)],
        "title": [one.title for one in cards],
        "made": [one.made[:16].replace("T", " ") for one in cards],
        "its own verdict": [one.verdict.text for one in cards],
    }, "The cards"))  # fmt: skip
    return sections


def _rows(rows: Sequence[Compared]) -> Mapping[str, list[Any]]:
    return {
        "score": [group_of(x.score) for x in rows],
        rows[0].one.name: [with_margin(x.one.results[x.score].interval) for x in rows],
        rows[0].other.name: [with_margin(x.other.results[x.score].interval) for x in rows],
        "better": [x.better for x in rows],
        "by": [with_margin(x.ahead) for x in rows],
    }


def _left_out(card: Card, scores: Sequence[Compared]) -> str:
    """Scores that only one model has, or that are of other images."""
    known = {x.score for x in scores} | set(UNLABELLED)
    models = [one for one in card.contenders if one.role == "model"]
    names = dict.fromkeys(name for one in models for name in one.results if name not in known)
    return "\n".join(
        f"{group_of(name)}: "
        + ("of other images" if all(name in one.results for one in models) else "not on all cards")
        for name in names
    )


def _differing(values: Mapping[str, Mapping[str, Any]], title: str, none: str) -> Section:
    """A table of the fields in which columns differ."""
    fields = dict.fromkeys(name for one in values.values() for name in one if name != "digest")
    rows = {
        name: [_value(one.get(name)) for one in values.values()]
        for name in fields
        if len({_value(one.get(name)) for one in values.values()}) > 1
    }
    if not rows:
        return Text(none, title)
    columns: dict[str, list[Any]] = {"": [name.replace("_", " ") for name in rows]}
    for place, name in enumerate(values):
        columns[name] = [row[place] for row in rows.values()]
    return Table(columns, title)


def _recipes(places: Sequence[Place]) -> list[Section]:
    """Where recipes of the runs differ; nothing where a card is of no run."""
    recipes: dict[str, Mapping[str, Any]] = {}
    for number, place in enumerate(places, 1):
        recipe = _recipe(place)
        if not recipe:
            return []
        recipes[f"{_short(place)} ({number})"] = recipe
    fields = dict.fromkeys(name for one in recipes.values() for name in one)
    unlike = [x for x in fields if len({_value(one.get(x)) for one in recipes.values()}) > 1]
    shown = {name: {x: one.get(x) for x in unlike[:FIELDS]} for name, one in recipes.items()}
    sections = [_differing(shown, "Recipes", "The recipes are the same.")]
    if len(unlike) > FIELDS:
        sections.append(Text(f"and {len(unlike) - FIELDS} more fields"))
    return sections


def _recipe(place: Place) -> dict[str, Any]:
    """The recipe of a card's run, by dotted names of fields; empty where there is none."""
    from pipeline.config.recipe_yaml import decoded, parsed

    folder, name = parent(card_folder(place))
    if name != "evaluate":
        return {}
    fs, path = resolve_uri(str(folder))
    try:
        values = parsed(decoded(read_bytes(fs, f"{path}/{RECIPE}"), RECIPE))
    except (OSError, ConfigError, ValueError):
        return {}
    return dict(_flat(values)) if isinstance(values, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if not prefix and name in PLACES:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _digest(one: SetFacts | None) -> str:
    return one.digest if one else ""


def _set(one: SetFacts | None) -> str:
    return f"is {one.name} ({one.images:,} images)" if one else "is not there"


def _value(value: Any) -> str:
    return "–" if value is None else shortened(words_of(value), 80)


def _short(place: Place) -> str:
    """`runs/photos` of `runs/photos/evaluate/card.json`, without what can be a secret."""
    text = public(place).rstrip("/").removesuffix("/card.json").removesuffix("/evaluate")
    return "/".join(text.split("/")[-2:])
