"""The result: the verdict of the card, three bars, what an adaptation changed, what a guard did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.card.card import Card, Contender
from pipeline.card.shown.page import deciding_bars, group_of, mood_of, number_of
from pipeline.card.words import (
    SAYS,
    UNLABELLED,
    detail_of,
    is_lower_better,
    title_of,
    with_margin,
)
from pipeline.report.page import Bar, Bars, Section, Statement, Table
from pipeline.run_report.facts import RunFacts

BEGINNINGS = ("init", "step0", "untrained")  # by preference
SIMPLE = ("colours", "raw_pixels")
NAMES = {
    "init": "started from",
    "step0": "before training",
    "untrained": "random weights",
    "colours": "colours alone",
    "raw_pixels": "pixels alone",
}
NO_LABELS = "They can show a collapse. None of them says that a model is good."
CHANGES = 7  # rows of before and after that are not folded
MODEL, OTHER = "var(--c0)", "var(--c6)"


def result_sections(facts: RunFacts) -> Iterator[Section]:
    """The verdict in the words of the card, and what it rests on."""
    card, guard = facts.card, str(facts.result("pretrain").get("guard", ""))
    if card is not None:
        yield Statement(card.verdict.text or "No verdict.", mood_of(card.verdict))
    elif "pretrain" in facts.results:
        yield Statement("No verdict: this run was not evaluated.")
    if guard:
        yield Statement(guard, "bad", title="The guard ended the training")
    if card is not None:
        yield from _scores(card)
    if facts.change:
        yield Table(chosen_rows(facts), "Before and after", note=facts.change_note)


def _scores(card: Card) -> Iterator[Section]:
    models = [one for one in card.contenders if one.role == "model"]
    if len(models) > 1 and any(card.score in one.results for one in models):
        yield deciding_bars(card)
    elif models and card.score in models[0].results and card.score not in UNLABELLED:
        yield three_bars(card)
    elif rows := label_free(card):
        yield Table(rows, "What can be said without labels", note=NO_LABELS)


def chosen_rows(facts: RunFacts) -> dict[str, list[Any]]:
    """Of what an adaptation changed one row of each kind of score, the one that decides first; with
    labels only scores that use them. All rows are folded.
    """
    every = [str(name) for name in facts.change["score"]]
    score = facts.card.score if facts.card else ""
    without = {title_of(name) for name in UNLABELLED} if score not in UNLABELLED else set()
    names = [name for name in every if name not in without]
    decides = ", ".join(filter(None, (title_of(score), detail_of(score))))
    first = [name for name in names if name == decides]
    kinds = dict.fromkeys(name.partition(",")[0] for name in (*first, *names))
    kept = [next(n for n in (*first, *names) if n.partition(",")[0] == kind) for kind in kinds]
    places = [every.index(name) for name in kept][:CHANGES]
    return {column: [values[i] for i in places] for column, values in facts.change.items()}


def compared(card: Card) -> list[Contender]:
    """The model, what it began as, and the better one of what needs no network, as far as they have
    the score that decides.
    """
    there = [one for one in card.contenders if card.score in one.results]
    model = next((one for one in there if one.role == "model"), None)
    if model is None:
        return []
    began = [one for role in BEGINNINGS for one in there if one.role == role]
    sign = -1 if is_lower_better(card.score) else 1
    simple = sorted(
        (one for one in there if one.role in SIMPLE),
        key=lambda one: -sign * one.results[card.score].interval.value,
    )
    return [model, *began[:1], *simple[:1]]


def three_bars(card: Card) -> Bars:
    """The score that decides: trained, started from, pixels or colours, with their intervals."""
    shown = compared(card)
    title = ", ".join(filter(None, (title_of(card.score), detail_of(card.score))))
    lower = "Smaller is better. " if is_lower_better(card.score) else ""
    one = shown[0].results[card.score].interval
    highest = max(x.results[card.score].interval.high for x in shown)
    says = SAYS.get(title_of(card.score), ("", ""))[0]
    return Bars(
        [_bar(card, x) for x in shown],
        title[:1].upper() + title[1:] if title[:1].islower() and title[1:2] != "-" else title,
        f"{lower}{asked_of(card)}" + (f" It says {says}." if says else ""),
        whole=1.0 if highest <= 1 and not lower else 0.0,
        note="Lines on the bars are 95 % intervals over the images." if one.low < one.high else "",
    )


def asked_of(card: Card) -> str:
    """Which images are asked of which."""
    if card.queries is None:
        return f"Each of {card.reference.images:,} images is asked of all others."
    return (
        f"{card.queries.images:,} test images are asked of {card.reference.images:,} reference "
        "images."
    )


def _bar(card: Card, one: Contender) -> Bar:
    interval = one.results[card.score].interval
    return Bar(
        name_of(one),
        [(interval.value, MODEL if one.role == "model" else OTHER)],
        with_margin(interval),
        _tip(card, one),
        ends=(interval.low, interval.high),
    )


def name_of(one: Contender) -> str:
    """What a contender is called: `trained` where it is of a run, else a model by its name."""
    if one.role == "model":
        return "trained" if isinstance(one.facts.get("step"), int) else one.name
    return "most frequent class" if one.role == "majority" else NAMES[one.role]


def _tip(card: Card, one: Contender) -> str:
    """What stands below a name: the step, the weights, the other one of pixels and colours."""
    if one.role == "model":
        step = one.facts.get("step")
        return f"the teacher of step {step:,}" if isinstance(step, int) else ""
    if one.role == "step0":
        return "the same network at step 0"
    if one.role in ("init", "untrained"):
        place = "/".join(one.name.rstrip("/").split("/")[-2:])
        return place if one.role == "init" else "the same network, never trained"
    other = next((x for x in card.contenders if x.role in SIMPLE and x.role != one.role), None)
    if other is None or card.score not in other.results:
        return "no network"
    value = with_margin(other.results[card.score].interval)
    return f"no network; {NAMES[other.role]} {value}"


def label_free(card: Card) -> dict[str, list[Any]]:
    """Numbers without labels of the model and of what it began as, as columns."""
    model = next((one for one in card.contenders if one.role == "model"), None)
    if model is None:
        return {}
    began = [x for role in BEGINNINGS for x in card.contenders if x.role == role and x.results]
    names = [name for name in UNLABELLED if name in model.results]
    if not names:
        return {}
    columns: dict[str, list[Any]] = {"": [title_of(name) for name in names]}
    columns[name_of(model)] = [number_of(model.results[name]) for name in names]
    for one in began[:1]:
        values = [one.results.get(name) for name in names]
        columns[NAMES[one.role]] = [number_of(x) if x else "" for x in values]
    columns["says"] = [SAYS[title_of(name)][0] if title_of(name) in SAYS else "" for name in names]
    return columns


def all_scores(card: Card) -> Table | None:
    """Every score with a truth, a column for each contender; None where there is none."""
    scores = dict.fromkeys(name for one in card.contenders for name in one.results)
    names = [name for name in scores if name not in UNLABELLED]
    shown = [one for one in card.contenders if any(name in one.results for name in names)]
    if not names or not shown:
        return None
    columns: dict[str, list[Any]] = {"score": [group_of(name) for name in names]}
    for one in shown:
        title = name_of(one)
        title = one.name if title in columns else title
        values = [one.results.get(name) for name in names]
        columns[title] = [with_margin(x.interval) if x else "" for x in values]
    return Table(columns, "All scores")
