"""What was seen, drawn: the pictures of each image, and the page that shows them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.images.shown import Pixels, three_channels
from pipeline.report.page import Bar, Bars, Gallery, Group, Section, Table, Text, Tile
from pipeline.use import pictures
from pipeline.use.looking import Seen
from pipeline.use.masks import Classes
from pipeline.use.segment import pixel_classes

HEADS = 16  # that are shown
TILE = 272  # pixels of a picture on the page: four side by side
CAPTIONS = {
    "image": "",
    "attention": "mean of all heads; violet is least, yellow most, of this image",
    "heads": "{heads}, each on its own scale",
    "components": "like colours are like parts, in all images; black is around the object",
    "similarity": "cosine with the framed patch; violet {low:.2f} to yellow {high:.2f} in all",
    "classes": "the class that each pixel's patches are most like",
}


@dataclass(frozen=True)
class Drawn:
    """One image with its pictures by name (keys of `CAPTIONS`), and the mask of its own size.

    Attributes:
        name: for people.
        pictures: by name.
        mask: class of each pixel.
        shares: of each class among the pixels; a small one keeps them when the mask is gone.
    """

    name: str
    pictures: dict[str, Pixels]
    mask: npt.NDArray[np.int64] | None = None
    shares: tuple[float, ...] = ()

    def small(self, classes: Classes | None) -> Drawn:
        """As it is kept for the page: small pictures, and of the mask the shares."""
        views = {
            name: pictures.reduced(one, 2 * TILE) if max(one.shape) > 2 * TILE else one
            for name, one in self.pictures.items()
        }
        if self.mask is None or classes is None:
            return Drawn(self.name, views)
        shares = tuple(float((self.mask == one).mean()) for one in range(len(classes.ids)))
        return Drawn(self.name, views, shares=shares)

    def file(self, number: int, picture: str) -> str:
        """Name of a PNG: `01-cat-attention.png`."""
        stem = re.sub(
            r"[^A-Za-z0-9]+", "-", self.name.rpartition("/")[2].rpartition(".")[0] or self.name
        )
        return f"{number:02d}-{stem.strip('-')[:40] or 'image'}-{picture}.png"


def draw(
    images: Iterable[tuple[str, Pixels]], seen: Seen, classes: Classes | None
) -> Iterator[Drawn]:
    """The pictures of images uint8 [H, W, C] with their names, one image after the other."""
    scale = similarities(seen)
    for number, (name, pixels) in enumerate(images):
        size = pictures.shown_size(*pixels.shape[:2])
        shown = pictures.resized(three_channels(pixels), size)
        views = {"image": shown}
        mask = None
        if seen.attention:
            heads = seen.attention[number]
            views["attention"] = pictures.heat(shown, heads.mean(0))
            small = pictures.reduced(shown, pictures.SMALLEST) if len(heads) > 4 else shown
            views["heads"] = pictures.sheet(
                [pictures.heat(small, head) for head in heads[:HEADS]],
                math.ceil(math.sqrt(min(len(heads), HEADS))),
            )
        views["components"] = pictures.patches(seen.colours[number], size)
        if seen.similarity:
            like = seen.similarity[number]
            views["similarity"] = pictures.heat(shown, like, scale)
            if number == 0 and seen.marked:
                grid = (like.shape[0], like.shape[1])
                views["similarity"] = pictures.framed(views["similarity"], seen.marked, grid)
        if seen.scores and classes:
            scores = seen.scores[number][None]
            mask = pixel_classes(scores, (pixels.shape[0], pixels.shape[1]))[0].numpy()
            shown_mask = pixel_classes(scores, size)[0].numpy()
            views["classes"] = pictures.painted(shown, shown_mask, classes.colours())
        yield Drawn(name, views, mask)


def similarities(seen: Seen) -> tuple[float, float]:
    """The lowest and the highest similarity in all images."""
    low = min((float(one.min()) for one in seen.similarity), default=0.0)
    return low, max((float(one.max()) for one in seen.similarity), default=0.0)


def sections(
    drawn: Sequence[Drawn],
    seen: Seen,
    classes: Classes | None,
    facts: dict[str, str],
    left_out: Sequence[str] = (),
) -> list[Section]:
    """The page: facts, what was not read, then the pictures of each image (`small` ones)."""
    low, high = similarities(seen)
    heads = len(seen.attention[0]) if seen.attention else 0
    shown = f"the first {HEADS} of {heads} heads" if heads > HEADS else "all heads"
    shares = ", ".join(f"{share:.0%}" for share in seen.shares)
    in_captions = {"low": low, "high": high, "heads": shown}
    words = [
        "Attention is that of the CLS token to the patches; CLS and registers are left out."
        if seen.attention
        else f"There is no attention: {seen.no_attention}.",
        "Components are those of the patches of all images together. The first one parts the "
        f"object from what is around it ({seen.foreground:.0%} of all patches are object); red, "
        f"green and blue are the components of the object, with {shares} of its variance.",
        "Each picture lies beside this page as a PNG of its own.",
    ]
    page: list[Section] = [Table({"": list(facts), " ": list(facts.values())}, "What was asked")]
    page.append(Text("\n\n".join(words), "How to read it"))
    if left_out:
        page.append(Text("\n\n".join(left_out), "Not read"))
    if classes:
        page.append(_legend(drawn, classes))
    for one in drawn:
        tiles = [
            Tile(picture, (name, CAPTIONS[name].format(**in_captions)), f"{name} of {one.name}")
            for name, picture in one.pictures.items()
        ]
        page.append(Gallery([Group(tiles)], one.name, tile=TILE))
    return page


def overview(drawn: Sequence[Drawn], picture: str, side: int) -> Pixels:
    """Images beside one of their pictures, in pairs, about as high as wide."""
    tiles = []
    for one in drawn:
        tiles += [pictures.squared(one.pictures[name], side) for name in ("image", picture)]
    columns = math.ceil(math.sqrt(len(tiles)))
    return pictures.sheet(tiles, columns + columns % 2)


def _legend(drawn: Sequence[Drawn], classes: Classes) -> Section:
    bars = []
    for number, (name, colour) in enumerate(zip(classes.names, classes.colours(), strict=True)):
        share = float(np.mean([one.shares[number] for one in drawn]))
        shown = "#{:02x}{:02x}{:02x}".format(*colour) if colour.any() else "var(--c6)"
        tip = f"id {classes.ids[number]}" + ", shown as the image is" * (not colour.any())
        bars.append(Bar(name, [(share, shown)], f"{share:.1%}", tip))
    return Bars(bars, "Classes", whole=1.0, head=("class", "share of the pixels of an image"))
