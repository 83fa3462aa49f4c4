"""From a sample of the images, some of them attacked, to a threshold: plain numpy.

Which share of unlike pairs passes is seen in the images themselves (`tail.py`), which share of
copies is found in attacked ones. The penalty of crop views is chosen on one half of the images, and
what it finds is counted on the other; the threshold comes from all pairs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipeline.curate.images.descriptor import similarities
from pipeline.curate.rows.exact import Doubles, Halves, Ints, dots
from pipeline.curate.threshold.attacks import ATTACKS
from pipeline.curate.threshold.tail import (
    HIGHEST,
    LOOKED_AT,
    Fetch,
    Look,
    Pairs,
    all_pairs,
    interval,
    tail_threshold,
    without_copies,
)

FEWEST = 60  # images, below which nothing is calibrated
SMALL = 1000  # images, below which the threshold is said to be uncertain
DEFAULT_PENALTY = 0.06
# Thresholds of fewer images, of the descriptor and of any other embedder: strict, for nothing is
# known of how alike different ones are. Compressed, smaller, mirrored and brighter copies pass.
STRICT_VIEWS, STRICT_PLAIN = 0.90, 0.95
PENALTIES = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2)
WORTH = 0.01  # of the recall, for which another penalty than the default is taken
CURVE = 41  # points


@dataclass(frozen=True)
class Calibration:
    """What two images must have in common to be copies, and how sure that is.

    Attributes:
        threshold: copies are more alike than this.
        penalty: taken off similarities with crop views; 0 for embedders without.
        target: share of unlike pairs that may pass, as asked for.
        low: with another sample of this size the threshold would most probably be above,
        high: and below this.
        reached: share of unlike pairs of each half of the images that is above the threshold which
            the other half gives.
        images: of the sample.
        attacked: images of it of which copies were made.
        negatives: unlike pairs; below 1 / target, `reached` cannot show it.
        extrapolated: the threshold is from the fit of the tail, for there were too few pairs.
        copies: pairs of images in the sample that were found to be copies, and left out.
        undecided: pairs that the second look could not decide about; they count as unlike.
        recall: share of the attacked copies of the scoring half that pass; NaN without any.
        recalls: by attack.
        curve: (threshold, recall, share of unlike pairs).
        warning: what the reader must know, or "".
    """

    threshold: float
    penalty: float
    target: float
    low: float = math.nan
    high: float = math.nan
    reached: float = math.nan
    images: int = 0
    attacked: int = 0
    negatives: int = 0
    extrapolated: bool = False
    copies: int = 0
    undecided: int = 0
    recall: float = math.nan
    recalls: dict[str, float] = field(default_factory=dict)
    curve: tuple[tuple[float, float, float], ...] = ()
    warning: str = ""

    def line(self) -> str:
        """For the log."""
        if math.isnan(self.low) or math.isnan(self.recall):
            return f"{self.threshold:.3f}, strict, not calibrated"
        return (
            f"{self.threshold:.3f} ({self.low:.3f} to {self.high:.3f} with other images of the "
            f"set), finds {self.recall:.0%} of attacked copies"
        )

    def to_json(self) -> dict[str, Any]:
        """For a file; numbers that are none become null."""
        value = asdict(self)
        for name in _MAY_BE_NONE:
            value[name] = None if math.isnan(value[name]) else value[name]
        value["curve"] = [list(point) for point in self.curve]
        return value

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Calibration:
        """From `to_json`."""
        numbers = {n: math.nan if value[n] is None else value[n] for n in _MAY_BE_NONE}
        curve = tuple((float(t), float(r), float(f)) for t, r, f in value["curve"])
        return cls(**{**value, **numbers, "curve": curve})


_MAY_BE_NONE = ("low", "high", "reached", "recall")


@dataclass(frozen=True)
class Sample:
    """Images of the set, and copies of some of them.

    Attributes:
        vectors: half precision [m, d], of the wholes.
        crops: [m, 9, d], or None for embedders without views.
        look: the second look at two of them.
        originals: [h], which images were attacked.
        copies: [h, attacks, d], of the wholes of their copies.
        copies_crops: [h, attacks, 9, d], or None.
        fetch: as for `tail.without_copies`.
    """

    vectors: Halves
    crops: Halves | None
    look: Look
    originals: Ints
    copies: Halves
    copies_crops: Halves | None
    fetch: Fetch = lambda places: None


def measure_threshold(sample: Sample, target: float) -> Calibration:
    """The calibration of a sample.

    Args:
        sample: images in an order that says nothing about them (by id).
        target: share of unlike pairs that may be taken for copies.
    """
    views = sample.crops is not None
    images, attacked = len(sample.vectors), len(sample.originals)
    default = DEFAULT_PENALTY if views else 0.0
    if images < FEWEST:
        return Calibration(
            STRICT_VIEWS if views else STRICT_PLAIN,
            default,
            target,
            images=images,
            attacked=attacked,
            warning=f"{images} images are too few to calibrate ({FEWEST} are needed): a strict "
            "threshold is used, which finds no crops and few overlays",
        )
    every = all_pairs(sample.vectors, sample.crops)
    pairs = without_copies(every, sample.look, default, sample.fetch)
    plain, crop = _own(sample)
    penalty = _penalty(pairs, plain, crop, target) if views else 0.0
    own = np.maximum(plain, crop - penalty)
    top, i, j = pairs.top(penalty)
    negatives = int(pairs.unlike.sum())
    threshold, extrapolated = tail_threshold(top, negatives, target)
    low, high = interval(top, i, j, images, pairs.copies, target) if len(top) else (math.nan,) * 2
    scored = own[1::2] if attacked > 1 else own
    hits = scored > threshold
    unlike = np.sort(pairs.at(penalty)[pairs.unlike])
    return Calibration(
        threshold=threshold,
        penalty=penalty,
        target=target,
        low=low,
        high=high,
        reached=_reached(pairs, top, i, j, target),
        images=images,
        attacked=attacked,
        negatives=negatives,
        extrapolated=extrapolated,
        copies=pairs.copies,
        undecided=pairs.undecided,
        recall=float(hits.mean()) if attacked else math.nan,
        recalls={n: float(hits[:, a].mean()) for a, n in enumerate(ATTACKS)} if attacked else {},
        curve=tuple(
            (float(t), float((scored > t).mean()), _share_above(unlike, float(t)))
            for t in np.linspace(0.2, 1.0, CURVE)
        )
        if attacked
        else (),
        warning=_warning(pairs, threshold, target),
    )


def _warning(pairs: Pairs, threshold: float, target: float) -> str:
    negatives = int(pairs.unlike.sum())
    if not negatives:
        return "all images of the sample look like copies of each other"
    said = []
    if pairs.exhausted:
        said.append(
            f"so many of the images look alike that after {LOOKED_AT:,} pairs not all copies "
            "were found, and the threshold may be too high"
        )
    if pairs.undecided:
        said.append(
            f"of {pairs.undecided:,} pairs that look alike the second look could not say whether "
            "they are copies; they count as different images"
        )
    if threshold >= HIGHEST:
        said.append(
            "different images are as alike as copies are, so the threshold is the highest there is"
        )
    elif target * negatives < 1:
        said.append(
            f"{negatives:,} unlike pairs cannot show a rate of {target:g}: the threshold is "
            "extrapolated from the highest similarities"
        )
    elif pairs.images < SMALL:
        said.append(f"{pairs.images:,} images are few, so the threshold is uncertain")
    return "; ".join(said)


def _own(sample: Sample) -> tuple[Doubles, Doubles]:
    """Exact similarities [h, attacks] of images with their own copies: of wholes, with crops."""
    h, attacks, dim = sample.copies.shape
    which = np.repeat(sample.originals, attacks)
    one, other = sample.vectors[which], sample.copies.reshape(-1, dim)
    if sample.crops is None or sample.copies_crops is None:
        plain = dots(one, other).reshape(h, attacks)
        return plain, np.full_like(plain, -1.0)
    crops = sample.copies_crops.reshape(h * attacks, -1, dim)
    plain, crop = similarities(one, sample.crops[which], other, crops)
    return plain.reshape(h, attacks), crop.reshape(h, attacks)


def _penalty(pairs: Pairs, plain: Doubles, crop: Doubles, target: float) -> float:
    """The penalty with the highest recall of one half, if that is worth leaving the default."""
    total, recall_at = float(pairs.unlike.sum()), {}
    for penalty in PENALTIES:
        threshold, _ = tail_threshold(pairs.top(penalty)[0], total, target)
        own = np.maximum(plain, crop - penalty)[0::2]
        recall_at[penalty] = float((own > threshold).mean()) if own.size else 0.0
    best = max(recall_at, key=lambda penalty: recall_at[penalty])
    return best if recall_at[best] > recall_at[DEFAULT_PENALTY] + WORTH else DEFAULT_PENALTY


def _reached(pairs: Pairs, top: Doubles, i: Ints, j: Ints, target: float) -> float:
    """Each half gives a threshold for the other; NaN where a half has no unlike pairs."""
    above = total = 0.0
    unlike = [_unlike_of_half(pairs, half) for half in (0, 1)]
    for half in (0, 1):
        inside = (i % 2 == half) & (j % 2 == half)
        threshold, _ = tail_threshold(top[inside], unlike[half], target)
        above += float((top[(i % 2 != half) & (j % 2 != half)] > threshold).sum())
        total += unlike[1 - half]
    return above / total if total else math.nan


def _unlike_of_half(pairs: Pairs, half: int) -> int:
    """Unlike pairs both of whose images have an even (odd) place."""
    count = 0
    for first in range(half, pairs.images, 2):
        at = first * pairs.images - first * (first + 1) // 2
        count += int(pairs.unlike[at + 1 : at + pairs.images - first - 1 : 2].sum())
    return count


def _share_above(ascending: np.ndarray[Any, Any], threshold: float) -> float:
    above = len(ascending) - int(np.searchsorted(ascending, threshold, side="right"))
    return above / len(ascending) if len(ascending) else math.nan
