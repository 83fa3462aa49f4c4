"""What MLflow accepts as names and lengths, and how a value is made to fit, visibly."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

# Limits of mlflow 3.17 (mlflow/utils/validation.py). The client cuts longer values without a word.
NAME_LIMIT = 250
PARAM_LIMIT = 6_000
TAG_LIMIT = 8_000
DIGEST_LIMIT = 36
METRICS_PER_BATCH = 1_000
TAGS_PER_BATCH = 100
PARAMS_PER_BATCH = 100

# The run page prints every param above every picture and pushes it out of its card.
MAX_PARAMS = 8


def metric_name(name: str) -> str:
    """The name as MLflow takes it: `eval/knn@20 [top1]` becomes `eval/knn_20 _top1_`."""
    name = re.sub(r"[^A-Za-z0-9_.\-/: ]", "_", name)
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:NAME_LIMIT].rstrip("/") or "unnamed"


def picture_key(key: str) -> str:
    """A picture's key: as a metric name without `:`, and always below `pictures/`."""
    key = metric_name(key).replace(":", "_")
    return key if key.startswith("pictures/") else f"pictures/{key}"[:NAME_LIMIT]


def cut(text: str, limit: int) -> str:
    """The text, or its beginning with a note of how long it was."""
    if len(text) <= limit:
        return text
    note = f" … [cut, {len(text):,} characters]"
    return text[: limit - len(note)] + note


def numbers(values: Mapping[str, Any]) -> tuple[dict[str, float | None], list[str]]:
    """Metric values as JSON takes them, and the names of those that are not numbers.

    Non-finite values become None (`null`, NaN in MLflow): `NaN` is not JSON, and MLflow stores an
    infinity as 1.8e308, which wrecks the y axis.
    """
    kept: dict[str, float | None] = {}
    refused: list[str] = []
    for name, value in values.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            refused.append(name)
            continue
        kept[metric_name(name)] = number if math.isfinite(number) else None
    return kept, refused
