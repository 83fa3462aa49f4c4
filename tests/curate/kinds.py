"""Kinds of pictures of which two are alike and yet different: generators for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Rng = np.random.Generator


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _words(rng: Rng, count: int) -> list[str]:
    return [
        "".join(chr(97 + rng.integers(26)) for _ in range(rng.integers(3, 9))) for _ in range(count)
    ]


def _colour(rng: Rng, top: int = 255) -> tuple[int, ...]:
    return tuple(int(x) for x in rng.integers(0, top, 3))


def _scene(rng: Rng, width: int = 320, height: int = 240, cells: int = 24) -> Image.Image:
    noise = rng.integers(0, 256, (cells, cells * 4 // 3, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def documents(rng: Rng, count: int) -> Iterator[Image.Image]:
    """Invoices of one layout with other text."""
    words = _words(rng, 300)
    for _ in range(count):
        image = Image.new("RGB", (300, 400), "white")
        draw = ImageDraw.Draw(image)
        draw.rectangle((10, 10, 290, 50), outline="black")
        draw.text((20, 18), "INVOICE", font=_font(22), fill="black")
        for line in range(22):
            draw.text(
                (15, 65 + 15 * line), " ".join(rng.choice(words, 6)), font=_font(11), fill="black"
            )
        yield image


def totals(rng: Rng, count: int) -> Iterator[Image.Image]:
    """One invoice with another total and number."""
    words = _words(rng, 300)
    lines = [" ".join(rng.choice(words, 6)) for _ in range(18)]
    for i in range(count):
        image = Image.new("RGB", (620, 800), "white")
        draw = ImageDraw.Draw(image)
        draw.text((40, 30), f"INVOICE {10_000 + 17 * i}", font=_font(30), fill="black")
        for line, text in enumerate(lines):
            draw.text((40, 120 + 30 * line), text, font=_font(20), fill="black")
        draw.text(
            (400, 740),
            f"{rng.integers(100, 999)}.{rng.integers(10, 99)} EUR",
            font=_font(22),
            fill="black",
        )
        yield image


def plates(rng: Rng, count: int) -> Iterator[Image.Image]:
    """One street with another number plate."""
    scene = _scene(rng)
    for i in range(count):
        image = scene.copy()
        draw = ImageDraw.Draw(image)
        draw.rectangle((120, 180, 200, 205), fill="white")
        draw.text((124, 180), f"{1000 + 37 * i}", font=_font(22), fill="black")
        yield image


def logos(rng: Rng, count: int) -> Iterator[Image.Image]:
    """A shape on white."""
    for i in range(count):
        image = Image.new("RGB", (160, 160), "white")
        draw, fill = ImageDraw.Draw(image), _colour(rng, 200)
        x, y = (int(v) for v in rng.integers(45, 70, 2))
        if i % 5 == 0:
            draw.ellipse((x, y, x + 40, y + 40), fill=fill)
        elif i % 5 == 1:
            draw.rectangle((x, y, x + 40, y + 40), fill=fill)
        elif i % 5 == 2:
            draw.polygon([(x + 20, y), (x, y + 40), (x + 40, y + 40)], fill=fill)
        elif i % 5 == 3:
            draw.line((x, y, x + 40, y + 40), fill=fill, width=8)
            draw.line((x + 40, y, x, y + 40), fill=fill, width=8)
        else:
            draw.ellipse((x, y, x + 40, y + 40), outline=fill, width=7)
        yield image


def qr_codes(rng: Rng, count: int) -> Iterator[Image.Image]:
    """Modules at random between three finders."""
    for _ in range(count):
        grid = rng.integers(0, 2, (29, 29)).astype(np.uint8)
        for y, x in ((0, 0), (0, 22), (22, 0)):
            grid[y : y + 7, x : x + 7] = 1
            grid[y + 1 : y + 6, x + 1 : x + 6] = 0
            grid[y + 2 : y + 5, x + 2 : x + 5] = 1
        pixels = np.pad(255 - 255 * grid, 3, constant_values=255).repeat(7, 0).repeat(7, 1)
        yield Image.fromarray(pixels).convert("RGB")


def line_charts(rng: Rng, count: int) -> Iterator[Image.Image]:
    """One pair of axes, another curve."""
    for _ in range(count):
        image = Image.new("RGB", (400, 300), "white")
        draw = ImageDraw.Draw(image)
        draw.line((40, 20, 40, 260, 380, 260), fill="black", width=2)
        y = 140 + np.cumsum(rng.normal(0, 14, 35)).clip(-110, 110)
        draw.line([(45 + 10 * k, float(v)) for k, v in enumerate(y)], fill=(31, 119, 180), width=2)
        yield image


def bar_charts(rng: Rng, count: int) -> Iterator[Image.Image]:
    """One pair of axes, other bars."""
    for _ in range(count):
        image = Image.new("RGB", (400, 300), "white")
        draw = ImageDraw.Draw(image)
        draw.line((40, 20, 40, 260, 380, 260), fill="black", width=2)
        for k, v in enumerate(rng.integers(40, 220, 8)):
            draw.rectangle((55 + 40 * k, 260 - int(v), 80 + 40 * k, 260), fill=(31, 119, 180))
        yield image


def price_tags(rng: Rng, count: int) -> Iterator[Image.Image]:
    """One tag, another price."""
    for _ in range(count):
        image = Image.new("RGB", (300, 180), (255, 220, 0))
        draw = ImageDraw.Draw(image)
        draw.rectangle((5, 5, 295, 175), outline="red", width=5)
        draw.text((30, 20), "SPECIAL OFFER", font=_font(26), fill="red")
        draw.text(
            (60, 80), f"{rng.integers(1, 99)}.{rng.integers(10, 99)}", font=_font(60), fill="black"
        )
        yield image


def digits(rng: Rng, count: int) -> Iterator[Image.Image]:
    """Handwritten digits of 8 x 8 pixels, enlarged."""
    from sklearn.datasets import load_digits

    for values in rng.permutation(load_digits().images)[:count]:
        small = Image.fromarray((values * 15.9).astype(np.uint8))
        yield small.resize((128, 128), Image.Resampling.BICUBIC).convert("RGB")


def growing(rng: Rng, count: int) -> Iterator[Image.Image]:
    """Frames of a plant that grows before one background."""
    background = _scene(rng, 320, 240, 6)
    for i in range(count):
        image = background.copy()
        draw = ImageDraw.Draw(image)
        top = 220 - 3 * i - 10
        draw.line((160, 225, 160, top), fill=(30, 120, 30), width=5)
        for k in range(220, top, -24):
            side = 26 if (k // 24) % 2 else -26
            draw.ellipse((160 + min(0, side), k - 7, 160 + max(0, side), k + 7), fill=(40, 150, 40))
        yield image


def seedlings(rng: Rng, count: int) -> Iterator[Image.Image]:
    """Frames of a plant of which stem and leaves grow by a pixel or three; all else is equal."""
    background = Image.fromarray(rng.integers(90, 150, (12, 16, 3), np.uint8))
    background = background.resize((320, 240), Image.Resampling.BICUBIC)
    for i in range(count):
        image = background.copy()
        draw = ImageDraw.Draw(image)
        height = 20 + 3 * i
        draw.line((160, 220, 160, 220 - height), fill=(30, 140, 30), width=4)
        for k in range(0, height, 24):
            size = 6 + (height - k) // 8
            for left in (160 - 2 * size, 160):
                box = (left, 214 - k - size // 2, left + 2 * size, 214 - k + size // 2)
                draw.ellipse(box, fill=(40, 160, 40))
        yield image


def spreadsheets(rng: Rng, count: int) -> Iterator[Image.Image]:
    """One table with another digit in another cell."""
    values = rng.integers(100, 99_999, (22, 6)).astype(str).astype(object)
    for cell in rng.permutation(values.size)[:count]:
        changed = values.copy()
        text = str(changed.flat[cell])
        changed.flat[cell] = text[:-1] + str((int(text[-1]) + int(rng.integers(1, 10))) % 10)
        image = Image.new("RGB", (640, 480), "white")
        draw = ImageDraw.Draw(image)
        for (row, column), value in np.ndenumerate(changed):
            draw.rectangle(
                (105 * column, 21 * row, 105 * column + 105, 21 * row + 21), outline=(200, 200, 200)
            )
            draw.text((10 + 105 * column, 3 + 21 * row), value, font=_font(13), fill="black")
        yield image


def cards(rng: Rng, count: int) -> Iterator[Image.Image]:
    """Business cards of one firm."""
    for _ in range(count):
        image = Image.new("RGB", (350, 200), (250, 250, 245))
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 0, 350, 45), fill=(20, 40, 90))
        draw.text((15, 10), "Northern Timber Ltd", font=_font(20), fill="white")
        name, other = (word.capitalize() for word in _words(rng, 2))
        draw.text((20, 80), f"{name} {other}", font=_font(18), fill="black")
        draw.text((20, 140), f"+44 {rng.integers(10**8, 10**9)}", font=_font(14), fill="black")
        yield image


def screenshots(rng: Rng, count: int) -> Iterator[Image.Image]:
    """One dashboard with other numbers."""
    for _ in range(count):
        image = Image.new("RGB", (640, 400), (240, 242, 245))
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 0, 640, 40), fill=(50, 50, 60))
        draw.text((20, 10), "Dashboard  Orders  Reports", font=_font(16), fill="white")
        for k in range(6):
            x, y = 20 + 205 * (k % 3), 70 + 160 * (k // 3)
            draw.rectangle((x, y, x + 190, y + 130), fill="white", outline=(210, 210, 210))
            draw.text((x + 15, y + 15), f"Metric {k}", font=_font(14), fill=(90, 90, 90))
            draw.text((x + 15, y + 55), f"{rng.integers(100, 9999)}", font=_font(28), fill="black")
        yield image


def maps(rng: Rng, count: int) -> Iterator[Image.Image]:
    """One map with another name of a place."""
    base = Image.new("RGB", (400, 300), (235, 230, 215))
    draw = ImageDraw.Draw(base)
    for _ in range(25):
        points = [tuple(int(v) for v in p) for p in rng.integers(0, 400, (3, 2))]
        draw.line(points, fill=_colour(rng, 200), width=int(rng.integers(1, 5)))
    for word in _words(rng, 12):
        draw.text(
            tuple(int(v) for v in rng.integers(0, 280, 2)), word, font=_font(12), fill="black"
        )
    for word in _words(rng, count):
        image = base.copy()
        ImageDraw.Draw(image).text((180, 140), word.capitalize(), font=_font(14), fill=(150, 0, 0))
        yield image


def sheet_music(rng: Rng, count: int) -> Iterator[Image.Image]:
    """Staves with other notes."""
    for _ in range(count):
        image = Image.new("RGB", (420, 300), "white")
        draw = ImageDraw.Draw(image)
        for staff in range(3):
            for line in range(5):
                draw.line(
                    (20, 40 + 90 * staff + 9 * line, 400, 40 + 90 * staff + 9 * line), fill="black"
                )
            for k in range(16):
                x, y = 40 + 22 * k, 40 + 90 * staff + 4.5 * int(rng.integers(0, 9))
                draw.ellipse((x, y - 4, x + 11, y + 4), fill="black")
                draw.line((x + 10, y, x + 10, y - 27), fill="black")
        yield image


def chess(rng: Rng, count: int) -> Iterator[Image.Image]:
    """One board, another position."""
    for _ in range(count):
        image = Image.new("RGB", (320, 320), (240, 217, 181))
        draw = ImageDraw.Draw(image)
        for k in range(64):
            x, y = 40 * (k % 8), 40 * (k // 8)
            if (k % 8 + k // 8) % 2:
                draw.rectangle((x, y, x + 39, y + 39), fill=(181, 136, 99))
        for k in rng.permutation(64)[:20]:
            x, y = 40 * (int(k) % 8), 40 * (int(k) // 8)
            fill = "white" if rng.random() < 0.5 else "black"
            if rng.random() < 0.5:
                draw.ellipse((x + 10, y + 10, x + 30, y + 30), fill=fill, outline="black")
            else:
                draw.polygon(
                    [(x + 20, y + 6), (x + 8, y + 34), (x + 32, y + 34)], fill=fill, outline="black"
                )
        yield image


def x_rays(rng: Rng, count: int) -> Iterator[Image.Image]:
    """One chest with a small lesion in another place."""
    y, x = np.mgrid[0:256, 0:256] / 128 - 1
    base = 60 + 100 * np.exp(-(x**2) * 12) + 30 * np.cos(y * 22) * (np.abs(x) < 0.8)
    base -= 50 * np.exp(-(((np.abs(x) - 0.45) / 0.28) ** 2 + (y / 0.6) ** 2))
    base += np.asarray(Image.fromarray(rng.normal(0, 12, (64, 64))).resize((256, 256)))
    for _ in range(count):
        at_x, at_y = rng.uniform(0.25, 0.65) * rng.choice([-1, 1]), rng.uniform(-0.5, 0.5)
        lesion = 45 * np.exp(-((x - at_x) ** 2 + (y - at_y) ** 2) / 0.002)
        pixels = (base + lesion).clip(0, 255).astype(np.uint8)
        yield Image.fromarray(pixels).convert("RGB")


def satellite(rng: Rng, count: int) -> Iterator[Image.Image]:
    """Fields and roads on one kind of ground."""
    for _ in range(count):
        ground = rng.normal(0, 1, (32, 32, 1)) * [14, 12, 9] + [96, 108, 70]
        image = Image.fromarray(ground.clip(0, 255).astype(np.uint8)).resize(
            (256, 256), Image.Resampling.BICUBIC
        )
        draw = ImageDraw.Draw(image)
        for _ in range(4):
            x, y = (int(v) for v in rng.integers(0, 200, 2))
            draw.rectangle(
                (x, y, x + 45, y + 35), fill=tuple(int(v) for v in rng.integers(80, 130, 3))
            )
        x = int(rng.integers(20, 236))
        draw.line((x, 0, 256 - x, 256), fill=(170, 165, 155), width=4)
        yield image


def products(rng: Rng, count: int) -> Iterator[Image.Image]:
    """One cup on white, each in another colour."""
    shade = np.linspace(1.1, 0.6, 150)[None, :, None]
    for i in range(count):
        hue = (
            Image.new("HSV", (1, 1), (int(255 * i / count), 180, 200))
            .convert("RGB")
            .getpixel((0, 0))
        )
        image = np.full((300, 300, 3), 255.0)
        image[80:240, 70:220] = np.array(hue) * shade
        found = Image.fromarray(image.clip(0, 255).astype(np.uint8))
        ImageDraw.Draw(found).ellipse((205, 120, 260, 200), outline=hue, width=12)
        yield found


def languages(rng: Rng, count: int) -> Iterator[Image.Image]:
    """One poster with its text in another language."""
    scene = _scene(rng, 360, 270, 5)
    for _ in range(count):
        image = scene.copy()
        draw = ImageDraw.Draw(image)
        draw.rectangle((30, 90, 330, 180), fill=(250, 250, 250))
        for k, word in enumerate(_words(rng, 4)):
            draw.text((45 + 140 * (k % 2), 100 + 38 * (k // 2)), word, font=_font(24), fill="black")
        yield image


def captions(rng: Rng, count: int) -> Iterator[Image.Image]:
    """One picture, with a bar across that holds other words."""
    scene = _scene(rng, 320, 240, 8)
    for _ in range(count):
        image = scene.copy()
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 195, 320, 225), fill="black")
        draw.text((20, 198), " ".join(_words(rng, 3)), font=_font(20), fill="white")
        yield image


def watermarked(rng: Rng, count: int) -> Iterator[Image.Image]:
    """Other pictures under one watermark."""
    for _ in range(count):
        image = _scene(rng, 320, 240, 10)
        draw = ImageDraw.Draw(image)
        for k in range(4):
            draw.text((10 + 20 * k, 20 + 55 * k), "SAMPLE SAMPLE", font=_font(34), fill="white")
        yield image


def objects(rng: Rng, count: int) -> Iterator[Image.Image]:
    """One camera's view, with a small thing somewhere in it."""
    scene = _scene(rng, 320, 240, 16)
    for _ in range(count):
        image = scene.copy()
        x, y = (int(v) for v in rng.integers(10, 200, 2))
        ImageDraw.Draw(image).ellipse((x, y, x + 22, y + 16), fill=_colour(rng))
        yield image.filter(ImageFilter.GaussianBlur(0.7))


KINDS: dict[str, Callable[[Rng, int], Iterator[Image.Image]]] = {
    one.__name__: one
    for one in (
        documents, totals, plates, logos, qr_codes, line_charts, bar_charts, price_tags, digits,
        growing, cards, screenshots, maps, sheet_music, chess, x_rays, satellite, products,
        languages, captions, watermarked, objects, seedlings, spreadsheets,
    )
}  # fmt: skip
