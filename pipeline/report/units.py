"""Sizes as every page says them."""

from __future__ import annotations


def bytes_of(number: float) -> str:
    """`12 MB`, `1.5 GB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"
