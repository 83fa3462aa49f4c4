"""The card as a page: the verdict, a bar for each score, mistakes with pictures, what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from pipeline.card.card import Card, Contender, Result, SetFacts, Verdict
from pipeline.card.shown.mistakes import ImageOf, mistakes
from pipeline.card.verdict import GOOD
from pipeline.card.words import (
    SAYS,
    UNLABELLED,
    detail_of,
    is_lower_better,
    title_of,
    with_margin,
)
from pipeline.errors import shortened
from pipeline.report.page import (
    Bar,
    Bars,
    Code,
    Heading,
    Section,
    Statement,
    Table,
    Text,
    write_report,
)

MODELS = ("var(--c0)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c1)", "var(--c5)")
BASELINE = "var(--c6)"
NAMES = {
    "step0": "untrained, step 0",
    "init": "what it started from",
    "untrained": "random weights",
    "raw_pixels": "raw pixels",
    "colours": "colours",
    "majority": "most frequent class",
}
LONGEST = 120  # letters of a setting
SNIPPET = """from pipeline import api

embedder = api.open_embedder(api.embedder_of({model!r}))
vectors = api.embed(embedder, ["a.jpg", "b.jpg"])  # [2, {dim}]"""


def write_page(card: Card, path: Path, image_of: ImageOf | None = None, model: str = "") -> None:
    """Writes `card.html`, under 2 MB and with nothing from elsewhere.

    Args:
        card: with its verdict.
        path: of the file.
        image_of: the picture of an image id; None where there is none.
        model: what `api.embedder_of` takes for the first model; "": its name.
    """
    write_report(path, card.title, page_sections(card, image_of, model), subtitle_of(card))


def page_sections(card: Card, image_of: ImageOf | None = None, model: str = "") -> list[Section]:
    """The page's sections in their order, as `write_page` takes them."""
    sections: list[Section] = [Statement(card.verdict.text or "No verdict.", mood_of(card.verdict))]
    decides = [one for one in card.contenders if card.score in one.results]
    if decides:
        sections.append(deciding_bars(card))
    sections += _all_scores(card)
    sections += mistakes(card, image_of or (lambda image_id: None))
    sections += _unlabelled(card)
    sections.append(Heading("How it was made"))
    sections += _made(card)
    first = next((one for one in card.contenders if one.role == "model"), None)
    if first is not None:
        snippet = SNIPPET.format(model=model or first.name, dim=first.facts.get("dim", "D"))
        sections.append(Code(snippet, "Use the model"))
    return sections


def mood_of(verdict: Verdict) -> str:
    """For `Statement`."""
    undecided = ("", "equal_models", "learnt_little")
    if verdict.rule in undecided or "No verdict" in verdict.text:
        return "open"
    return "good" if verdict.rule in (*GOOD, "best_model") else "bad"


def subtitle_of(card: Card) -> str:
    """Sets and date in a line."""
    day = card.made[:10]
    if card.queries is None:
        each = "each image asked of all others" if card.reference.labelled else "no labels"
        if card.score.startswith(("segmentation_", "depth_")):
            each = "a part of them is held out and asked"
        return f"{card.reference.name}: {card.reference.images:,} images, {each} · {day}"
    return (
        f"{card.queries.name}: {card.queries.images:,} images, asked of the "
        f"{card.reference.images:,} of {card.reference.name} · {day}"
    )


def name_of(card: Card, one: Contender) -> str:
    """What a contender is called beside its bar."""
    name = one.name if one.role == "model" else NAMES[one.role]
    return f"{name} (of {one.of})" if whose(card, one) else name


def whose(card: Card, one: Contender) -> str:
    """The model that a baseline belongs to, where there are several models; else ""."""
    several = sum(x.role == "model" for x in card.contenders) > 1
    return one.of if several else ""


def colour_of(card: Card, one: Contender) -> str:
    """CSS: each model its own, baselines grey."""
    if one.role != "model":
        return BASELINE
    models = [x.name for x in card.contenders if x.role == "model"]
    return MODELS[models.index(one.name) % len(MODELS)]


# Bars


def deciding_bars(card: Card) -> Bars:
    """The score that decides, of every contender."""
    title = title_of(card.score)
    says, cannot = SAYS.get(title, ("", ""))
    bars = _bars(card, card.score, "")
    whiskers = any(one.ends and one.ends[0] < one.ends[1] for one in bars)
    return Bars(
        bars,
        ", ".join(filter(None, (title, detail_of(card.score)))),
        f"Says {says}; not {cannot}." if says else "",
        head=("", "95 % interval") if whiskers else ("", ""),
    )


def _bars(card: Card, score: str, group: str) -> list[Bar]:
    results = [(one, one.results[score]) for one in card.contenders if score in one.results]
    known = [end for _, x in results for end in (x.interval.high, x.interval.value) if end == end]
    whole = 1.0 if max(known, default=0) <= 1 and not is_lower_better(score) else 0.0
    return [
        Bar(
            one.name if one.role == "model" else _baseline(one, score),
            [(result.interval.value, colour_of(card, one))],
            with_margin(result.interval),
            f"of {whose(card, one)}" if whose(card, one) else "",
            ends=(result.interval.low, result.interval.high),
            group=group,
            whole=whole,
        )
        for one, result in results
    ]


