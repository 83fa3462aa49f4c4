"""A small labelled set of real images without any download, with planted flaws.

Tiles of photographs that come with scikit-image and scikit-learn; among them duplicates, flat tiles
and broken files for the other stages to find.

The class of a tile is its photograph. Training and test tiles come from different parts of it: four
blocks are kept for the test, and no training tile touches them. Tiles are cut at three scales.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import random
import shutil
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import DataError

TILE = 96  # pixels of a side, as written
TRAIN_TILES, TEST_BLOCKS = 216, 4  # per photograph
NEAR_COPIES, EXACT_COPIES = 60, 12  # of training tiles, in all
FLAT_TILES = 24  # with next to nothing on them, as scans and failed exposures have it
DEMO_IMAGES, DEMO_BYTES = 3562, 10_000_000  # files of the training part, for estimates
_VERSION = 2
DEMO_MARK = ".demo.json"  # hidden, so that pack does not take it for an image
_QUALITY, _NEAR_QUALITY = 90, 60
# Photographs with structure all over, by class; the names in the two packages.
_SKIMAGE = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble": "hubble_deep_field.jpg",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
_SKLEARN = {"china": "china.jpg", "flower": "flower.jpg"}

Box = tuple[int, int, int]  # left, top, side; pixels of the photograph


@dataclass(frozen=True)
class DemoReport:
    """What `make_demo` wrote. `train` = tiles + near_duplicates + copies + flat; broken files are
    apart.
    """

    folder: str
    class_names: tuple[str, ...]
    train: int
    test: int
    near_duplicates: int
    copies: int
    flat: int
    broken: int
    seconds: float


def make_demo(folder: Path, seed: int = 0) -> DemoReport:
    """Write `folder`/train/<class>/*.jpg and `folder`/test/<class>/*.jpg; the same bytes each time.

    Names say what a file is: `tile_<side>_<left>_<top>.jpg` (pixels of the photograph),
    `near_...` (a training tile recompressed at quality 60), `copy_...` (its very bytes),
    `flat_<number>.jpg`, `broken_<kind>`. A folder that is complete already is left as it is, one of
    an older version is made anew.

    Raises:
        DataError: the photographs are not installed, or `folder` holds something else.
    """
    begin = time.monotonic()
    folder = Path(folder)
    about = {"version": _VERSION, "seed": seed}
    mark = folder / DEMO_MARK
    if mark.is_file():
        content = json.loads(mark.read_text())
        if content["about"] == about:
            names = tuple(content["report"].pop("class_names"))
            return DemoReport(**{**content["report"], "class_names": names, "folder": str(folder)})
        if content["about"]["seed"] == seed:
            shutil.rmtree(folder)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(
            f"{folder} holds something that is not this demo",
            hint="name a new folder, or take that one away.",
        )
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    photos = _photographs()
    train: dict[str, bytes] = {}
    test: dict[str, bytes] = {}
    for name, photo in photos.items():
        rng = random.Random(f"{seed}/{name}")
        blocks = _test_blocks(photo, rng)
        train |= {f"{name}/{k}": v for k, v in _tiles(photo, _train_boxes(photo, blocks, rng))}
        test |= {f"{name}/{k}": v for k, v in _tiles(photo, _parts(blocks))}
    rng = random.Random(f"{seed}/planted")
    chosen = rng.sample(sorted(train), NEAR_COPIES + EXACT_COPIES)
    near = {_named(k, "near"): _recompressed(train[k]) for k in chosen[:NEAR_COPIES]}
    copies = {_named(k, "copy"): train[k] for k in chosen[NEAR_COPIES:]}
    broken = _broken(rng, train, sorted(photos))
    flat = _flat(rng, sorted(photos))
    for part, files in (("train", train | near | copies | flat | broken), ("test", test)):
        for name, encoded in files.items():
            path = unfinished / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded)
    report = DemoReport(
        folder=str(folder),
        class_names=tuple(sorted(photos)),
        train=len(train) + len(near) + len(copies) + len(flat),
        test=len(test),
        near_duplicates=len(near),
        copies=len(copies),
        flat=len(flat),
        broken=len(broken),
        seconds=round(time.monotonic() - begin, 3),
    )
    content = {"about": about, "report": dataclasses.asdict(report)}
    (unfinished / ".demo.json").write_text(json.dumps(content))
    if folder.exists():
        folder.rmdir()
    unfinished.rename(folder)
    return report


def _photographs() -> dict[str, Image.Image]:
    photos = {}
    for package, inside, files in (
        ("skimage", "data", _SKIMAGE),
        ("sklearn", "datasets/images", _SKLEARN),
    ):
        spec = importlib.util.find_spec(package)  # the package itself is not imported
        root = Path(spec.origin).parent / inside if spec and spec.origin else Path(package)
        for name, file in files.items():
            if not (root / file).is_file():
                raise DataError(
                    f"the photograph {file} of {package} is not there",
                    hint="install the demo's photographs: pip install scikit-image scikit-learn",
                )
            with Image.open(root / file) as image:
                photos[name] = image.convert("L" if image.mode == "L" else "RGB")
    return dict(sorted(photos.items()))


def _sides(photo: Image.Image) -> tuple[int, int, int]:
    """Three sides of tiles: 48, 64, 96 pixels where the photo's shorter side has 400 or less."""
    scale = max(1.0, min(photo.size) / 400)
    return round(48 * scale), round(64 * scale), round(96 * scale)


def _test_blocks(photo: Image.Image, rng: random.Random) -> list[Box]:
    side = _sides(photo)[-1]
    columns, rows = photo.width // side, photo.height // side
    cells = [(column * side, row * side, side) for row in range(rows) for column in range(columns)]
    cells = [cell for cell in cells if not _is_flat(photo, cell)]
    return sorted(rng.sample(cells, TEST_BLOCKS))


def _parts(blocks: list[Box]) -> list[Box]:
    """Each block whole, its four quarters, and four overlapping parts of two thirds."""
    boxes = []
    for left, top, side in blocks:
        boxes.append((left, top, side))
        for part in (side // 2, side * 2 // 3):
            gap = side - part
            boxes += [(left + x, top + y, part) for x in (0, gap) for y in (0, gap)]
    return boxes


def _train_boxes(photo: Image.Image, blocks: list[Box], rng: random.Random) -> list[Box]:
    """Places that touch no test block, on a lattice: no two are nearly the same."""
    boxes: list[Box] = []
    for number, side in enumerate(reversed(_sides(photo))):
        stride = side // 6
        places = [
            (left, top, side)
            for top in range(0, photo.height - side + 1, stride)
            for left in range(0, photo.width - side + 1, stride)
            if not any(_overlap((left, top, side), block) for block in blocks)
        ]
        rng.shuffle(places)
        missing = TRAIN_TILES * (number + 1) // 3 - len(boxes)
        for place in places:
            if missing and not _is_flat(photo, place):
                boxes.append(place)
                missing -= 1
    return boxes


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[2] and b[1] < a[1] + a[2]


def _is_flat(photo: Image.Image, box: Box) -> bool:
    """Whether there is nothing to see, as in the sky or beside the retina."""
    pixels = np.asarray(_cut(photo, box).convert("L"))
    return float(pixels.std()) < 7  # of 255; the moon has few places above 10


def _cut(photo: Image.Image, box: Box) -> Image.Image:
    left, top, side = box
    return photo.crop((left, top, left + side, top + side))


def _tiles(photo: Image.Image, boxes: list[Box]) -> Iterator[tuple[str, bytes]]:
    for box in boxes:
        tile = _cut(photo, box).resize((TILE, TILE), Image.Resampling.BICUBIC)
        left, top, side = box
        yield f"tile_{side}_{left}_{top}.jpg", _jpeg(tile, _QUALITY)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def _recompressed(encoded: bytes) -> bytes:
    with Image.open(io.BytesIO(encoded)) as image:
        return _jpeg(image, _NEAR_QUALITY)


def _named(path: str, kind: str) -> str:
    folder, _, name = path.partition("/")
    return f"{folder}/{kind}_{name}"


def _flat(rng: random.Random, classes: list[str]) -> dict[str, bytes]:
    """One colour each, every other one with a little noise, in some class."""
    files = {}
    for number in range(FLAT_TILES):
        pixels = np.full((TILE, TILE, 3), [rng.randrange(256) for _ in range(3)], np.uint8)
        if number % 2:
            noise = np.frombuffer(rng.randbytes(TILE * TILE), np.uint8).reshape(TILE, TILE, 1) & 1
            pixels = np.maximum(pixels, 1) - noise
        name = f"{rng.choice(classes)}/flat_{number:02d}.jpg"
        files[name] = _jpeg(Image.fromarray(pixels), _QUALITY)
    return files


def _broken(rng: random.Random, train: dict[str, bytes], classes: list[str]) -> dict[str, bytes]:
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
