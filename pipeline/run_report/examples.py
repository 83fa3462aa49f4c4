"""Examples as galleries: neighbours with captions, components and attention before and after."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.card.examples.kept import Asked, Look, Neighbour
from pipeline.report.page import Gallery, Group, Heading, Section, Text, Tile
from pipeline.run_report.facts import RunFacts

TILE = 128  # pixels
SIGNS = {True: ("✓", "right"), False: ("✗", "wrong"), None: ("", "")}


def neighbour_sections(facts: RunFacts) -> Iterator[Section]:
    """A few images with the nearest ones to each."""
    asked = facts.examples.asked
    if not asked:
        return
    known = [one.right for each in asked for one in each.neighbours if one.right is not None]
    text = "The framed image is asked; to its right are the nearest ones, the nearest first."
    if known:
        share = f"{sum(known):,} of {len(known):,} shown here are right"
        text += f" ✓ and green: the same class. ✗ and dashed red: another one. {share}."
    yield Heading("Neighbours", "What the trained network takes for alike.")
    yield Gallery([_group(one) for one in asked], text=text, tile=TILE)


def _group(one: Asked) -> Group:
    image = one.image
    lines = [line for line in (image.label or image.name, "asked") if line]
    tiles = [Tile(image.picture, lines, f"asked: {image.label or image.name}", "query", image.name)]
    return Group([*tiles, *map(_neighbour, one.neighbours)], close=True)


def _neighbour(one: Neighbour) -> Tile:
    sign, frame = SIGNS[one.right]
    name = one.image.label or one.image.name
    said = {True: ", the same class", False: ", another class", None: ""}[one.right]
    return Tile(
        one.image.picture,
        (f"{sign} {name}".strip(), f"{one.cosine:.2f}"),
        f"neighbour: {name}{said}, similarity {one.cosine:.2f}",
        frame,
        one.image.name,
    )


def look_sections(facts: RunFacts) -> Iterator[Section]:
    """What the network sees in a few images, before its training and after."""
    examples = facts.examples
    why = "; ".join(examples.remarks)
    if not examples.looks:
        if why and examples.asked:
            yield Heading("What it sees", "")
            known = "its network has no patches" if "no patch tokens" in why else why
            yield Text(f"There are no pictures of patches: {known}.")
        return
    start = "before" if facts.card and any(
        one.role == "init" for one in facts.card.contenders
    ) else "step 0"  # fmt: skip
    kinds = list(examples.looks[0].pictures)
    text = (
        "Components colour the patches: parts of like colours are alike to the network. The "
        "colours of the two networks have nothing to do with each other."
    )
    if "attention" in kinds:
        text += (
            " Attention is that of the CLS token, the mean of all heads: yellow is most, on one "
            "scale before and after."
        )
    else:
        text += " This encoder has no CLS token with an attention that could be shown."
    yield Heading("What it sees", "Patches of the same images before training, and after it.")
    groups = [_look(one, start) for one in examples.looks]
    yield Gallery(groups, text=text, flow=len(kinds) == 1, tile=TILE)


def _look(one: Look, start: str) -> Group:
    name = one.image.label or one.image.name
    tiles = [Tile(one.image.picture, (name,), f"image: {name}", tip=one.image.name)]
    for kind, (before, after) in one.pictures.items():
        tiles.append(Tile(before, (kind, start), f"{kind} of {name}, {start}"))
        tiles.append(Tile(after, (kind, "trained"), f"{kind} of {name}, trained"))
    return Group(tiles, close=True)
