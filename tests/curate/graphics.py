"""Drawn images: graphics that show something on a plain ground, and images that show nothing."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Draw = Callable[[np.random.Generator, ImageDraw.ImageDraw, float, tuple[int, ...]], None]


def _letters(size: float) -> Any:
    return ImageFont.load_default(max(10, int(size)))


def _words(rng: np.random.Generator, count: int) -> str:
    return " ".join(
        "".join(chr(97 + rng.integers(26)) for _ in range(rng.integers(2, 9))) for _ in range(count)
    )


def _logo(rng, draw, u, colour) -> None:
    x, y = rng.uniform(10, 50, 2) * u
    r = rng.uniform(20, 35) * u
    shape = rng.integers(4)
    if shape == 0:
        draw.ellipse((x, y, x + r, y + r), fill=colour)
    elif shape == 1:
        draw.rectangle((x, y, x + r, y + r), fill=colour)
    elif shape == 2:
        draw.polygon([(x + r / 2, y), (x, y + r), (x + r, y + r)], fill=colour)
    else:
        draw.ellipse((x, y, x + r, y + r), outline=colour, width=max(1, int(4 * u)))


def _qr_code(rng, draw, u, colour) -> None:
    for row, column in np.argwhere(rng.integers(0, 2, (21, 21))):
        x, y = (10 + 3 * column) * u, (5 + 3 * row) * u
        draw.rectangle((x, y, x + 3 * u - 1, y + 3 * u - 1), fill="black")


def _line_chart(rng, draw, u, colour) -> None:
    draw.line((10 * u, 5 * u, 10 * u, 60 * u, 95 * u, 60 * u), fill="black")
    points = [((10 + 8 * i) * u, (60 - rng.uniform(5, 50)) * u) for i in range(10)]
    draw.line(points, fill=colour, width=max(1, int(u)))


def _bar_chart(rng, draw, u, colour) -> None:
    for i in range(6):
        top = (60 - rng.uniform(5, 50)) * u
        draw.rectangle(((10 + 14 * i) * u, top, (20 + 14 * i) * u, 60 * u), fill=colour)


def _price_tag(rng, draw, u, colour) -> None:
    price = f"{rng.integers(1, 99)}.{rng.integers(10, 99)}"
    draw.text((8 * u, 10 * u), price, font=_letters(20 * u), fill=colour)


def _icon(rng, draw, u, colour) -> None:
    a, b = rng.uniform(20, 35) * u, rng.uniform(50, 65) * u
    draw.line((a, a, b, b), fill=colour, width=max(1, int(5 * u)))
    draw.line((b, a, a, b), fill=colour, width=max(1, int(5 * u)))


def _line_drawing(rng, draw, u, colour) -> None:
    for _ in range(6):
        draw.line([tuple(rng.uniform(5, 70, 2) * u) for _ in range(3)], fill="black")


def _text(rng, draw, u, colour) -> None:
    for line in range(max(1, int(5 * u))):
        draw.text((4, 4 + 15 * line), _words(rng, int(2 * u) + 1), font=_letters(11), fill="black")


def _one_line(rng, draw, u, colour) -> None:
    draw.text((5, 30 * u), f"page {rng.integers(99)}", font=_letters(12), fill=(60, 60, 60))


def _sign(rng, draw, u, colour) -> None:
    draw.rectangle((0, 0, 200 * u, 200 * u), fill=colour)
    x, y = rng.uniform(5, 30, 2) * u
    draw.ellipse((x, y, x + 35 * u, y + 35 * u), fill=(250, 250, 250))


def _night_clock(rng, draw, u, colour) -> None:
    draw.rectangle((0, 0, 200 * u, 200 * u), fill=(8, 8, 8))
    draw.text((10 * u, 20 * u), f"{rng.integers(999):03}", font=_letters(16 * u), fill="white")


def _equally_bright(rng, draw, u, colour) -> None:
    draw.rectangle((0, 0, 200 * u, 200 * u), fill=(200, 60, 60))
    x, y = rng.uniform(5, 30, 2) * u
    draw.ellipse((x, y, x + 40 * u, y + 40 * u), fill=(0, 138, 0))


GRAPHICS: dict[str, Draw] = {
    name.strip("_"): draw
    for name, draw in globals().items()
    if name.startswith("_") and name not in ("_letters", "_words") and callable(draw)
}


def graphic(kind: str, number: int) -> Pixels:
    """One of a kind: another shape, size, place and colour each; some as JPEG, some noisy."""
    rng = np.random.default_rng([sorted(GRAPHICS).index(kind), number])
    side = int(rng.choice([48, 96, 160, 300, 600]))
    ground = (255,) * 3 if number % 3 else tuple(int(x) for x in rng.integers(225, 256, 3))
    image = Image.new("RGB", (side, int(side * rng.uniform(0.7, 1.3))), ground)
    colour = tuple(int(x) for x in rng.integers(0, 180, 3))
    GRAPHICS[kind](rng, ImageDraw.Draw(image), side / 100, colour)
    pixels = np.asarray(image)
    if number % 4 == 1:
        return compressed(pixels, int(rng.choice([60, 85, 95])))
    if number % 4 == 2:
        pixels = pixels + rng.normal(0, 3, pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def compressed(pixels: Pixels, quality: int) -> Pixels:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream).convert("RGB"))


EMPTY = {
    "blank page": lambda rng, y, x: 250 - rng.uniform(0, 15) * x + 0 * y,
    "scanned blank page": lambda rng, y, x: (
        rng.uniform(235, 255) - rng.uniform(0, 15) * x + rng.normal(0, rng.uniform(0.5, 4), x.shape)
    ),
    "black frame": lambda rng, y, x: abs(rng.normal(0, rng.uniform(0.1, 6), x.shape)),
    "vignetted black frame": lambda rng, y, x: (
        rng.uniform(5, 60) * (1 - rng.uniform(0.5, 1.5) * ((x - 0.5) ** 2 + (y - 0.5) ** 2)) ** 2
        + rng.normal(0, rng.uniform(0, 3), x.shape)
    ),
    "one colour": lambda rng, y, x: rng.integers(0, 256, 3) + 0 * x,
    "gradient": lambda rng, y, x: (
        rng.integers(0, 256, 3) * x + rng.integers(0, 256, 3) * (1 - x) * rng.uniform(0.5, 1)
        + rng.uniform(0, 50) * y
    ),
    "radial gradient": lambda rng, y, x: (
        np.hypot(x - rng.uniform(0.2, 0.8), y - rng.uniform(0.2, 0.8)) * rng.integers(50, 250, 3)
    ),
    "sensor noise": lambda rng, y, x: (
        rng.integers(20, 236, 3) + rng.normal(0, rng.uniform(1, 20), (*x.shape[:2], 3))
    ),
}  # fmt: skip


def empty(kind: str, number: int, quality: int = 0) -> Pixels:
    """One of a kind, of another size and shade each; as JPEG where a quality is given."""
    rng = np.random.default_rng([sorted(EMPTY).index(kind), number])
    side = int(rng.choice([96, 160, 300, 600]))
    height, width = side, int(side * rng.uniform(0.8, 1.4))
    y, x = np.mgrid[:height, :width]
    values = EMPTY[kind](rng, y[..., None] / height, x[..., None] / width)
    pixels = np.broadcast_to(values, (height, width, 3)).clip(0, 255).astype(np.uint8)
    return compressed(pixels, quality) if quality else pixels
