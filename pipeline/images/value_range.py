"""Which values of files with more than 8 bits a sample become 0 and 255.

Cameras, scanners and satellites write 10 to 14 bits into 16: of those the high byte keeps a few
levels. So a set has one range of values, the same for everything that decodes its images. `full`
is that of 16 bits. Files with 8 bits are taken as they are, whatever the range.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pipeline.errors import DataError, shortened
from pipeline.images.bad_image import BadImage

FULL: Literal["full"] = "full"
AUTO: Literal["auto-from-sample"] = "auto-from-sample"
ValueRange = Literal["full"] | tuple[float, float]

SAMPLE = 256  # images whose values decide about a set
_PIXELS = 50_000  # of an image that are looked at
_TAIL = 0.001  # share of an image's pixels at either end that may be dead or hot
_NEAR = 0.98  # of all levels: a range that has so many is called full, or rounded to whole bits
_STRIP = 2**20  # values that are mapped at once
_Values = np.ndarray[Any, np.dtype[Any]]
_Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def to_bytes(values: _Values, value_range: ValueRange) -> _Pixels:
    """Values of any number type to 8 bits: the range is cut into 256 equal parts.

    What lies outside becomes 0 or 255, and what is no number 0.

    Raises:
        BadImage: the type has no full range.
    """
    dtype = values.dtype
    if dtype == np.uint8:
        return values
    if value_range == FULL:
        if dtype.kind != "u" or dtype.itemsize != 2:
            what = f"{dtype.name} {list(values.shape)}"
            detail = f"{what} has no fixed range: data.range=[low,high] names one"
            raise BadImage("undecodable", detail)
        value_range = (0, 65_535)
    low, high = value_range
    if dtype.kind in "iu" and dtype.itemsize == 2:
        native = values.astype(f"{dtype.kind}2", copy=False)
        return _table(dtype.kind, low, high)[np.ascontiguousarray(native).view(np.uint16)]
    out = np.empty(values.shape, np.uint8)
    rows = max(1, _STRIP // max(1, values[0].size))
    for top in range(0, len(values), rows):
        out[top : top + rows] = _mapped(values[top : top + rows], low, high)
    return out


def _mapped(values: _Values, low: float, high: float) -> _Pixels:
    whole = values.dtype.kind in "iu" and float(low).is_integer() and float(high).is_integer()
    with np.errstate(invalid="ignore", over="ignore"):
        parts = (values.astype(np.float64) - low) * 256 / (high - low + whole)
        return np.nan_to_num(np.floor(parts), nan=0.0).clip(0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=8)
def _table(kind: str, low: float, high: float) -> _Pixels:
    """What becomes of each of the 65,536 values, by their bits."""
    return _mapped(np.arange(65_536, dtype=np.uint16).view(f"{kind}2"), low, high)


@dataclass(frozen=True)
class Span:
    """Values that an image uses; `bits` of a sample without its sign, 0 where types have no range
    that anyone means: those of 32 bits and floats.
    """

    low: float
    high: float
    bits: int


def span_of(values: _Values) -> Span:
    """The values that an image uses: all of them, but for some that lie far from the others."""
    dtype = values.dtype
    bits = 16 - (dtype.kind == "i") if dtype.kind in "iu" and dtype.itemsize == 2 else 0
    flat = values.reshape(-1, values.shape[-1])
    if len(flat) > _PIXELS:
        flat = flat[np.random.default_rng(0).integers(0, len(flat), _PIXELS)]
    sample = flat[np.isfinite(flat)].astype(np.float64)
    if not sample.size:
        return Span(0.0, 0.0, bits)
    low, high = np.quantile(sample, (_TAIL, 1 - _TAIL), method="nearest")
    least, most = sample.min(), sample.max()
    margin = (high - low) / 4
    return Span(
        float(least if low - least <= margin else low),
        float(most if most - high <= margin else high),
        bits,
    )


def range_of(spans: Sequence[Span]) -> ValueRange:
    """The range of a set, by the spans of some of its images; one image in a hundred may be odd."""
    if not spans:
        return FULL
    low = float(np.quantile([s.low for s in spans], 0.01, method="lower"))
    high = float(np.quantile([s.high for s in spans], 0.99, method="higher"))
    if 0 < low <= (1 - _NEAR) * high:
        low = 0.0
    for bits in range(8, 17):
        top = 2**bits - 1
        if low >= 0 and high == round(high) and _NEAR * top <= high < top:
            high = float(top)
    if all(span.bits == 16 for span in spans) and (high - low >= _NEAR * 65_535 or high <= low):
        return FULL
    return (low, high) if high > low else (low, low + 1)


def range_alone(span: Span | None) -> ValueRange:
    """What an image is tried with while the range of its set is not known: its own values."""
    return range_of([span]) if span is not None and span.bits else FULL


def smallest(spans: dict[str, Span]) -> dict[str, Span]:
    """Those of the images with the smallest ids: a sample that depends on nothing but the images,
    so not on workers, on their order or on a stop in between.
    """
    return {name: spans[name] for name in sorted(spans)[:SAMPLE]}


@dataclass
class Sample:
    """The spans of the images with the smallest ids of all tasks, by accounts one after another."""

    by_id: dict[str, Span] = field(default_factory=dict)

    def take(self, account: dict[str, Any]) -> None:
        """Takes `spans` out of an account: those of all tasks together would fill the memory."""
        spans = {name: Span(**span) for name, span in account.pop("spans", {}).items()}
        self.by_id = smallest(self.by_id | spans)

    @property
    def range(self) -> ValueRange | None:
        """Of the set; None where no image has more than 8 bits."""
        return range_of(list(self.by_id.values())) if self.by_id else None


def merged(accounts: Iterable[dict[str, Any]]) -> list[Span]:
    """The sample of all tasks, from `spans` of their accounts."""
    sample = Sample()
    for account in accounts:
        sample.take(dict(account))
    return list(sample.by_id.values())


def from_json(value: Any, name: str = "value_range") -> ValueRange | None:
    """A range as manifests and plans hold it; None where there is none.

    Raises:
        DataError: what `name` holds is neither `full` nor two numbers of which the second is
            larger.
    """
    if value is None:
        return None
    if value == FULL:
        return FULL
    pair = isinstance(value, list | tuple) and len(value) == 2
    # 1e300: neither infinite, nor a whole number that no float holds, nor NaN
    if pair and all(type(v) in (int, float) and -1e300 < v < 1e300 for v in value):
        low, high = float(value[0]), float(value[1])
        if low < high:
            return low, high
    content = shortened(json.dumps(value, default=str))
    raise DataError(
        f'{name} is {content}, expected "full" or [low, high] with low < high',
        hint="put the file back from a copy, or have it written anew.",
    )


def shown(value_range: ValueRange) -> str:
    """`[0,4095]` or `full`, as one would write it for `data.range`."""
    if value_range == FULL:
        return FULL
    return "[" + ",".join(f"{v:.10g}" for v in value_range) + "]"


def sentence(used: ValueRange | None, mapped: ValueRange) -> str:
    """What there is to say of the values that a set uses and of how they are mapped, if anything.

    Args:
        used: by the set, as `range_of` finds it; None: no image has more than 8 bits.
        mapped: to 0 and 255.
    """
    if used is None:
        return ""
    if used == FULL:
        if mapped == FULL:
            return ""
        return f"values up to 65535 are used, and data.range={shown(mapped)} cuts off the others"
    low, high = used
    text = f"images of more than 8 bits use values {low:.10g} to {high:.10g}"
    if mapped == FULL:
        levels = max(1, round((high - low) / 256))
        return (
            f"{text}: with data.range=full some {min(levels, 256)} of 256 levels are left; "
            f"data.range=auto-from-sample, or {shown(used)}, keeps them all"
        )
    if similar(used, mapped):
        return f"{text}, which become 0 to 255: data.range={shown(mapped)}"
    return f"{text}, and data.range={shown(mapped)} becomes 0 to 255: the two differ"


def similar(one: ValueRange, other: ValueRange) -> bool:
    """Whether two ranges have most of their values in common."""
    (a, b), (c, d) = ((0.0, 65_535.0) if r == FULL else r for r in (one, other))
    return min(b, d) - max(a, c) >= 0.8 * (max(b, d) - min(a, c))
