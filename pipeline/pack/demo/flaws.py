"""What is planted among the demo's tiles: flaws as piles of real images have them.

Each is plain to the eye: copies and leaks are of tiles with something in every corner, so nobody
has to take it on trust that two pictures are the same.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

SIDE = 96  # pixels of a tile, as written
NEAR_COPIES, EXACT_COPIES = 60, 12  # of training tiles, in all
LEAKS = 12  # of test tiles
FLAT_TILES = 24  # with next to nothing on them, as scans and failed exposures have it
DETAIL = 15  # of 255: least deviation of the luminance in each quarter of a tile that is copied
QUALITY = 90


def flaws(
    rng: random.Random, train: Mapping[str, bytes], test: Mapping[str, bytes], classes: list[str]
) -> dict[str, dict[str, bytes]]:
    """Files to put among the training tiles, by kind: near, copy, leak, flat, broken.

    Args:
        rng: chooses; the same files for the same state.
        train: training tiles, `<class>/<name>` to JPEG bytes.
        test: test tiles, likewise.
        classes: where flat tiles and broken files go.
    """
    chosen = rng.sample(_with_detail(train), NEAR_COPIES + EXACT_COPIES)
    near, exact = chosen[:NEAR_COPIES], chosen[NEAR_COPIES:]
    leaks = rng.sample(_with_detail(test), LEAKS)
    return {
        "near": {_named(name, "near"): _like(i, train[name]) for i, name in enumerate(near)},
        "copy": {_named(name, "copy"): train[name] for name in exact},
        "leak": {_named(name, "leak"): _like(i, test[name]) for i, name in enumerate(leaks)},
        "flat": _flat(rng, classes),
        "broken": _broken(rng, train, classes),
    }


def jpeg(image: Image.Image, quality: int = QUALITY) -> bytes:
    """An image as JPEG bytes."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def _with_detail(tiles: Mapping[str, bytes]) -> list[str]:
    """Tiles of which each quarter shows something; sorted."""
    names = []
    for name, encoded in sorted(tiles.items()):
        with Image.open(io.BytesIO(encoded)) as image:
            grey = np.asarray(image.convert("L"), np.float32)
        half = len(grey) // 2
        quarters = [grey[y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
        if min(quarter.std() for quarter in quarters) >= DETAIL:
            names.append(name)
    return names


def _named(path: str, kind: str) -> str:
    folder, _, name = path.partition("/")
    return f"{folder}/{kind}_{name}"


def _saved_small(image: Image.Image) -> bytes:
    return jpeg(image, 40)


def _shrunk(image: Image.Image) -> bytes:
    small = image.resize((image.width * 2 // 3, image.height * 2 // 3), Image.Resampling.BICUBIC)
    return jpeg(small.resize(image.size, Image.Resampling.BICUBIC))


def _brighter(image: Image.Image) -> bytes:
    return jpeg(image.point(lambda value: min(255, round(value * 1.1 + 8))))


KINDS: tuple[Callable[[Image.Image], bytes], ...] = (_saved_small, _shrunk, _brighter)


def _like(number: int, encoded: bytes) -> bytes:
    """A copy as photos get them on their way: saved smaller, shrunk and enlarged, or brighter."""
    with Image.open(io.BytesIO(encoded)) as image:
        return KINDS[number % len(KINDS)](image)


def _flat(rng: random.Random, classes: list[str]) -> dict[str, bytes]:
    """One colour each, every other one with a little noise, in some class."""
    files = {}
    for number in range(FLAT_TILES):
        pixels = np.full((SIDE, SIDE, 3), [rng.randrange(256) for _ in range(3)], np.uint8)
        if number % 2:
            noise = np.frombuffer(rng.randbytes(SIDE * SIDE), np.uint8).reshape(SIDE, SIDE, 1) & 1
            pixels = np.maximum(pixels, 1) - noise
        name = f"{rng.choice(classes)}/flat_{number:02d}.jpg"
        files[name] = jpeg(Image.fromarray(pixels))
    return files


def _broken(rng: random.Random, train: Mapping[str, bytes], classes: list[str]) -> dict[str, bytes]:
    """Ten files as real folders have them, each in some class."""
    whole = [train[name] for name in rng.sample(sorted(train), 4)]
    half = [len(encoded) // 2 for encoded in whole]
    stream = io.BytesIO()
    Image.open(io.BytesIO(whole[2])).save(stream, "PNG")
    png = stream.getvalue()
    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", size), (b"IDAT", zlib.compress(b"\0" * 999)), (b"IEND", b""))
    )
    files = {
        "empty.jpg": b"",
        "cut.jpg": whole[0][: half[0]],
        "cut_early.jpg": whole[1][:100],
        "zeros_at_the_end.jpg": whole[3][: half[3]] + bytes(len(whole[3]) - half[3]),
        "cut.png": png[: len(png) * 3 // 4],
        "bomb.png": bomb,
        "error_page.jpg": b"<!DOCTYPE html><html><title>404 Not Found</title></html>\n",
        "notes.txt": b"the cat did not want to look into the camera\n",
        "noise.jpg": rng.randbytes(2000),
        "no_header.jpg": whole[2][200:],
    }
    places = rng.sample(classes, len(files))
    return {f"{at}/broken_{name}": files[name] for at, name in zip(places, files, strict=True)}
