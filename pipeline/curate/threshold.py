"""From attacked images to a threshold: the calculation of the calibration, plain numpy.

Half of the images choose the threshold (and the penalty of crop views), the other half says what
they are worth. A pair that must not match is an image and any copy of another image. With h images
in a half these are 10 h (h - 1), so 250 images give 600,000 pairs: a rate of 1e-6 cannot be counted
there. So the highest similarities are fitted: their excess over the quantile of 1e-3 falls off like
an exponential, whose scale is its median. That quantile and median do not move much where a few
pairs are wrong.

A user's images hold copies of each other, which are no errors when they match. So the pairs that
are most alike are looked at by `same_picture`, until many in a row are none, and those that are
copies by it are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipeline.curate.attacks import ATTACKS
from pipeline.curate.descriptor import MIRROR
from pipeline.curate.same_picture import same_picture

FEWEST = 60  # images, below which the defaults are used
DEFAULT_PENALTY = 0.06
DEFAULT_VIEWS, DEFAULT_PLAIN = 0.70, 0.90  # thresholds: of the descriptor, of any other embedder
FITTED = 1e-3  # share of the negatives above the point where the tail's fit begins
FEWEST_FITTED = 300  # negatives in the tail: thirty pairs of images, of which all copies are alike
PENALTIES = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2)
LOOKED_AT = 5  # pairs of images, for each image, at most
PATIENCE = 40  # pairs in a row that are no copies, after which no more are looked at
HIGHEST = 0.995  # no threshold is above: JPEG alone costs a little
CURVE = 41  # points
_CHUNK = 2**25  # similarities computed at once

Doubles = np.ndarray[Any, np.dtype[np.float64]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Calibration:
    """What two images must have in common to be copies, and how sure that is.

    Attributes:
        threshold: copies are more alike than this.
        penalty: taken off similarities with crop views; 0 for embedders without.
        target: share of unlike pairs that may pass, as asked for.
        reached: share of unlike pairs of the scoring half that pass.
        images: attacked, both halves.
        negatives: unlike pairs in the scoring half; below 1 / target, `reached` cannot show it.
        extrapolated: the threshold is from the fit of the tail, for there were too few pairs.
        copies: pairs of images in the sample that were found to be copies, and left out.
        recall: share of the attacked copies of the scoring half that pass; NaN without any.
        recalls: by attack.
        curve: (threshold, recall, share of unlike pairs) of the scoring half.
        warning: what the reader must know, or "".
    """

    threshold: float
    penalty: float
    target: float
    reached: float = math.nan
    images: int = 0
    negatives: int = 0
    extrapolated: bool = False
    copies: int = 0
    recall: float = math.nan
    recalls: dict[str, float] = field(default_factory=dict)
    curve: tuple[tuple[float, float, float], ...] = ()
    warning: str = ""

    def to_json(self) -> dict[str, Any]:
        """For a file; numbers that are none become null."""
        found = asdict(self)
        for name in ("reached", "recall"):
            found[name] = None if math.isnan(found[name]) else found[name]
        found["curve"] = [list(point) for point in self.curve]
        return found

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Calibration:
        """From `to_json`."""
        numbers = {n: math.nan if value[n] is None else value[n] for n in ("reached", "recall")}
        curve = tuple((float(t), float(r), float(f)) for t, r, f in value["curve"])
        return cls(**{**value, **numbers, "curve": curve})


@dataclass(frozen=True)
class Attacked:
    """Images and their copies: [m, 1 + attacks, d] vectors, the image itself first.

    Attributes:
        vectors: of the wholes, half precision.
        crops: [m, 1 + attacks, 9, d], or None for embedders without views.
        pictures: uint8 [m, 64, 64] grey, for `same_picture`.
    """

    vectors: np.ndarray[Any, np.dtype[np.float16]]
    crops: np.ndarray[Any, np.dtype[np.float16]] | None
    pictures: np.ndarray[Any, np.dtype[np.uint8]]

    def only(self, chosen: Any) -> Attacked:
        """Some of the images."""
        crops = None if self.crops is None else self.crops[chosen]
        return Attacked(self.vectors[chosen], crops, self.pictures[chosen])


@dataclass(frozen=True)
class Compared:
    """Similarities of h images with the attacked copies of the same and of others.

    Attributes:
        plain: [h, h, 1 + attacks] of the wholes.
        crop: likewise, of wholes with crops; None without views.
        unlike: bool [h, h], pairs that must not match.
        copies: pairs (without order) that were left out, for they show the same picture.
    """

    plain: Floats
    crop: Floats | None
    unlike: Bools
    copies: int

    def at(self, penalty: float) -> Floats:
        """Similarities with the crops' penalty."""
        return self.plain if self.crop is None else np.maximum(self.plain, self.crop - penalty)

    def negatives(self, penalty: float) -> Floats:
        """Of all pairs that must not match, ascending."""
        return np.sort(self.at(penalty)[self.unlike].ravel())

    def positives(self, penalty: float) -> Floats:
        """[h, attacks] of the images with their own copies."""
        own: Floats = np.einsum("iia->ia", self.at(penalty))[:, 1:]
        return own


