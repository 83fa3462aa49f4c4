"""Where the main model errs, as sections of a page: by class, by pair of classes, by image."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.card.card import Card, WrongAnswer
from pipeline.card.scoring.wrong import PAIRS, SAMPLES
from pipeline.embed.image_reader import ImageReader
from pipeline.errors import PipelineError, one_line
from pipeline.images.decode import MAX_PIXELS
from pipeline.images.value_range import FULL
from pipeline.report.page import (
    Column,
    Gallery,
    Group,
    Heading,
    Matrix,
    Section,
    Table,
    Tile,
)
from pipeline.search.page import Pictures

log = logging.getLogger("pipeline.evaluate")

ImageOf = Callable[[str], Any]  # of an image id: uint8 [H, W, 3], encoded bytes, or None

WRONG = 12  # images with their neighbours
NEIGHBOURS = 6
MATRIX_CLASSES = 12  # of a confusion that is shown whole


def mistakes(card: Card, image_of: ImageOf) -> Iterator[Section]:
    """All of them; nothing where no answers are known."""
    if not (card.confusion.images or card.wrong):
        return
    main = next((one.name for one in card.contenders if one.role == "model"), "the model")
    yield Heading("Mistakes", f"By the nearest neighbours of {main}.")
    if card.confusion.images:
        yield from _classes(card)
    if pairs := card.confusion.wrong[:PAIRS]:
        yield Gallery(
            [_pair(card, *pair, image_of) for pair in pairs],
            "Classes that are taken for one another",
            "The pairs with the most wrong answers" + _most_confident(card),
            flow=True,
        )
    if card.wrong:
        yield Gallery(
            [_wrong(card, one, image_of) for one in card.wrong[:WRONG]],
            "The surest wrong answers",
            "First the image that was asked, then its nearest ones, the nearest first. ✓ has the "
            "class of the image, ✗ another. Sure and wrong is often a wrong label.",
        )


def class_name(card: Card, number: int) -> str:
    """A class by its name, or by its number where there are no names."""
    names = card.settings.get("classes") or card.reference.class_names
    return str(names[number]) if number < len(names) else f"class {number}"


def _classes(card: Card) -> Iterator[Section]:
    """Each class with its share of right answers, the worst first."""
    images, right = np.array(card.confusion.images), np.array(card.confusion.right)
    asked = np.flatnonzero(images)
    share = right[asked] / images[asked]
    order = asked[np.lexsort((-images[asked], share))]
    names = [class_name(card, number) for number in range(len(images))]
    frequent: dict[int, str] = {}
    for truth, answer, count in card.confusion.wrong:
        frequent.setdefault(truth, f"{names[answer]} ({count:,})")
    yield Table(
        {
            "class": [names[i] for i in order],
            "images": [int(images[i]) for i in order],
            "right": [int(right[i]) for i in order],
            "share": [f"{right[i] / images[i]:.2f}" for i in order],
            "most often taken for": [frequent.get(int(i), "") for i in order],
        },
        "Classes, the worst first",
    )
    if len(names) <= MATRIX_CLASSES and card.confusion.is_whole:
        counts = np.diag(right)
        for truth, answer, count in card.confusion.wrong:
            counts[truth, answer] = count
        rows = {names[i]: [int(images[i]), *map(int, counts[i])] for i in asked}
        yield Matrix(
            [Column("all"), *(Column(name) for name in names)],
            rows,
            [int(images.sum()), *map(int, counts.sum(0))],
            corner="truth, and what was answered",
            title="Answers of each class",
        )


def _most_confident(card: Card) -> str:
    return "; pictures are of the surest ones." if card.wrong else "."


def _pair(card: Card, truth: int, answer: int, count: int, image_of: ImageOf) -> Group:
    of_pair = [one for one in card.wrong if (one.truth, one.answer) == (truth, answer)]
    names = class_name(card, truth), class_name(card, answer)
    tiles = [
        Tile(_pixels(image_of, one.query), (f"{one.votes:.0%} sure",), alt=f"a {names[0]} image")
        for one in of_pair[:SAMPLES]
    ]
    of = card.confusion.images[truth]
    return Group(tiles, f"{names[0]} → {names[1]}", f"{count:,} of {of:,} ({count / of:.0%})")


def _wrong(card: Card, one: WrongAnswer, image_of: ImageOf) -> Group:
    truth, answer = class_name(card, one.truth), class_name(card, one.answer)
    tiles = [Tile(_pixels(image_of, one.query), (truth, "asked"), f"the image, {truth}", "query")]
    for image, number, cosine in one.neighbours[:NEIGHBOURS]:
        right = number == one.truth
        name = class_name(card, number)
        tiles.append(
            Tile(
                _pixels(image_of, image),
                (f"{'✓' if right else '✗'} {name}", f"cosine {cosine:.2f}"),
                f"a neighbour, {name}",
                "right" if right else "wrong",
            )
        )
    return Group(tiles, f"{truth}, taken for {answer}", f"{one.votes:.0%} of the votes", close=True)


def _pixels(image_of: ImageOf, image_id: str) -> Any:
    try:
        picture = image_of(image_id)
    except (KeyError, PipelineError, OSError) as error:  # the numbers are worth a page without it
        log.warning("evaluate    no picture of %s: %s", image_id, one_line(error))
        return b""
    return b"" if picture is None else picture


def pictures_of(readers: Sequence[ImageReader], max_pixels: int = MAX_PIXELS) -> ImageOf:
    """Small JPEGs by image id, decoded as every stage decodes.

    Args:
        readers: of the images of the reference and of the queries.
        max_pixels: of an image that is decoded.
    """
    known = [
        Pictures(one, max_pixels=max_pixels, value_range=one.shards.value_range or FULL)
        for one in readers
    ]

    def image_of(image_id: str) -> bytes | None:
        holder = next((one for one in known if image_id in one.images), None)
        return holder.small(holder.images[image_id]) if holder else None

    return image_of
