"""Sets whose colours are classes, or depths, by construction."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.model.vit import BackboneSpec, VisionTransformer
from tests.data import encoded

COLOURS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200), (90, 90, 90)], np.uint8)
Array = np.ndarray[Any, Any]


def painted(seed: int, classes: int = 3, height: int = 48, width: int = 32) -> tuple[Array, Array]:
    """Noisy pixels uint8 [height, width, 3] in fields of 8 x 8 pixels, and the class of each."""
    random = np.random.default_rng(seed)
    fields = random.integers(0, classes, (height // 8, width // 8))
    mask = fields.repeat(8, 0).repeat(8, 1).astype(np.uint8)
    noise = random.normal(0, 6, (height, width, 3))
    return np.clip(COLOURS[mask] + noise, 0, 255).astype(np.uint8), mask


def sloped(seed: int, height: int = 48, width: int = 32) -> tuple[Array, Array]:
    """Grey pixels that are paler the farther away they are, and the depth, 1 to 5."""
    random = np.random.default_rng(seed)
    low, high = sorted(random.uniform(1, 5, 2))
    ramp = np.linspace(low, high, height)[:, None].repeat(width, 1)
    depth = ramp if seed % 2 else ramp[::-1]
    grey = 40 * depth + random.normal(0, 1, depth.shape)
    return np.clip(grey, 0, 255).astype(np.uint8)[..., None].repeat(3, 2), depth.astype(np.float32)


def npy(values: Array) -> bytes:
    """As a numpy file."""
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def tiff(values: Array) -> bytes:
    """As a TIFF of floats."""
    return encoded(Image.fromarray(values.astype(np.float32), "F"), "TIFF")


def write(root: Path, files: dict[str, bytes]) -> str:
    """Writes files by their path under the root, and gives the root."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(root)


def mask_set(root: Path, images: int, seed: int = 0, classes: int = 3) -> str:
    """A folder of painted images with their masks."""
    files = {}
    for number in range(images):
        pixels, mask = painted(seed + number, classes)
        files[f"images/{number:03}.png"] = encoded(pixels)
        files[f"masks/{number:03}.png"] = encoded(mask)
    return write(root, files)


def depth_set(root: Path, images: int, seed: int = 0) -> str:
    """A folder of sloped images with their depth."""
    files = {}
    for number in range(images):
        pixels, depth = sloped(seed + number)
        files[f"images/{number:03}.png"] = encoded(pixels)
        files[f"depth/{number:03}.npy"] = npy(depth)
    return write(root, files)


def network() -> Any:
    """A small untrained network; tasks of Ray load it by this module's name."""
    torch.manual_seed(0)
    spec = BackboneSpec(width=24, depth=1, heads=2, patch_size=4, image_size=32)
    return VisionTransformer(spec)
