"""Pictures of every format through Pillow: the general road of `decode`."""

from __future__ import annotations

import functools
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from pipeline.images.bad_image import BadImage, cut_short, missing_package, pixel_limit, too_large
from pipeline.images.deep import Samples, TiffLayout, check_tiff, png_samples, tiff_samples
from pipeline.images.jpeg import jpeg_header, turned
from pipeline.images.value_range import FULL, ValueRange, to_bytes

# Formats with a signature. Without one (TGA) any file can pass for an image; EPS runs a program.
# MPO comes by way of JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # what a picture can give, by channels
# Bytes a pixel that decoders hold beside the picture, as measured; rounded up.
_DECODER_BYTES = {"HEIF": 10, "WEBP": 10, "TIFF": 8, "JPEG2000": 13, "AVIF": 8}
_HEIC = tuple(b"ftyp" + b for b in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"))
_STRIP = 2**20  # pixels that are converted at once
_SHALLOW = (b"\xff\xd8", b"GIF8", b"RIFF", b"BM")  # formats of 8 bits alone
_EXIF_ORIENTATION = 0x0112
_TIFF_SIZE = (257, 256)  # tags of height and width as stored

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def decode_picture(
    encoded: bytes, max_pixels: int, channels: int, value_range: ValueRange
) -> tuple[Pixels, str]:
    """Decode to uint8 [H, W, channels] and the format's name; `decode.decode_image` has the rules.

    Raises:
        BadImage: by what the header and the end of the file say.
        Exception: anything that a decoder makes of bad bytes.
    """
    # Of the full range Pillow gives the high byte itself.
    whole = value_range == FULL and _pillow_reads(encoded)
    if not whole and (deep := deep_picture(encoded, max_pixels, channels)) is not None:
        return deep_pixels(deep, channels, value_range), deep.name
    with quiet():
        image, name = _open(encoded, max_pixels, channels)
        if name not in _LOADS_QUIETLY:
            image.load()
    image.load()  # the long part, outside the lock, so that threads can share the work
    with quiet():
        orientation = _orientation(image)
    pixels = np.empty((image.height, image.width, channels), np.uint8)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        # In strips, for a conversion takes up to four more copies of what it converts.
        out = pixels[top : top + rows]
        whole = len(out) == len(pixels)
        strip = image if whole else image.crop((0, top, image.width, top + len(out)))
        out[...] = np.asarray(convert(strip, name, channels)).reshape(out.shape)
    del image
    return turned(pixels, orientation), name


@dataclass(frozen=True)
class DeepPicture:
    """A picture of more than 8 bits a sample, before its values become bytes."""

    samples: Samples
    name: str  # of the format
    orientation: int
    plain: bool = False  # a TIFF of RGB of 16 bits: of the full range Pillow gives all of them


def deep_pixels(deep: DeepPicture, channels: int, value_range: ValueRange) -> Pixels:
    """What `decode_picture` gives of it."""
    return turned(_of_samples(deep, channels, value_range), deep.orientation)


def deep_picture(encoded: bytes, max_pixels: int, channels: int) -> DeepPicture | None:
    """All bits of a picture that has more than 8 a sample, None for any other.

    Raises:
        BadImage: as `decode_picture`.
    """
    png, tiff = encoded.startswith(b"\x89PNG"), encoded.startswith((b"II*\0", b"MM\0*"))
    if (png and encoded[24:25] != b"\x10") or encoded.startswith(_SHALLOW):
        return None
    with quiet():
        if tiff and (samples := tiff_samples(encoded, max_pixels, channels)) is not None:
            tiff_layout = TiffLayout.of(encoded)
            tag = tiff_layout.directory.get(_EXIF_ORIENTATION, 1) if tiff_layout else 1
            plain = tiff_layout is not None and tiff_layout.bits == 16 and tiff_layout.plain_colours
            return DeepPicture(samples, "TIFF", tag if tag in range(1, 9) else 1, plain)
        image, name = _open(encoded, max_pixels, channels)
        if png and (samples := png_samples(encoded)) is not None:
            return DeepPicture(samples, name, _orientation(image))
        if not image.mode.startswith(("I", "F")):
            return None
        image.load()
        values = np.asarray(image)
        if image.mode == "I":  # 16 bits in 32: signed ones, and in older versions all
            layout = TiffLayout.of(encoded)
            if layout is None or layout.bits == 16:
                values = values.astype(np.uint16 if layout is None else np.int16)
        return DeepPicture(Samples(values[..., None]), name, _orientation(image))


def _pillow_reads(encoded: bytes) -> bool:
    layout = _tiff_layout(encoded)
    return not layout or not layout.needed or (layout.bits == 16 and layout.plain_colours)


def _tiff_layout(encoded: bytes) -> TiffLayout | None:
    if not encoded.startswith((b"II*\0", b"MM\0*")):
        return None
    with quiet():
        return TiffLayout.of(encoded)


def _of_samples(deep: DeepPicture, channels: int, value_range: ValueRange) -> Pixels:
    """The range of the values, then as any picture of 8 bits."""
    samples, name = deep.samples, deep.name
    pixels = to_bytes(samples.colour_values, value_range)
    if samples.alpha:
        pixels = np.dstack((pixels, to_bytes(samples.values[..., -1:], FULL)))
    height, width, bands = pixels.shape
    if bands == channels and not samples.colours:
        return np.ascontiguousarray(pixels)
    if not samples.colours or bands not in MODES:
        detail = f"{name} of {bands} bands, expected {channels}: model.in_channels"
        raise BadImage("undecodable", detail)
    picture = Image.fromarray(np.ascontiguousarray(pixels if bands > 1 else pixels[..., 0]))
    with quiet():
        converted = np.array(convert(picture, name, channels))
    return converted.reshape(height, width, channels)


def picture_size(encoded: bytes, max_pixels: int, channels: int) -> tuple[int, int]:
    """(height, width) that `decode_picture` will give, and its refusals that need only a header."""
    if not _pillow_reads(encoded) and (layout := _tiff_layout(encoded)):
        check_tiff(layout, max_pixels, channels)
        turn = layout.directory.get(_EXIF_ORIENTATION, 1) in range(5, 9)
        return (layout.width, layout.height) if turn else (layout.height, layout.width)
    with quiet():
        image, name = _open(encoded, max_pixels, channels)
        if name == "TIFF":  # Pillow gives the size before or after turning, by its version
            tags: Any = image
            height, width = (int(tags.tag_v2[tag]) for tag in _TIFF_SIZE)
        else:
            width, height = image.size
        if name == "PNG" and not any(mark in encoded for mark in _PNG_ORIENTED):
            return height, width  # Pillow would decode it all to look behind the pixels
        on_its_side = _orientation(image) >= 5
    return (width, height) if on_its_side else (height, width)


def _bytes(image: Image.Image, encoded: bytes, channels: int) -> int:
    """Memory of a pixel while an image is decoded: Pillow's, the result's, the decoder's own."""
    own = _DECODER_BYTES.get(image.format or "", 0)
    if encoded.startswith(b"\xff\xd8"):
        own = jpeg_header(encoded).held_bytes
    return (1 if image.mode in ("1", "L", "P") else 4) + max(channels, 3) + own


def picture_format(encoded: bytes) -> str:
    """The name that `decode_picture` gives."""
    if _tiff_layout(encoded) is not None:  # of which Pillow knows few that are deep
        return "TIFF"
    with quiet():
        return _of_header(encoded).format or "?"


def _of_header(encoded: bytes) -> Image.Image:
    formats = (*FORMATS, _heif()) if encoded[4:12] in _HEIC else FORMATS
    return Image.open(io.BytesIO(encoded), formats=formats)


def _open(encoded: bytes, max_pixels: int, channels: int) -> tuple[Image.Image, str]:
    image = _of_header(encoded)
    name = image.format or "?"
    width, height = image.size
    limit = pixel_limit(max_pixels, _bytes(image, encoded, channels))
    if width * height > limit:
        raise too_large(width, height, limit)
    if channels not in MODES:
        detail = f"{name} cannot give {channels} channels, a .npy [H, W, {channels}] can"
        raise BadImage("undecodable", detail)
    if cut := cut_short(encoded):
        raise BadImage("truncated", cut)
    return image, name


@functools.lru_cache(maxsize=1)
def _heif() -> str:
    """The format that pillow-heif adds to Pillow."""
    try:
        import pillow_heif
    except ImportError as error:
        raise missing_package("HEIC", "pillow-heif", "heic") from error
    pillow_heif.register_heif_opener()
    return "HEIF"


def convert(image: Image.Image, name: str, channels: int) -> Image.Image:
    """To 8-bit samples of this many channels."""
    if channels == 3:
        return _to_rgb(image, name)
    if channels == 1:
        # Of equal R, G and B the luminance is that very value, so grey files lose nothing here.
        return image if _is_plain(image, "L") else _to_rgb(image, name).convert("L")
    deep = image.mode.startswith(("I", "F"))  # more than 8 bits: alpha is not kept
    layer = _to_rgb(image, name) if deep or not image.has_transparency_data else _straight(image)
    return layer.convert(MODES[channels])


def _is_plain(image: Image.Image, mode: str) -> bool:
    return image.mode == mode and "transparency" not in image.info


# Formats whose `load` raises no warning; the others are loaded inside `quiet`.
_LOADS_QUIETLY = ("JPEG", "MPO", "PNG", "WEBP", "BMP")
_lock = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings from Pillow or numpy, and no pixel limit of its own: `max_pixels` is the limit.

    Both settings belong to the process, so only one thread may be in here.
    """
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


_PNG_ORIENTED = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


def _orientation(image: Image.Image) -> int:
    """1 to 8."""
    try:
        tag = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1
    return tag if tag in range(1, 9) else 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    if _is_plain(image, "RGB"):
        return image
    if mode.startswith("I;16") or (mode == "I" and name in ("PNG", "PPM")):
        # 16 bits a sample; older versions of Pillow give them in 32-bit integers.
        values = np.asarray(image)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        detail = (
            f"32-bit samples (mode {mode}) have no fixed range: data.range=[low,high] names one"
        )
        raise BadImage("undecodable", detail)
    if mode == "LAB":
        converted = ImageCms.applyTransform(image, _lab_to_srgb())
        if converted is None:
            raise BadImage("undecodable", "littleCMS could not convert Lab")
        return converted
    if image.has_transparency_data:
        layer = _straight(image)
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _straight(image: Image.Image) -> Image.Image:
    """RGBA with straight alpha."""
    # La and RGBa (premultiplied) reach RGBA only by way of LA and RGBA.
    return image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")


@functools.lru_cache(maxsize=1)
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")  # D50, as in TIFF
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
