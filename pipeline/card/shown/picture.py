"""The bars of a card as one picture, for MLflow: read at a glance, without a browser."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.card.card import Card, Contender
from pipeline.card.shown.page import group_of, name_of
from pipeline.card.words import UNLABELLED, is_lower_better, title_of, with_margin
from pipeline.images.shown import Pixels

WIDTH = 900  # pixels
MARGIN, LEFT, RIGHT, ROW = 28, 270, 150, 26
GROUPS = 8  # scores that are drawn, one of a title; the page has the others
INK, SOFT, TRACK, PAPER = (29, 36, 48), (93, 104, 120), (233, 236, 240), (255, 255, 255)
MODELS = ((37, 99, 201), (43, 138, 87), (138, 75, 184), (184, 134, 11), (217, 98, 43))
BASELINE = (150, 157, 168)


def card_picture(card: Card) -> Pixels:
    """The verdict and the bars, uint8 [H, 900, 3]; the score that decides comes first."""
    from PIL import Image, ImageDraw, ImageFont

    large, usual, small = (ImageFont.load_default(size) for size in (21, 15, 13))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines = _wrapped(card.verdict.text or "No verdict.", WIDTH - 2 * MARGIN, large, measure)
    scores = _scores(card)
    rows = sum(1.5 + sum(score in one.results for one in card.contenders) for score in scores)
    height = int(2 * MARGIN + 30 * len(lines) + 10 + ROW * rows + (24 if _left_out(card) else 0))
    picture = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(picture)
    y = float(MARGIN)
    for line in lines:
        draw.text((MARGIN, y), line, INK, large)
        y += 30
    y += 10
    for score in scores:
        draw.text((MARGIN, y + 0.4 * ROW), group_of(score), SOFT, small)
        y += 1.5 * ROW
        drawn = [one for one in card.contenders if score in one.results]
        whole = _whole(score, drawn)
        for one in drawn:
            _bar(draw, card, one, score, (y, whole, usual))
            y += ROW
    if left_out := _left_out(card):
        draw.text((MARGIN, y + 8), f"and {left_out} more scores on the card", SOFT, small)
    return np.asarray(picture).copy()


def _scores(card: Card) -> list[str]:
    """The score that decides, and the first one of each other title."""
    names = _all(card)
    names = names if card.score not in names else [card.score, *names]
    titles = {title_of(name): name for name in reversed(names)}
    return list(dict.fromkeys(titles[title_of(name)] for name in names))[:GROUPS]


def _all(card: Card) -> list[str]:
    """Scores that have a truth; the others where there are only these."""
    names = list(dict.fromkeys(name for one in card.contenders for name in one.results))
    return [name for name in names if name not in UNLABELLED] or names


def _left_out(card: Card) -> int:
    return len(_all(card)) - len(_scores(card))


def _whole(score: str, drawn: list[Contender]) -> float:
    ends = [one.results[score].interval.high for one in drawn]
    largest = max([abs(end) for end in ends if np.isfinite(end)], default=1.0) or 1.0
    return 1.0 if largest <= 1 and not is_lower_better(score) else largest


def _bar(draw: Any, card: Card, one: Contender, score: str, at: tuple[float, float, Any]) -> None:
    y, whole, font = at
    interval = one.results[score].interval
    models = [x.name for x in card.contenders if x.role == "model"]
    is_model = one.role == "model"
    colour = MODELS[models.index(one.name) % len(MODELS)] if is_model else BASELINE
    left, right = LEFT, WIDTH - RIGHT
    draw.text((MARGIN, y + 3), _cut(name_of(card, one), LEFT - MARGIN - 12, font, draw), INK, font)
    draw.rounded_rectangle((left, y + 4, right, y + ROW - 5), 4, TRACK)

    def place(value: float) -> float:
        share = value / whole if np.isfinite(value) else 0.0
        return left + (right - left) * min(1.0, max(0.0, share))

    if place(interval.value) > left + 1:
        draw.rounded_rectangle((left, y + 4, place(interval.value), y + ROW - 5), 4, colour)
    if interval.high > interval.low:
        low, high, middle = place(interval.low), place(interval.high), y + ROW / 2
        draw.line((low, middle, high, middle), INK, 2)
        for end in (low, high):
            draw.line((end, middle - 5, end, middle + 5), INK, 2)
    draw.text((WIDTH - MARGIN, y + 3), with_margin(interval), INK, font, anchor="ra")


def _wrapped(text: str, width: float, font: Any, draw: Any) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _cut(text: str, width: float, font: Any, draw: Any) -> str:
    while draw.textlength(text, font) > width and len(text) > 4:
        text = f"{text[:-2]}…"
    return text
