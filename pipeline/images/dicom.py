"""DICOM by pydicom: the first frame, windowed as the file says.

Without a window the range of the stored bits becomes 0 to 255, after slope and intercept.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from pipeline.images.bad_image import BadImage, missing_package, pixel_limit, too_large
from pipeline.images.pillow import MODES, Pixels, convert, quiet
from pipeline.images.value_range import FULL, Span, ValueRange, to_bytes

DICOM = "DICOM"


def is_dicom(encoded: bytes) -> bool:
    """By the mark behind the preamble."""
    return encoded[128:132] == b"DICM"


def decode_dicom(encoded: bytes, max_pixels: int, channels: int, value_range: ValueRange) -> Pixels:
    """uint8 [H, W, channels], as `decode.decode_image`."""
    data = _read(encoded, max_pixels)
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    if channels not in MODES:
        raise BadImage("undecodable", f"DICOM cannot give {channels} channels")
    with quiet():
        kind = str(data.PhotometricInterpretation)
        stored = pixel_array(data, index=0)
        if kind == "PALETTE COLOR":
            stored = apply_color_lut(stored, data)
            pixels = (stored >> 8 if stored.dtype.itemsize == 2 else stored).astype(np.uint8)
        elif stored.ndim == 3:
            pixels = (stored >> max(0, int(data.BitsStored) - 8)).astype(np.uint8)
        else:
            values = np.asarray(apply_modality_lut(stored, data))
            if values.dtype.kind == "f" and (values == np.rint(values)).all():
                values = values.astype(np.int32)
            window = _window(data)
            if window is None:
                # 8 bits are taken as they are, whatever slope makes of them
                whole = value_range == FULL or int(data.BitsStored) <= 8
                pixels = to_bytes(values, _stored_range(data) if whole else value_range)
            else:
                pixels = _windowed(values.astype(np.float64), window)
            if kind == "MONOCHROME1":
                pixels = 255 - pixels
        picture = convert(Image.fromarray(np.ascontiguousarray(pixels)), DICOM, channels)
        return np.array(picture).reshape(*pixels.shape[:2], channels)


def dicom_size(encoded: bytes, max_pixels: int) -> tuple[int, int]:
    """(height, width) that `decode_dicom` will give."""
    data = _read(encoded, max_pixels)
    return int(data.Rows), int(data.Columns)


def dicom_span(encoded: bytes, max_pixels: int) -> Span | None:
    """The values that the stored bits can have, where no window says which ones are shown."""
    data = _read(encoded, max_pixels)
    if int(data.get("SamplesPerPixel", 1)) > 1 or _window(data) or int(data.BitsStored) <= 8:
        return None
    low, high = _stored_range(data)
    return Span(low, high, 15)


def _read(encoded: bytes, max_pixels: int) -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise missing_package(DICOM, "pydicom", "dicom") from error
    with quiet():
        data = pydicom.dcmread(io.BytesIO(encoded))
    if "PixelData" not in data:
        raise BadImage("undecodable", "the DICOM file has no pixels")
    height, width = int(data.Rows), int(data.Columns)
    limit = pixel_limit(max_pixels, 12 * int(data.get("SamplesPerPixel", 1)))
    if height * width > limit:
        raise too_large(width, height, limit)
    return data


def _stored_range(data: Any) -> tuple[float, float]:
    """What the stored bits can say, after slope and intercept."""
    bits = int(data.BitsStored)
    first = -(2 ** (bits - 1)) if int(data.PixelRepresentation) else 0
    slope, intercept = (
        float(data.get("RescaleSlope", 1) or 1),
        float(data.get("RescaleIntercept", 0) or 0),
    )
    ends = (first * slope + intercept, (first + 2**bits - 1) * slope + intercept)
    return min(ends), max(ends)


def _window(data: Any) -> tuple[float, float, str] | None:
    """Centre and width of the first window, and its function."""
    centre, width = (data.get(name) for name in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None:
        return None
    first = [v[0] if isinstance(v, list | tuple) or hasattr(v, "append") else v
             for v in (centre, width)]  # fmt: skip
    return float(first[0]), float(first[1]), str(data.get("VOILUTFunction", "") or "LINEAR")


def _windowed(values: Any, window: tuple[float, float, str]) -> Pixels:
    """The functions of DICOM's PS3.3 C.11.2.1.2 and C.11.2.1.3, to 0 to 255."""
    centre, width, function = window
    if function == "SIGMOID":
        shares = 1 / (1 + np.exp(-4 * (values - centre) / width))
    elif function == "LINEAR_EXACT":
        shares = (values - centre) / width + 0.5
    else:
        shares = (values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5
    return np.asarray(np.rint(shares.clip(0, 1) * 255), np.uint8)
