"""Pictures of more than 8 bits a sample, with all their bits: Pillow keeps those of one band."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from pipeline.images.bad_image import BadImage, pixel_limit, too_large

PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*")
_GREY, _RGB, _GREY_ALPHA, _RGB_ALPHA = 0, 2, 4, 6  # colour types of PNG
# Tags of TIFF that say how the bytes of the pixels lie in the file.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_BANDS, _PREDICTOR, _PLANAR, _TILE_WIDTH, _EXTRA, _KIND = 277, 317, 284, 322, 338, 339
_STRIP_ROWS, _TILE_ROWS = 278, 323
_PLACES = (_COMPRESSION, 266, 273, 279, _TILE_ROWS, 324, 325)
_KINDS = {1: "u", 2: "i", 3: "f"}


@dataclass(frozen=True)
class Samples:
    """Values as stored.

    Attributes:
        values: [H, W, bands].
        alpha: the last band is transparency.
        colours: bands are those of a picture, else channels that mean what the user knows.
    """

    values: np.ndarray[Any, np.dtype[Any]]
    alpha: bool = False
    colours: bool = True

    @property
    def colour_values(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Without transparency."""
        return self.values[..., :-1] if self.alpha else self.values


def png_samples(encoded: bytes) -> Samples | None:
    """Of a PNG with 16 bits and more than one band; None for any other file."""
    if not encoded.startswith(PNG) or encoded[24:25] != b"\x10" or encoded[25] == _GREY:
        return None
    import torch
    from torchvision.io import ImageReadMode, decode_png

    data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    values = decode_png(data, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    return Samples(values, alpha=values.shape[2] in (2, 4))


@dataclass(frozen=True)
class TiffLayout:
    """What the first directory of a TIFF says about its samples."""

    directory: Any
    height: int
    width: int
    bands: int
    bits: int
    kind: str

    @classmethod
    def of(cls, encoded: bytes) -> TiffLayout | None:
        """None where it is no TIFF of this kind."""
        if not encoded.startswith(_TIFF):
            return None
        directory = TiffImagePlugin.ImageFileDirectory_v2(encoded[:8])
        stream = io.BytesIO(encoded)
        stream.seek(directory.next)
        directory.load(stream)
        bits = set(directory.get(_BITS, (1,)))
        kind = _KINDS.get(next(iter(directory.get(_KIND, (1,))), 1))
        if len(bits) != 1 or kind is None or _WIDTH not in directory or _HEIGHT not in directory:
            return None
        bands = int(directory.get(_BANDS, 1))
        size = int(directory[_HEIGHT]), int(directory[_WIDTH])
        return cls(directory, *size, bands, int(bits.pop()), kind)

    @property
    def bytes(self) -> int:
        """Of a pixel."""
        return self.bands * self.bits // 8

    @property
    def planar(self) -> bool:
        """Whether each band is a picture of its own, one after the other."""
        return bool(self.bands > 1 and self.directory.get(_PLANAR, 1) == 2)

    @property
    def strip_rows(self) -> int:
        """Rows of a strip or tile."""
        rows = self.directory.get(_TILE_ROWS) or self.directory.get(_STRIP_ROWS) or self.height
        return int(rows) if _TILE_ROWS in self.directory else min(int(rows), self.height)

    @property
    def plain_colours(self) -> bool:
        """Whether these are the bands of RGB, with or without alpha."""
        return self.directory.get(_PHOTOMETRIC) == 2 and self.bands <= 4 and self.kind == "u"

    @property
    def needed(self) -> bool:
        """Whether Pillow would drop bits or refuse it."""
        deep = self.bands > 1 and self.bits in (16, 32, 64)
        return deep or (self.bands > 4 and self.bits == 8)


def tiff_samples(encoded: bytes, max_pixels: int, channels: int) -> Samples | None:
    """Of a TIFF with several bands of more than 8 bits, or with more bands than Pillow knows.

    None for any other file. libtiff unpacks it as a grey picture of bytes, which any compression
    allows: what a directory says about colours does not change the bytes.

    Raises:
        BadImage: too large, or bands, predictor or bytes in an order that is not read.
    """
    layout = TiffLayout.of(encoded)
    if layout is None or not layout.needed:
        return None
    check_tiff(layout, max_pixels, channels)
    directory = layout.directory
    planes = layout.bands if layout.planar else 1  # one after the other, like rows of one
    rows, each = layout.height * planes, layout.bytes // planes
    tags = {tag: _whole(directory[tag]) for tag in _PLACES if tag in directory}
    tags |= {_WIDTH: (layout.width * each,), _HEIGHT: (rows,)}
    tags |= {_BITS: (8,), _PHOTOMETRIC: (1,), _BANDS: (1,), _STRIP_ROWS: (layout.strip_rows,)}
    if _TILE_WIDTH in directory:
        tags[_TILE_WIDTH] = (directory[_TILE_WIDTH] * each,)
    order = "<" if encoded[:2] == b"II" else ">"
    at = len(encoded) + len(encoded) % 2
    head = encoded[:4] + struct.pack(f"{order}I", at) + encoded[8:].ljust(at - 8, b"\0")
    grey = Image.open(io.BytesIO(head + _directory(tags, at, order)), formats=("TIFF",))
    raw = np.ascontiguousarray(np.asarray(grey))
    native = f"{layout.kind}{layout.bits // 8}"
    values = raw.view(order + native).reshape(rows, layout.width, -1)
    if directory.get(_PREDICTOR, 1) == 2:
        step = int(directory.get(_TILE_WIDTH, layout.width))
        parts = [values[:, x : x + step] for x in range(0, layout.width, step)]
        values = np.concatenate([p.astype(native).cumsum(1, dtype=native) for p in parts], 1)
    if planes > 1:
        values = np.moveaxis(values.reshape(planes, layout.height, layout.width), 0, 2)
    extra = directory.get(_EXTRA, ())
    alpha = directory.get(_PHOTOMETRIC) in (1, 2) and len(extra) == 1 and extra[0] in (1, 2)
    colours = directory.get(_PHOTOMETRIC) == 2 and layout.bands == 3 + alpha
    return Samples(values, alpha and (colours or layout.bands == 2), colours)


def _whole(value: Any) -> tuple[int, ...]:
    return tuple(map(int, value)) if isinstance(value, tuple) else (int(value),)


def _directory(tags: dict[int, tuple[int, ...]], at: int, order: str) -> bytes:
    """A directory of TIFF with whole numbers, for this place in the file."""
    entries, values = struct.pack(f"{order}H", len(tags)), b""
    behind = at + 2 + 12 * len(tags) + 4
    for tag, numbers in sorted(tags.items()):
        data = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            data, values = struct.pack(f"{order}I", behind + len(values)), values + data
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + data
    return entries + bytes(4) + values


def check_tiff(layout: TiffLayout, max_pixels: int, channels: int) -> None:
    """Refuse by the directory what `tiff_samples` cannot read."""
    limit = pixel_limit(max_pixels, 4 * layout.bytes)
    if layout.height * layout.width > limit:
        raise too_large(layout.width, layout.height, limit)
    if layout.bands > 4 and layout.bands != channels:
        detail = f"a TIFF of more than 4 bands: it has {layout.bands}, model.in_channels={channels}"
        raise BadImage("undecodable", detail)
    uneven = layout.planar and layout.height % max(1, layout.strip_rows)
    predictor = layout.directory.get(_PREDICTOR, 1) not in (1, 2)
    colours = layout.directory.get(_PHOTOMETRIC) not in (0, 1, 2)
    jpeg = layout.directory.get(_COMPRESSION) in (6, 7)
    if uneven or predictor or colours or jpeg or min(layout.height, layout.width) < 1:
        what = "strips of uneven planes" if uneven else "such a predictor or colour space"
        raise BadImage("undecodable", f"a TIFF of {layout.bits} bits with {what} is not read")
