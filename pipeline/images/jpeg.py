"""The header of a JPEG in one pass over its segments, and the fast road for plain ones.

Plain is what photographs are: baseline or progressive, 8 bits, grey or YCbCr, nothing odd in front
of the first scan. libjpeg-turbo decodes those straight into numpy (simplejpeg), to the same pixels
as Pillow, without the GIL and without Pillow's lock on its settings. It can also leave out the high
frequencies and give 1/2, 1/4 or 1/8 of the size, for less work.

Nothing is refused here: a file that is not plain, or that libjpeg as much as warns about, gives
None, and the general road of `decode` says what it is.
"""

from __future__ import annotations

import re
import struct
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

SHRINKS = (1, 2, 4, 8)  # what the inverse DCT of libjpeg gives for less work
_SMALLEST_SHRUNK = 16  # pixels of the longer side; below, two scales give the same size

_SOF_HUFFMAN = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_SOF = (*_SOF_HUFFMAN, 0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_DHT, _SOS, _DQT, _DRI, _COM = 0xC4, 0xDA, 0xDB, 0xDD, 0xFE
_APP0, _APP1, _APP2, _APP13, _APP14, _APP15 = 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xEF
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_ICC, _MPF, _PHOTOSHOP = b"ICC_PROFILE\0", b"MPF\0", b"Photoshop 3.0\0"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_NOT_FILL = re.compile(rb"[^\xff]")
_ORIENTATION, _SHORT = 0x0112, 3  # tag, type
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class JpegHeader(NamedTuple):
    """What stands in front of the first scan of a JPEG (ITU-T T.81, annex B)."""

    width: int = 0  # as stored, before EXIF orientation; 0 where there is no frame header
    height: int = 0
    components: int = 0
    precision: int = 0  # bits a sample
    process: int = -1  # n of the frame header SOFn: 0 baseline, 1 extended, 2 progressive, ...
    adobe: int | None = None  # colour transform of the Adobe marker
    orientation: int | None = 1  # EXIF, 1 to 8; None where only an EXIF library can tell
    scan: int = -1  # offset of the first scan; -1 where there is none
    interleaved: bool = True  # the first scan has all components
    ended: bool = False  # an end marker follows the first scan
    plain: bool = False  # the fast road may try it

    @property
    def held_bytes(self) -> int:
        """Bytes a pixel that libjpeg holds until the last scan, where there are several."""
        several = self.process not in (0, 1) or not self.interleaved
        return 2 * max(1, self.components) if several else 0

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) after EXIF orientation."""
        turned = (self.orientation or 1) >= 5
        return (self.width, self.height) if turned else (self.height, self.width)


def jpeg_header(encoded: bytes) -> JpegHeader:
    """Read all that stands before the first scan, and look for an end marker after it.

    Steps over segments, so an embedded preview is no match. Never raises: what is missing keeps the
    default, and any oddity clears `plain`.
    """
    width = height = components = precision = 0
    process, scan, adobe = -1, -1, None
    jfif, ids, xmp = False, b"", b""
    exif: list[bytes] = []
    plain = encoded.startswith(b"\xff\xd8\xff")
    at, end = 2, len(encoded)
    while at + 4 <= end:
        if encoded[at] != 0xFF:
            at = encoded.find(b"\xff", at)  # junk, which decoders step over as well
            plain = False
            if at < 0:
                break
            continue
        marker = encoded[at + 1]
        if marker == _SOS:
            scan = at
            break
        if marker == 0xFF:  # fill bytes
            after = _NOT_FILL.search(encoded, at)
            at = after.start() - 1 if after else end
            plain = False
            continue
        if marker <= 1 or 0xD0 <= marker <= 0xD8:  # markers without a length
            at += 2
            plain = False
            continue
        length = int.from_bytes(encoded[at + 2 : at + 4], "big")
        start = at + 4
        at += 2 + length
        size = length - 2
        if size < 0:
            plain = False
        elif marker in (_DHT, _DQT):
            pass
        elif marker in _SOF:
            if size >= 6 and not components:
                precision, height, width, components = struct.unpack_from(
                    ">BHHB", encoded[start : start + 6].ljust(6, b"\0")
                )
                process, ids = marker - 0xC0, encoded[start + 6 : at : 3]
            else:
                plain = False  # one frame only; more is the hierarchical process
            plain &= marker in _SOF_HUFFMAN and size == 6 + 3 * components
        elif _APP0 <= marker <= _APP15:
            content = encoded[start:at]
            if marker == _APP0 and content.startswith(b"JFIF"):
                jfif = True
                plain &= size >= 7
            elif marker == _APP1 and content.startswith(_EXIF):
                exif.append(content[6:])
            elif marker == _APP1 and content.startswith(_XMP):
                xmp = content
            elif marker == _APP2 and content.startswith((_ICC, _MPF)):
                plain &= content.startswith(_ICC) and size >= 14  # MPF: several pictures
            elif marker == _APP13 and content.startswith(_PHOTOSHOP):
                plain &= _whole_photoshop(content)
            elif marker == _APP14 and content.startswith(b"Adobe"):
                adobe = content[11] if len(content) > 11 else None
                plain &= size >= 12
        else:
            plain &= marker in (_DRI, _COM)
    # Of several blocks it is not clear which counts.
    orientation = 0 if not exif else exif_orientation(exif[0]) if len(exif) == 1 else None
    if orientation == 0:  # not said; there XMP counts
        said = _XMP_ORIENTATION.search(xmp)
        orientation = int(said[1]) if said and said[1] in b"12345678" else 1
    known = components == 1 or (
        components == 3 and adobe in (None, 1) and (jfif or adobe == 1 or ids == b"\1\2\3")
    )
    ended = scan >= 0 and encoded.rfind(b"\xff\xd9", scan) >= 0
    plain &= known and precision == 8 and width > 0 and height > 0 and ended
    plain &= orientation is not None
    interleaved = scan < 0 or encoded[scan + 4 : scan + 5] == bytes([components])
    return JpegHeader(
        width=width,
        height=height,
        components=components,
        precision=precision,
        process=process,
        adobe=adobe,
        orientation=orientation,
        scan=scan,
        interleaved=interleaved,
        ended=ended,
        plain=plain,
    )


def exif_orientation(tiff: bytes) -> int | None:
    """Orientation (1 to 8) in the first directory of an EXIF block; 0 where it says none.

    None where the block is broken or odd in any way, so that readers may differ.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return None
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    if not 8 <= at <= len(tiff) - 2:
        return None
    (count,) = struct.unpack_from(order + "H", tiff, at)
    if at + 2 + 12 * count > len(tiff):
        return None
    orientation = total = 0
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind, values = struct.unpack_from(order + "HHI", tiff, entry)
        size = _TYPE_BYTES.get(kind, len(tiff) + 1) * values
        if size > 4:  # stored elsewhere in the block; some readers give up where it is not
            total += size
            if max(total, struct.unpack_from(order + "I", tiff, entry + 8)[0] + size) > len(tiff):
                return None
        if tag == _ORIENTATION:
            if orientation or kind != _SHORT or values != 1:
                return None
            (value,) = struct.unpack_from(order + "H", tiff, entry + 8)
            orientation = value if 1 <= value <= 8 else 1
    return orientation


