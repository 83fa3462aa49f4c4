"""What comes in: bodies up to a limit, images in them, and the JSON of a search."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from email.message import Message
from typing import Any

from pipeline.images.bad_image import BadImage
from pipeline.images.decode import UInt8Array, decode_image
from pipeline.images.value_range import FULL, ValueRange
from pipeline.serve.refusal import Refusal, of_bad_image

JSON = "application/json"
_FORM = "multipart/form-data"


@dataclass(frozen=True)
class Limits:
    """What one request may cost."""

    max_bytes: int
    max_pixels: int
    max_k: int
    timeout_s: float


@dataclass(frozen=True)
class Pixels:
    """How images become pixels, as the vectors' own did."""

    channels: int = 3
    value_range: ValueRange = FULL


async def read_body(length: str | None, chunks: AsyncIterator[bytes], limits: Limits) -> bytes:
    """The whole body.

    Args:
        length: the header `Content-Length`.
        chunks: of the body, as they come.
        limits: of bytes and seconds.

    Raises:
        Refusal: 413 before or while it is read, 408 where it comes too slowly, 422 where it ends
            before its length.
    """
    sentence = f"the body has more than {limits.max_bytes:,} bytes, which serve.max_mb allows"
    announced = int(length) if length and length.isascii() and length.isdigit() else None
    if announced is not None and announced > limits.max_bytes:
        raise Refusal(413, sentence)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.timeout_s):
            async for chunk in chunks:
                body += chunk
                if len(body) > limits.max_bytes:
                    raise Refusal(413, sentence)
    except TimeoutError:
        raise Refusal(
            408, f"the body did not come within {limits.timeout_s:g} s, as serve.timeout_s says"
        ) from None
    if announced is not None and len(body) < announced:
        raise Refusal(422, f"the body ends after {len(body):,} of {announced:,} bytes")
    return bytes(body)


def media_type(content_type: str) -> str:
    """`image/png` of `image/png; charset=…`, in small letters."""
    return content_type.partition(";")[0].strip().lower()


def image_of(content_type: str, body: bytes) -> bytes:
    """The encoded image of a request: the body itself, or the first file of a form.

    Raises:
        Refusal: 422 where there is none.
    """
    image = _first_file(content_type, body) if media_type(content_type) == _FORM else body
    if not image:
        raise Refusal(422, "the image has 0 bytes; send an image file as the body, or in a form")
    return image


def _first_file(content_type: str, body: bytes) -> bytes:
    """The first part of a form that has a file name (RFC 7578)."""
    header = Message()
    header["Content-Type"] = content_type
    boundary = header.get_param("boundary")
    if not isinstance(boundary, str) or not boundary or len(boundary) > 70:  # RFC 2046, 5.1.1
        raise Refusal(422, "the form has no boundary, which multipart/form-data needs")
    mark = re.escape(b"--" + boundary.encode("ascii", "replace"))
    parts = re.split(rb"(?:\A|\r\n)" + mark + rb"(?:--)?[ \t]*(?:\r\n|\Z)", body)
    for part in parts[1:]:
        head, _, content = part.partition(b"\r\n\r\n")
        if re.search(rb"^content-disposition:[^\r\n]*;\s*filename\*?=", head, re.I | re.M):
            return content
    raise Refusal(422, "the form has no file; send the image as a field with a file name")


def decoded(image: bytes, max_pixels: int, pixels: Pixels) -> UInt8Array:
    """Pixels [H, W, C] of an image of at most so many pixels.

    Raises:
        Refusal: 413, 415 or 422, with the reason.
    """
    try:
        return decode_image(image, pixels.channels, max_pixels, pixels.value_range)
    except BadImage as error:
        raise of_bad_image(error) from error


@dataclass(frozen=True)
class Query:
    """A search by an image of the set."""

    image_id: str
    k: int


def query_of(body: bytes, limits: Limits, default_k: int) -> Query:
    """The query in a body of JSON.

    Raises:
        Refusal: 422 where it is no JSON, or has other fields or values.
    """
    try:
        content: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(422, 'the body is no JSON; expected {"image_id": "…", "k": 20}') from None
    if not isinstance(content, dict) or not isinstance(content.get("image_id"), str):
        raise Refusal(422, 'expected {"image_id": "…", "k": 20}, where image_id is text')
    if unknown := sorted(content.keys() - {"image_id", "k"}):
        raise Refusal(422, f"the query has no field {unknown[0]!r}; it has image_id and k")
    return Query(content["image_id"], neighbours(content.get("k", default_k), limits))


def neighbours(k: Any, limits: Limits) -> int:
    """How many neighbours are asked for.

    Raises:
        Refusal: 422 where that is no number from 1 to the limit.
    """
    if isinstance(k, str) and re.fullmatch(r"[0-9]{1,9}", k):
        k = int(k)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= limits.max_k:
        raise Refusal(
            422, f"k must be a whole number from 1 to {limits.max_k}, as serve.max_k says"
        )
    return k
