"""Pictures as MLflow shows them: below what they are and their step, and beside the first one.

A card of MLflow shows the picture of step 0 until somebody moves its slider, and prints nothing
about it. So words go into the picture; and the newest picture stands beside the first one under a
key of its own, whose only step is 0, which the card shows without being asked. A card is square and
cuts what is at its bottom, so words stand above.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

BESIDE = "first and last step"  # section of the pictures that stand beside the first one
PAPER, INK = (255, 255, 255), (31, 39, 46)
GAP = 12  # pixels
SIZE_SHARE = 0.032  # of letters, of the picture's width
SMALLEST = 13


def shown(file: Path, step: int, caption: str) -> dict[str, tuple[Image.Image, int]]:
    """What MLflow is sent of a picture: by key, "" for its own, the picture and the step.

    Args:
        file: `pictures/<stage>/<name>-<step>.png` of the run folder.
        step: of it.
        caption: what it shows; may be empty.

    Raises:
        OSError: the file cannot be read.
    """
    text = f"Step {step:,}. {caption}".strip() if caption else ""
    newest = _read(file)
    sent = {"": (with_caption(newest, text), step)}
    name = re.sub(r"-\d+$", "", file.stem)
    first = min(file.parent.glob(f"{name}-{'[0-9]' * 8}.png"), default=file)
    if first == file:
        return sent
    begun = int(first.stem.rpartition("-")[2])
    titles = [f"Step {begun:,}" + ", before training" * (begun == 0), f"Step {step:,}"]
    both = side_by_side([_read(first), newest], titles, caption)
    return sent | {f"{BESIDE}/{name}": (both, 0)}


def with_caption(picture: Image.Image, text: str) -> Image.Image:
    """The picture below a few lines of text, or as it is without one."""
    return side_by_side([picture], [""], text) if text else picture


def side_by_side(pictures: list[Image.Image], titles: list[str], caption: str) -> Image.Image:
    """Pictures in a row, each below its title, all below a caption; at least as high as wide."""
    from PIL import Image, ImageDraw, ImageFont

    width = sum(one.width for one in pictures) + GAP * (len(pictures) - 1)
    font = ImageFont.load_default(max(SMALLEST, int(SIZE_SHARE * width)))
    line = int(sum(font.getbbox("Hg")[1::2]) * 1.05)
    lines = _wrapped(caption, width - GAP, font) if caption else []
    top = len(lines) * line + GAP
    below = top + (line + GAP // 2 if any(titles) else 0)
    height = max(width, below + max(one.height for one in pictures))
    sheet = Image.new("RGB", (width, height), PAPER)
    draw, left = ImageDraw.Draw(sheet), 0
    for number, words in enumerate(lines):
        draw.text((GAP // 2, GAP // 3 + number * line), words, INK, font)
    for one, title in zip(pictures, titles, strict=True):
        draw.text((left + GAP // 2, top), title, INK, font)
        sheet.paste(one, (left, below))
        left += one.width + GAP
    return sheet


def _wrapped(text: str, width: float, font: Any) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _read(file: Path) -> Image.Image:
    from PIL import Image

    with Image.open(file) as picture:
        return picture.convert("RGB")