def _whole_photoshop(content: bytes) -> bool:
    """True where Pillow's reading of the resource blocks cannot run out of bytes inside one.

    It refuses a file for that, and the fast road must not take what it refuses.
    """
    at = len(_PHOTOSHOP)
    while content[at : at + 4] == b"8BIM":
        if at + 7 > len(content):
            return False
        kind = content[at + 4 : at + 6]
        at += 7 + content[at + 6]
        at += at & 1
        if at + 4 > len(content):
            return False
        size = int.from_bytes(content[at : at + 4], "big")
        if kind == b"\x03\xed" and not 14 <= size <= len(content) - at - 4:
            return False
        at += 4 + size
        at += at & 1
    return True


def decode_plain(
    encoded: bytes, header: JpegHeader, *, grey: bool = False, shrink: int = 1
) -> tuple[Pixels, int] | None:
    """Decode a plain JPEG to uint8 [H, W, 3], or [H, W, 1] for `grey`, and turn it upright.

    Args:
        encoded: the file.
        header: of this file, with `plain` set.
        grey: one channel; of a JPEG with one component only.
        shrink: one of SHRINKS.

    Returns:
        pixels of ceil(height / shrink) x ceil(width / shrink), writable, and the shrink that was
        used (1 for tiny images); None where libjpeg fails or warns.
    """
    if max(header.width, header.height) < _SMALLEST_SHRUNK:
        shrink = 1
    height, width = (-(-side // shrink) for side in (header.height, header.width))
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            encoded,
            "GRAY" if grey else "RGB",
            min_height=height if shrink > 1 else 0,
            min_width=width if shrink > 1 else 0,
            strict=True,  # warnings ("corrupt data", "premature end") are errors
        )
    except ValueError:
        return None
    if pixels.shape[:2] != (height, width):
        return None
    return turned(pixels, header.orientation or 1), shrink


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """Stored rows to upright ones by EXIF 2.32, tag 0x0112; contiguous."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    # After the transpose, 6 is mirrored left to right and 8 top to bottom; 7 is both.
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