def measure_threshold(sample: Attacked, target: float) -> Calibration:
    """The calibration of a sample.

    Args:
        sample: images in an order that says nothing about them (by id).
        target: share of unlike pairs that may be taken for copies.
    """
    views = sample.crops is not None
    images = len(sample.vectors)
    if images < FEWEST:
        return Calibration(
            DEFAULT_VIEWS if views else DEFAULT_PLAIN,
            DEFAULT_PENALTY if views else 0.0,
            target,
            images=images,
            warning=f"{images} images are too few to calibrate ({FEWEST} are needed): the default "
            "threshold is used",
        )
    choosing, scoring = (compare(sample.only(slice(half, None, 2))) for half in (0, 1))
    best = (-1.0, 0.0, 0.0, False)
    for penalty in PENALTIES if views else (0.0,):
        threshold, extrapolated = tail_threshold(choosing.negatives(penalty), target)
        recall = float((choosing.positives(penalty) > threshold).mean())
        if recall > best[0]:
            best = (recall, threshold, penalty, extrapolated)
    _, threshold, penalty, extrapolated = best
    negatives, positives = scoring.negatives(penalty), scoring.positives(penalty)
    hits = positives > threshold
    warning = ""
    if not len(negatives):
        warning = "all images of the sample look like copies of each other"
    elif extrapolated:
        warning = (
            f"{len(negatives)} unlike pairs cannot show a rate of {target:g}: the threshold is "
            "extrapolated from the highest similarities"
        )
    return Calibration(
        threshold=threshold,
        penalty=penalty,
        target=target,
        reached=_share_above(negatives, threshold),
        images=images,
        negatives=len(negatives),
        extrapolated=extrapolated,
        copies=choosing.copies + scoring.copies,
        recall=float(hits.mean()),
        recalls={name: float(hits[:, i].mean()) for i, name in enumerate(ATTACKS)},
        curve=tuple(
            (float(t), float((positives > t).mean()), _share_above(negatives, float(t)))
            for t in np.linspace(0.2, 1.0, CURVE)
        ),
        warning=warning,
    )


def tail_threshold(negatives: Floats, target: float) -> tuple[float, bool]:
    """The similarity that a share `target` of the negatives exceeds; whether it is extrapolated.

    Args:
        negatives: ascending.
        target: share.
    """
    count = len(negatives)
    if not count:
        return HIGHEST, True
    if target * count >= FEWEST_FITTED:
        return _rounded(float(negatives[count - int(target * count)])), False
    tail = min(count, max(FEWEST_FITTED, round(FITTED * count)))
    start = float(negatives[count - tail])
    scale = float(np.median(negatives[count - tail :] - start)) / math.log(2)
    return _rounded(start + scale * math.log(tail / count / target)), True


def _rounded(threshold: float) -> float:
    """Up to four digits: what is below them differs between machines."""
    return min(HIGHEST, math.ceil(threshold * 1e4) / 1e4)


def _share_above(ascending: Floats, threshold: float) -> float:
    above = len(ascending) - int(np.searchsorted(ascending, threshold, side="right"))
    return above / len(ascending) if len(ascending) else math.nan


def compare(sample: Attacked) -> Compared:
    """All similarities within a half."""
    wide = sample.vectors.astype(np.float32)
    wholes = wide[:, 0]
    plain = _best(wholes, wide[:, :, None])
    crop = None
    if sample.crops is not None:
        turned = MIRROR.astype(np.float32)
        plain = np.maximum(plain, _best(wholes * turned, wide[:, :, None]))
        crop = np.full_like(plain, -1)
        for whole, crops in ((wholes, sample.crops), (wholes * turned, sample.crops)):
            np.maximum(crop, _best(whole, crops), out=crop)
        own = sample.crops[:, 0].astype(np.float32)  # [h, views, d]
        for view in range(own.shape[1]):
            for mine in (own[:, view], own[:, view] * turned):
                np.maximum(crop, _best(mine, wide[:, :, None]), out=crop)
    unlike = ~np.eye(len(wholes), dtype=bool)
    found = 0
    alike = plain[:, :, 0] if crop is None else np.maximum(plain, crop - DEFAULT_PENALTY)[:, :, 0]
    others = 0
    for i, j in _most_alike(alike):
        if same_picture(sample.pictures[i], sample.pictures[j]):
            unlike[i, j] = unlike[j, i] = False
            found, others = found + 1, 0
        elif (others := others + 1) == PATIENCE:
            break
    return Compared(plain, crop, unlike, found)


def _best(a: Floats, b: np.ndarray[Any, Any]) -> Floats:
    """The highest product over the views of b, [h, copies, views, d], with a, [h, d]."""
    h, copies, views, dim = b.shape
    out = np.empty((h, h, copies), np.float32)
    step = max(1, _CHUNK // (h * copies * views))
    for at in range(0, h, step):
        part = b[at : at + step].astype(np.float32).reshape(-1, dim)
        out[:, at : at + step] = (a @ part.T).reshape(h, -1, copies, views).max(3)
    return out


def _most_alike(similarity: Floats) -> Iterator[tuple[int, int]]:
    """Pairs (i < j), most alike first."""
    i, j = np.triu_indices(len(similarity), 1)
    both = np.maximum(similarity[i, j], similarity[j, i])
    for pair in np.argsort(-both, kind="stable")[: LOOKED_AT * len(similarity)]:
        yield int(i[pair]), int(j[pair])
