"""Masks in files: black and white, or a class id in each pixel (grey or palette PNG).

H x W pixels, K classes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.errors import DataError
from pipeline.use.segment import VOID

WHITE = 255
AROUND, OBJECT, OTHER = "around", "object", "other"
LOSSY = ("JPEG", "WEBP", "MPO")
EXPECTED = "a mask is a PNG: black and white, or the id of a class in each pixel"
# Hues that stay apart for colour-blind eyes (Okabe and Ito 2008), then others between them.
COLOURS = np.array(
    [
        *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178)),
        *((213, 94, 0), (204, 121, 167), (120, 94, 60), (150, 150, 220), (110, 110, 110)),
    ],
    np.uint8,
)

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Classes:
    """The classes of masks.

    Attributes:
        ids: in the files, of each class; white is that of an object.
        names: of each class.
        background: whether the first class is what is around an object, or all that has no name.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    background: bool = False

    def colours(self) -> npt.NDArray[np.uint8]:
        """A colour for each class, uint8 [K, 3]; black for the background."""
        painted = COLOURS[np.arange(len(self.ids) - self.background) % len(COLOURS)]
        return np.concatenate([np.zeros((int(self.background), 3), np.uint8), painted])

    def encoded(self, mask: Ids) -> bytes:
        """A mask of class numbers [H, W] as PNG with the ids of the files, in colours."""
        ids = np.asarray(self.ids, np.uint8)
        picture = Image.fromarray(ids[mask])
        palette = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)  # grey where unused
        palette[ids] = self.colours()
        if self.names != (AROUND, OBJECT):  # black and white stay so
            picture.putpalette(palette.tobytes())
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        return stream.getvalue()


def read_masks(
    files: Sequence[tuple[str, bytes]], names: Mapping[str, int], void: int = VOID
) -> tuple[list[Ids], Classes]:
    """Masks with classes that are numbered from 0, and what the numbers mean.

    Where all pixels are black or white, white is an object and black is what is around it. Else
    each id is a class, called by its name in `names`; ids without a name are one class, `other`,
    where any id has a name.

    Args:
        files: name and content of each.
        names: id of each class that has a name.
        void: id of pixels that belong to no class; in files that are written, of `other` too.

    Returns:
        int64 [H, W] of each file, with `VOID` where it belongs to no class; and the classes.

    Raises:
        DataError: a file is no mask, the masks are empty or have one class only, or a class with a
            name has the id `void`.
    """
    if void in names.values():
        raise DataError(
            f"look.void={void} is the id of a class that has a name", "give look.void another id"
        )
    raw = [mask_ids(name, content) for name, content in files]
    present = sorted({int(one) for ids in raw for one in np.unique(ids)} - set(names.values()))
    if not names and void != 0 and set(present) <= {0, WHITE}:
        return _black_and_white(files, raw)
    unnamed = [one for one in present if one != void]
    if absent := [f"{name} ({one})" for name, one in names.items() if not _anywhere(raw, one)]:
        raise DataError(
            f"no pixel of {_listed(files)} is of the class {', '.join(absent)}",
            f"the ids in it are {', '.join(map(str, sorted(_all(raw))))}",
        )
    if names:
        groups = [unnamed] * bool(unnamed) + [[one] for one in names.values()]
        labels = (*[OTHER] * bool(unnamed), *names)
        ids = (*[void] * bool(unnamed), *names.values())
    else:
        groups, labels = [[one] for one in unnamed], tuple(f"class {one}" for one in unnamed)
        ids = tuple(unnamed)
    if len(groups) < 2:
        raise DataError(
            f"{_listed(files)} shows {labels[0] if labels else 'no class at all'}, expected two "
            "classes at least",
            f"{EXPECTED}; {void} stands for pixels of no class",
        )
    masks = []
    for one in raw:
        mask = np.full(one.shape, VOID, np.int64)
        for number, group in enumerate(groups):
            mask[np.isin(one, group)] = number
        masks.append(mask)
    return masks, Classes(ids, labels, bool(names and unnamed))


def _black_and_white(
    files: Sequence[tuple[str, bytes]], raw: list[Ids]
) -> tuple[list[Ids], Classes]:
    masks = [(ids == WHITE).astype(np.int64) for ids in raw]
    white = [float(mask.mean()) for mask in masks]
    if not any(white):
        raise DataError(f"{_listed(files)} is empty: all its pixels are black", EXPECTED)
    if all(share == 1 for share in white):
        raise DataError(
            f"{_listed(files)} is white all over, so that nothing is around the object", EXPECTED
        )
    return masks, Classes((0, WHITE), (AROUND, OBJECT), background=True)


def mask_ids(name: str, content: bytes) -> Ids:
    """The ids of a mask as they are in its file, int64 [H, W], 0 to 255.

    Raises:
        DataError: it cannot be read, has colours, or was saved with a loss.
    """
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if picture.format in LOSSY:
                raise DataError(
                    f"{name} is a {picture.format}, whose pixels are not those that were saved",
                    EXPECTED,
                )
            bands = picture.getbands()
            values = np.asarray(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} cannot be read as a picture: {error}", EXPECTED) from error
    if "A" in bands:  # what is transparent is nothing
        values = np.where(values[..., -1:] > 0, values[..., :-1], 0)
    if values.ndim == 3:
        if not (values == values[..., :1]).all():
            raise DataError(f"{name} is a picture in colours, not a mask of class ids", EXPECTED)
        values = values[..., 0]
    if values.dtype == bool:
        values = values * WHITE
    if values.min() < 0 or values.max() > 255:
        raise DataError(
            f"{name} has ids from {values.min()} to {values.max()}, expected 0 to 255", EXPECTED
        )
    return values.astype(np.int64)


def _all(raw: list[Ids]) -> set[int]:
    return {int(one) for ids in raw for one in np.unique(ids)}


def _anywhere(raw: list[Ids], one: int) -> bool:
    return any(bool((ids == one).any()) for ids in raw)


def _listed(files: Sequence[tuple[str, bytes]]) -> str:
    return ", ".join(name for name, _ in files)
