"""A small labelled set of real images without any download, with planted flaws.

Tiles of photographs that come with scikit-image and scikit-learn; among them copies, leaked test
tiles, flat tiles and broken files for the other stages to find (`flaws.py`).

The class of a tile is its photograph. Training and test tiles come from different parts of it: four
blocks are kept for the test, and no training tile touches them. Tiles are cut at three scales.

Test tiles have the colours of another camera: warmer and a little brighter. Tiles of one photograph
share their colours, so else a colour histogram would tell most of them, and the question would not
be what a network sees in them. With new photos of an old subject it is the same.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import DataError
from pipeline.pack.demo.flaws import SIDE, flaws, jpeg

TRAIN_TILES, TEST_BLOCKS = 216, 4  # per photograph
DEMO_IMAGES, DEMO_BYTES = 3574, 10_000_000  # files of the training part, for estimates
_VERSION = 3
DEMO_MARK = ".demo.json"  # hidden, so that pack does not take it for an image
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

# of the other camera: light let through by its red, green and blue filter, and its tone curve
_GAINS, _GAMMA = (1.0, 0.9, 0.75), 0.9

Box = tuple[int, int, int]  # left, top, side; pixels of the photograph


@dataclass(frozen=True)
class DemoReport:
    """What `make_demo` wrote. `train` = tiles + near_duplicates + copies + leaks + flat; broken
    files are apart.
    """

    folder: str
    class_names: tuple[str, ...]
    train: int
    test: int
    near_duplicates: int
    copies: int
    leaks: int
    flat: int
    broken: int
    seconds: float


def make_demo(folder: Path, seed: int = 0) -> DemoReport:
    """Write `folder`/train/<class>/*.jpg and `folder`/test/<class>/*.jpg; the same bytes each time.

    Names say what a file is: `tile_<side>_<left>_<top>.jpg` (pixels of the photograph),
    `near_...` (a training tile saved smaller, shrunk or brighter), `copy_...` (its very bytes),
    `leak_...` (a test tile, likewise changed), `flat_<number>.jpg`, `broken_<kind>`. A folder that
    is complete already is left as it is, one of an older version is made anew.

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
        test |= {f"{name}/{k}": v for k, v in _tiles(other_camera(photo), _parts(blocks))}
    planted = flaws(random.Random(f"{seed}/planted"), train, test, sorted(photos))
    everything = train | {name: v for files in planted.values() for name, v in files.items()}
    for part, files in (("train", everything), ("test", test)):
        for name, encoded in files.items():
            path = unfinished / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded)
    report = DemoReport(
        folder=str(folder),
        class_names=tuple(sorted(photos)),
        train=len(everything) - len(planted["broken"]),
        test=len(test),
        near_duplicates=len(planted["near"]),
        copies=len(planted["copy"]),
        leaks=len(planted["leak"]),
        flat=len(planted["flat"]),
        broken=len(planted["broken"]),
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


def other_camera(photo: Image.Image) -> Image.Image:
    """The photograph as another camera would have taken it, in RGB."""
    values = [255 * (value / 255) ** _GAMMA for value in range(256)]
    table = [min(255, round(gain * value)) for gain in _GAINS for value in values]
    return photo.convert("RGB").point(table)


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
    """Places that touch no test block, on a lattice of a quarter of their side: so two tiles of a
    photograph share at most 0.6 of all that they show, and none looks like a copy of another.
    """
    boxes: list[Box] = []
    for number, side in enumerate(reversed(_sides(photo))):
        stride = -(-side // 4)
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
    return float(pixels.std()) < 6  # of 255; the moon has few places above 10


def _cut(photo: Image.Image, box: Box) -> Image.Image:
    left, top, side = box
    return photo.crop((left, top, left + side, top + side))


def _tiles(photo: Image.Image, boxes: list[Box]) -> Iterator[tuple[str, bytes]]:
    for box in boxes:
        tile = _cut(photo, box).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        left, top, side = box
        yield f"tile_{side}_{left}_{top}.jpg", jpeg(tile)
