"""JPEG decoders against each other, and what decoding at a part of the size saves and changes.

    python benchmarks/decode.py [folder of JPEG photos]

Large photos are mosaics of the small ones: every pixel of them is detail of a real photo, sharper
than what most cameras give, so the differences are upper bounds. One thread; the things that are
compared run in turn in one process, and the table gives medians.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from pipeline.images.decode import decode_image, decode_shrunk, image_size
from pipeline.views.crops import (
    CropSpec,
    crop_boxes,
    cut_crops,
    decode_shrink,
    scale_boxes,
    uniforms,
)

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "imagenet-samples"
SIDES = {0.2: (400, 500), 1: (864, 1152), 6: (2000, 3000), 20: (3888, 5184)}  # megapixels
SPEC = CropSpec()
MARGINS = (1.0, 1.5, 2.0)


def mosaic(files: list[Path], height: int, width: int, seed: int) -> bytes:
    """A JPEG of this size laid with whole small photos, as a camera would store it."""
    rng = np.random.default_rng(seed)
    out = np.zeros((height, width, 3), np.uint8)
    top = 0
    while top < height:
        left, rows = 0, 10**6
        while left < width:
            photo = np.asarray(Image.open(files[rng.integers(len(files))]).convert("RGB"))
            part = photo[: height - top, : width - left]
            out[top : top + len(part), left : left + part.shape[1]] = part
            left, rows = left + part.shape[1], min(rows, len(part))
        top += rows
    stream = io.BytesIO()
    Image.fromarray(out).save(stream, "JPEG", quality=90, subsampling=2)
    return stream.getvalue()


def by_pillow(encoded: bytes) -> Any:
    return np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))


def by_draft(shrink: int) -> Callable[[bytes], Any]:
    def decode(encoded: bytes) -> Any:
        image = Image.open(io.BytesIO(encoded))
        image.draft("RGB", (image.width // shrink, image.height // shrink))
        return np.array(image.convert("RGB"))

    return decode


def by_torchvision(encoded: bytes) -> Any:
    data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    return decode_jpeg(data, mode=ImageReadMode.RGB)


DECODERS: dict[str, Callable[[bytes], Any]] = {
    "Pillow": by_pillow,
    "torchvision": by_torchvision,
    "simplejpeg": simplejpeg.decode_jpeg,
    "decode_image": decode_image,
    "Pillow draft 1/2": by_draft(2),
    "Pillow draft 1/8": by_draft(8),
    "decode_shrunk 1/2": lambda encoded: decode_shrunk(encoded, 2),
    "decode_shrunk 1/4": lambda encoded: decode_shrunk(encoded, 4),
    "decode_shrunk 1/8": lambda encoded: decode_shrunk(encoded, 8),
}


def medians(functions: dict[str, Callable[[bytes], Any]], photos: list[bytes]) -> dict[str, float]:
    """Median milliseconds of CPU a photo; every photo by every function, in turn."""
    spent: dict[str, list[float]] = {name: [] for name in functions}
    for encoded in photos:
        for name, function in functions.items():
            begin = time.process_time()
            function(encoded)
            spent[name].append(1000 * (time.process_time() - begin))
    return {name: statistics.median(times) for name, times in spent.items()}


def drawn(encoded: bytes, seed: int) -> tuple[Any, Any]:
    height, width = image_size(encoded)
    ids = np.random.default_rng(seed).integers(0, 256, (1, 16), np.uint8)
    return crop_boxes(uniforms(0, 0, ids, SPEC.draws)[0], width, height, SPEC)


def crops_of(encoded: bytes, seed: int, margin: float | None) -> tuple[Any, Any]:
    """What a read task does; without a margin the image is decoded whole."""
    boxes, flips = drawn(encoded, seed)
    shrink = 1 if margin is None else int(decode_shrink(boxes, SPEC, margin))
    image, shrink = decode_shrunk(encoded, shrink)
    return cut_crops(image, scale_boxes(boxes, shrink, *image.shape[:2]), flips, SPEC)


def resampled(encoded: bytes, seed: int, how: str) -> list[Any]:
    """The crops by another resampler, all antialiased."""
    image, (boxes, flips) = decode_image(encoded), drawn(encoded, seed)
    out = []
    for view, (top, left, height, width) in enumerate(boxes.tolist()):
        side = SPEC.global_size if view < 2 else SPEC.local_size
        part = image[top : top + height, left : left + width]
        if how == "lanczos":
            small = Image.fromarray(part).resize((side, side), Image.Resampling.LANCZOS)
            crop = np.asarray(small)
        else:
            dense = torch.from_numpy(part.copy()).permute(2, 0, 1)[None]
            size = (side, side)
            found = functional.interpolate(dense, size=size, mode=how, antialias=True)
            crop = found[0].permute(1, 2, 0).numpy()
        out.append(crop[:, ::-1] if flips[view] else crop)
    return out


def apart(some: list[Any], others: list[Any]) -> float:
    """Mean absolute difference of crops, of 255, each crop counted alike."""
    pairs = zip(some, others, strict=True)
    return float(np.mean([np.abs(a.astype(int) - b.astype(int)).mean() for a, b in pairs]))


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else PHOTOS
    files = sorted([*folder.glob("*.JPEG"), *folder.glob("*.jpg")])
    small = [file.read_bytes() for file in files[:: max(1, len(files) // 100)]]
    photos = {
        size: small if size == 0.2 else [mosaic(files, *sides, seed) for seed in range(5)]
        for size, sides in SIDES.items()
    }
    print(f"## Decoders, ms of CPU a photo (against decode_image); photos of {folder.name}\n")
    print("| decoder | " + " | ".join(f"{size} megapixels" for size in photos) + " |")
    print("|---" * (len(photos) + 1) + "|")
    table = {size: medians(DECODERS, found) for size, found in photos.items()}
    for name in DECODERS:
        cells = [f"{t[name]:.2f} ({t[name] / t['decode_image']:.2f})" for t in table.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")

    print("\n## Decoding and ten crops, ms of CPU a photo (against whole decoding)\n")
    print("| megapixels | whole | " + " | ".join(f"margin {m}" for m in MARGINS) + " |")
    print("|---" * (len(MARGINS) + 2) + "|")
    for size, found in photos.items():
        ways = {m: (lambda e, m=m: crops_of(e, len(e), m)) for m in (None, *MARGINS)}
        spent = medians(ways, found)  # type: ignore[arg-type]
        cells = [f"{spent[m]:.2f} ({spent[m] / spent[None]:.2f})" for m in MARGINS]  # type: ignore
        print(f"| {size} | {spent[None]:.2f} | " + " | ".join(cells) + " |")  # type: ignore

    print("\n## Pixels of the crops: mean absolute difference from whole decoding, of 255\n")
    heads = [*(f"margin {m} (shrinks)" for m in MARGINS), "bilinear", "Lanczos"]
    print("| megapixels | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for size, found in photos.items():
        if size == 0.2:
            continue
        cells = []
        whole = [[*g, *s] for g, s in (crops_of(e, len(e), None) for e in found)]
        for margin in MARGINS:
            scaled = [[*g, *s] for g, s in (crops_of(e, len(e), margin) for e in found)]
            shrinks = {int(decode_shrink(drawn(e, len(e))[0], SPEC, margin)) for e in found}
            mean = np.mean([apart(*pair) for pair in zip(whole, scaled, strict=True)])
            cells.append(f"{mean:.2f} ({', '.join(map(str, sorted(shrinks)))})")
        for how in ("bilinear", "lanczos"):
            others = [resampled(e, len(e), how) for e in found]
            mean = np.mean([apart(*pair) for pair in zip(whole, others, strict=True)])
            cells.append(f"{mean:.2f}")
        print(f"| {size} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
