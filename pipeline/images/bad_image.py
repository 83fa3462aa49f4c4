"""Why an image cannot be used: one of a few documented reasons, and a detail."""

from __future__ import annotations

import hashlib
import struct

from pipeline.images.jpeg import jpeg_header

MAX_PIXELS = 200_000_000
_BYTES = 5  # memory that decoding may take, a pixel of the limit: 1 GB for MAX_PIXELS
REASONS = ("empty", "not_an_image", "undecodable", "truncated", "too_large", "damaged")


INSTALL = "pip install"


class BadImage(Exception):
    """An image that cannot be used: `reason` is one of REASONS, `detail` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def check_id(encoded: bytes, image_id: bytes) -> None:
    """Compare the bytes of an image with the id that a shard stores for it.

    Raises:
        BadImage: they are not those that were packed.
    """
    digest = hashlib.blake2b(encoded, digest_size=16).digest()
    if digest != image_id:
        detail = f"its bytes are those of {digest.hex()}: the file was damaged after it was packed"
        raise BadImage("damaged", detail)


def pixel_limit(max_pixels: int, bytes_per_pixel: int) -> int:
    """The limit for files whose decoding takes this much memory a pixel.

    A plain JPEG takes 3 bytes, other formats up to 20, from files of a few hundred bytes. So none
    may take more than 1 GB, or in proportion more where `max_pixels` is above its default.
    """
    return min(max_pixels, max(max_pixels, MAX_PIXELS) * _BYTES // bytes_per_pixel)


def missing_package(form: str, package: str, extra: str) -> BadImage:
    """A format that an optional package reads, which is not installed."""
    return BadImage(
        "undecodable", f"{form} needs {package}: {INSTALL} {package} (the extra `{extra}`)"
    )


def too_large(width: int, height: int, max_pixels: int) -> BadImage:
    """More pixels than are read."""
    return BadImage("too_large", f"{width}x{height} pixels, at most {max_pixels} are read")


def unidentified(encoded: bytes) -> BadImage:
    """Tell a file of a known kind whose header is broken from a file that is no image."""
    for signature in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*"):
        if encoded.startswith(signature):
            cut = cut_short(encoded)
            tiff = ", or a TIFF with samples of a kind that is not read"
            header = "broken header" + tiff * (signature[0] in b"IM")
            return BadImage("truncated" if cut else "undecodable", cut or header)
    if encoded[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return BadImage("undecodable", "a broken HEIC header")
    webp = encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP"
    if webp or encoded[4:12] in (b"ftypavif", b"ftypavis"):
        cut = cut_short(encoded)
        return BadImage("truncated" if cut else "undecodable", cut or "broken header")
    return BadImage("not_an_image", f"no format that is read starts with {encoded[:8]!r}")


def cut_short(encoded: bytes) -> str:
    """Say how a file ends early by what its container promises; "" where it does not.

    Decoders differ here: some fill the missing rows with grey and call it a success, and none
    notices a tail of zeros, which is what an interrupted copy leaves behind.
    """
    if encoded.startswith(b"\xff\xd8"):
        if not jpeg_header(encoded).ended:
            return "the JPEG has no end marker"
    elif encoded.startswith(b"\x89PNG"):
        if b"IEND" not in encoded:
            return "the PNG has no end chunk"
    elif encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        promised = struct.unpack("<I", encoded[4:8])[0] + 8
        if len(encoded) < promised:
            return f"{len(encoded)} of {promised} bytes"
    elif encoded[4:12] in (b"ftypavif", b"ftypavis"):
        at = 0
        while at + 8 <= len(encoded):  # boxes: size, kind, content
            size = int.from_bytes(encoded[at : at + 4], "big")
            if size < 8:
                return ""  # to the end of the file, or 64 bits long
            at += size
        if at > len(encoded):
            return f"{len(encoded)} of {at} bytes"
    return ""
