"""Rules that look at one image alone. They only mark; the decisions are made elsewhere.

The first rule that an image fails is its reason, in the order of the reasons: what cannot be
decoded, what is too small, what is too long, what shows nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.images.fingerprint import MEASURES, Decoding
from pipeline.curate.images.measure import measure
from pipeline.curate.rows.draws_by_id import DRY_RUN, draw
from pipeline.curate.rows.tables import QUALITY, InputFile, Inputs
from pipeline.curate.steps.steps import Account, Output, Step, Steps
from pipeline.images.bad_image import BadImage
from pipeline.shards.row_group import read_group

ERROR = "decode"  # what `rule` says of an image that cannot be decoded
PER_GROUP = 64  # images of a row group that a dry run measures, at most
QUANTILES = (0.0, 0.001, 0.01, 0.05, 0.5, 0.95, 0.99, 0.999, 1.0)

Doubles = np.ndarray[Any, np.dtype[np.float64]]
Values = dict[str, Doubles]


@dataclass(frozen=True)
class Rules:
    """Limits of the quality rules; 0 switches one off. Meanings: config section `quality`."""

    min_side: int = 32
    max_aspect: float = 4.0
    min_entropy: float = 0.0
    min_contrast: float = 4.0
    min_brightness: float = 0.0
    max_brightness: float = 0.0
    min_sharpness: float = 10.0
    min_edges: float = 16.0


# rule, reason, what is measured, and whether too low or too high fails
_RULES = (
    ("min_side", "too_small", "side", "low"),
    ("max_aspect", "aspect", "aspect", "high"),
    ("min_entropy", "flat", "entropy", "low"),
    ("min_contrast", "flat", "contrast", "low"),
    ("min_brightness", "flat", "brightness_p95", "low"),
    ("max_brightness", "flat", "brightness_p05", "high"),
    ("min_sharpness", "flat", "sharpness", "low"),
)
# What has clear edges passes these in any case: a logo on white has little entropy and contrast.
_UNLESS_EDGES = ("min_entropy", "min_contrast", "min_sharpness")
_MEASURES = ("width", "height", *MEASURES)


@dataclass(frozen=True)
class SampleCounts:
    """What a dry run found.

    Attributes:
        images: measured.
        rows: in the inputs.
        counts: images that fail a rule first, by rule; `decode` for what cannot be decoded.
        quantiles: of each measure over the images that can be decoded, by measure, at QUANTILES.
    """

    images: int
    rows: int
    counts: dict[str, int]
    quantiles: dict[str, tuple[float, ...]]

    def lines(self) -> list[str]:
        """For printing: a line a rule, then a line a measure."""
        share = 100 / max(1, self.images)
        out = [
            f"{rule:<16}{count:>7} of {self.images} ({count * share:.2f} %)"
            for rule, count in self.counts.items()
        ]
        out.append("measure".ljust(16) + "".join(f"{100 * q:>9g}%" for q in QUANTILES))
        for name, values in self.quantiles.items():
            out.append(f"{name:<16}" + "".join(f"{value:>10.4g}" for value in values))
        return out


def quality(steps: Steps, inputs: Inputs, prints: Step, rules: Rules) -> Step:
    """Writes `tables.QUALITY` of every input file; accounts have rows, bytes, and rows by rule."""
    return steps.run("quality", mark_file, inputs.by_name, version=2, prints=prints, rules=rules)


def mark_file(out: Output, file: InputFile, prints: Step, rules: Rules) -> Account:
    """Task: the marks of one file."""
    table = prints.read(file.name, ["row", "error", *_MEASURES])
    errors = np.array([bool(error) for error in table.column("error").to_pylist()], bool)
    values = _derived({m: table.column(m).to_numpy().astype(np.float64) for m in _MEASURES})
    reason, rule, value = marks(errors, values, rules)
    columns = [table["row"], reason.tolist(), rule.tolist(), value.astype(np.float32)]
    out.table(pa.table(columns, schema=QUALITY))
    named, count = np.unique(rule[rule != ""].astype(str), return_counts=True)
    return {"marked": dict(zip(named.tolist(), count.tolist(), strict=True))}


def marks(
    errors: np.ndarray[Any, np.dtype[np.bool_]], values: Values, rules: Rules
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], Doubles]:
    """The first rule that each image fails.

    Args:
        errors: bool [n], which cannot be decoded.
        values: [n] each, by measure, with `side` and `aspect`.
        rules: the limits.

    Returns:
        reason and rule [n] of str, "" where an image passes, and what was measured [n].
    """
    count = len(errors)
    reason, rule = np.full(count, "", object), np.full(count, "", object)
    value = np.zeros(count)
    reason[errors], rule[errors] = "undecodable", ERROR
    for name, why, measured, how in _RULES:
        limit = float(getattr(rules, name))
        if not limit:
            continue
        x = values[measured]
        fails = (reason == "") & ((x < limit) if how == "low" else (x > limit))
        if rules.min_edges and name in _UNLESS_EDGES:
            fails &= values["edges"] < rules.min_edges
        reason[fails], rule[fails], value[fails] = why, name, x[fails]
    return reason, rule, value


def sample_counts(
    inputs: Inputs, rules: Rules, sample: int, seed: int = 0, decoding: Decoding | None = None
) -> SampleCounts:
    """Measures some images and counts what the rules would mark: what a dry run prints.

    Few row groups are read: at most 64 images of each of some that are drawn at random.

    Args:
        inputs: all images.
        rules: the limits.
        sample: images to measure.
        seed: of the draw.
        decoding: of the images.
    """
    decoding = decoding or Decoding()
    places = [(f, g) for f in inputs.files for g in range(len(f.file.row_groups))]
    ids = np.zeros((len(places), 16), np.uint8)
    ids[:, :8] = np.arange(len(places), dtype="<u8")[:, None].view(np.uint8)
    order = np.argsort(draw(seed, 0, ids, DRY_RUN), kind="stable")
    rows = max(PER_GROUP, -(-sample // max(1, len(places))))
    measures: list[list[float]] = []
    errors: list[bool] = []
    for place in order:
        if len(errors) >= sample:
            break
        file, number = places[place]
        group = read_group(file.columns, file.file.path, number)
        drawn = np.argsort(draw(seed, 1, group.image_ids, DRY_RUN))
        for row in drawn[: min(rows, sample - len(errors))]:
            try:
                pixels = decoding.pixels(group.checked(int(row)), file.columns.value_range)
                measured = measure(pixels)
            except BadImage:
                errors.append(True)
                measures.append([0.0] * len(_MEASURES))
                continue
            errors.append(False)
            measures.append([float(getattr(measured, name)) for name in _MEASURES])
    table = np.asarray(measures, np.float64).reshape(len(measures), len(_MEASURES))
    values = _derived({name: table[:, i] for i, name in enumerate(_MEASURES)})
    bad = np.asarray(errors, bool)
    _, rule, _ = marks(bad, values, rules)
    names = [ERROR, *(name for name, *_ in _RULES if getattr(rules, name))]
    shown = ("side", "aspect", *MEASURES)
    good = {name: values[name][~bad] for name in shown}
    return SampleCounts(
        images=len(bad),
        rows=inputs.rows,
        counts={name: int((rule == name).sum()) for name in names},
        quantiles={
            name: tuple(float(q) for q in np.quantile(x, QUANTILES))
            for name, x in good.items()
            if len(x)
        },
    )


def _derived(values: Values) -> Values:
    """With the shorter side, and how often it goes into the longer one."""
    shorter = np.minimum(values["width"], values["height"])
    longer = np.maximum(values["width"], values["height"])
    return {**values, "side": shorter, "aspect": longer / np.maximum(shorter, 1)}