def _baseline(one: Contender, score: str) -> str:
    depth = one.role == "majority" and score.startswith("depth_")
    return "mean depth" if depth else NAMES[one.role]


def _all_scores(card: Card) -> Iterator[Section]:
    """Every score but the one on top, in two columns of about the same height."""
    scores = dict.fromkeys(name for one in card.contenders for name in one.results)
    groups = [
        _bars(card, score, group_of(score))
        for score in scores
        if score not in UNLABELLED and score != card.score
    ]
    if not groups:
        return
    yield Heading("All scores", "Bars are values, whiskers 95 % intervals over images.")
    heights = list(accumulate(len(bars) + 1.5 for bars in groups))
    middle = min(range(len(heights)), key=lambda i: abs(heights[i] - heights[-1] / 2)) + 1
    for part in (groups[:middle], groups[middle:]):
        if part:
            yield Bars([bar for bars in part for bar in bars], wide=len(groups) == 1)
    scored = (name for name in scores if name not in UNLABELLED)
    titles = [title for title in dict.fromkeys(map(title_of, scored)) if title in SAYS]
    if titles:
        yield _says(titles, "What each score says")


def _says(titles: Sequence[str], heading: str) -> Table:
    says, cannot = zip(*(SAYS[title] for title in titles), strict=True)
    return Table({"": titles, "says": says, "cannot say": cannot}, heading)


def group_of(score: str) -> str:
    """What stands above the bars of a score."""
    lower = "smaller is better" if is_lower_better(score) else ""
    return ", ".join(filter(None, (title_of(score), detail_of(score), lower))).replace(
        ", at ", " at "
    )


# Tables


def _unlabelled(card: Card) -> Iterator[Section]:
    """Numbers without labels, each with what it can and cannot say."""
    known = [one for one in card.contenders if any(name in one.results for name in UNLABELLED)]
    names = [name for name in UNLABELLED if any(name in one.results for one in known)]
    if not names:
        return
    columns: dict[str, list[Any]] = {"": [name_of(card, one) for one in known]}
    for name in names:
        values = (one.results.get(name) for one in known)
        columns[title_of(name)] = [number_of(x) if x else "" for x in values]
    yield Heading(
        "Without labels", "They can show a collapse. None of them says that a model is good."
    )
    yield Table(columns)
    yield _says([title_of(name) for name in names], "What each number says")


def number_of(result: Result) -> str:
    """A number without labels, with its interval where it is a mean over images."""
    one = result.interval
    return with_margin(one) if one.high > one.low else f"{one.value:.3g}"


def _made(card: Card) -> Iterator[Section]:
    if card.remarks:
        yield Text("\n".join(f"{remark.rstrip('.')}." for remark in card.remarks), "Remarks")
    yield Table(_costs(card), "What it cost")
    sets = [("reference", card.reference), *([("queries", card.queries)] if card.queries else [])]
    yield Table(_sets(sets), "Sets", wide=False)
    settings = {
        name.replace("_", " "): shortened(words_of(value), LONGEST)
        for name, value in card.settings.items()
        if name != "classes"
    }
    if settings:
        yield Table({"setting": list(settings), "value": list(settings.values())},
                    "Settings", wide=False)  # fmt: skip
    if models := [one for one in card.contenders if one.facts]:
        yield Table(_facts(card, models), "Networks")


def _costs(card: Card) -> Mapping[str, list[Any]]:
    """Seconds of each contender; images a second of what embeds."""
    images = card.reference.images + (card.queries.images if card.queries else 0)
    spent = [one for one in card.contenders if one.cost]
    kinds = list(dict.fromkeys(kind for one in spent for kind in one.cost))
    columns: dict[str, list[Any]] = {"": [name_of(card, one) for one in spent]}
    embeds = [one.cost.get("embed", 0) for one in spent]
    if any(embeds):
        columns["images/s"] = [f"{images / s:,.0f}" if s else "" for s in embeds]
    for kind in kinds:
        seconds = (one.cost.get(kind) for one in spent)
        columns[f"{kind.replace('_', ' ')}, s"] = [
            "" if s is None else _seconds(s) for s in seconds
        ]
    columns["all, s"] = [_seconds(sum(one.cost.values())) for one in spent]
    return columns


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}"


def _sets(sets: Sequence[tuple[str, SetFacts]]) -> Mapping[str, list[Any]]:
    return {
        "": [what for what, _ in sets],
        "name": [one.name for _, one in sets],
        "images": [one.images for _, one in sets],
        "with a label": [one.labelled for _, one in sets],
        "classes": [len(one.class_names) or "" for _, one in sets],
    }


def _facts(card: Card, models: Sequence[Contender]) -> Mapping[str, list[Any]]:
    names = dict.fromkeys(name for one in models for name in one.facts if name != "digest")
    columns: dict[str, list[Any]] = {"": [name_of(card, one) for one in models]}
    for name in names:
        values = (one.facts.get(name) for one in models)
        columns[name.replace("_", " ")] = [shortened(words_of(value), LONGEST) for value in values]
    return columns


def words_of(value: Any) -> str:
    """A setting or a fact as a cell of a table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(words_of, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {words_of(one)}" for name, one in value.items())
    return str(value)
