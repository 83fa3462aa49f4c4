"""What features show without labels: how many directions, how even, how steady, how smooth.

None of these says how good features are. A backbone that tells noise apart can have a high rank
and an even spread. Compare them between models of one kind, on the same images. `feature_std` and
`effective_rank` are in `health.py`, for training watches them.

Shapes: N images, D width, A copies of an image, P patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import DataError

RANK_IMAGES = 25_600  # of which Garrido et al. compute RankMe
RANK_EPSILON = 1e-7  # Garrido et al., equation 1, for float32
UNIFORMITY_T = 2.0  # Wang and Isola, section 4.2
ALIGNMENT_ALPHA = 2.0  # Wang and Isola, section 4.2
PAIRS_AT_ONCE = 1 << 24  # 128 MiB in float64


def rank_me(features: Tensor) -> float:
    """RankMe: exp of the entropy of the singular values, taken as shares of their sum.

    Equation 1 of Garrido et al., "RankMe: Assessing the downstream performance of pretrained
    self-supervised representations by their rank" (ICML 2023): the features are not centred, and
    1e-7 is added to each share.

    Says how many directions features use. Among runs that differ in their settings only, a low one
    goes with a poor linear accuracy. It cannot say that a high one is good. It is between 1 and
    min(N, D) and rises with N, most while N is below some multiples of D. The paper takes 25,600
    images: compare it at equal N.

    Args:
        features: [N, D], any scale; the work is done where they are.

    Returns:
        0 where all features are 0, nan where one is not finite.

    Raises:
        DataError: there is no feature.
    """
    values = singular_values(_checked(features, 1))
    total = float(values.sum())
    if math.isnan(total):
        return math.nan
    if total == 0:
        return 0.0
    shares = values / total + RANK_EPSILON
    return float(torch.exp(-(shares * shares.log()).sum()))


def singular_values(features: Tensor) -> Tensor:
    """Singular values of features [N, D], float64 [min(N, D)], largest first; nan where a feature
    is not finite.

    Of more features than dimensions those of the triangle of their QR decomposition: the same ones,
    of a small matrix.
    """
    wide = features.double()
    if not torch.isfinite(wide).all():
        return wide.new_full((1,), math.nan)
    if len(wide) > wide.shape[1]:
        wide = torch.linalg.qr(wide, mode="r").R
    values: Tensor = torch.linalg.svdvals(wide)
    return values


def uniformity(features: Tensor) -> float:
    """How evenly features lie on the sphere: log of the mean of exp(-2 d^2) over pairs of images.

    Equation 2 of section 4.2 of Wang and Isola, "Understanding contrastive representation learning
    through alignment and uniformity on the hypersphere" (ICML 2020), t = 2. d is the distance of
    two features of length 1; each pair counts once and no image is paired with itself.

    0: all features are equal; lower is more even, and about -4 is the least for many dimensions
    (exp(-2 * 2): all at right angles). It cannot say that what lies apart shows different things.
    Its expectation does not depend on N.

    Args:
        features: [N, D], any scale; the work is done where they are, in blocks of rows.

    Raises:
        DataError: there are fewer than two.
    """
    unit = functional.normalize(_checked(features, 2).double(), dim=1)
    count, total = len(unit), 0.0
    block = max(1, PAIRS_AT_ONCE // count)
    for start in range(0, count, block):
        # Rows of the block with all from it on: each pair once, those of the block twice.
        cosines = unit[start : start + block] @ unit[start:].T
        values = torch.exp(UNIFORMITY_T * (2 * cosines - 2))
        within = values[:, : len(values)]
        total += float(values.sum() - within.sum() + within.triu(1).sum())
    return math.log(total / (count * (count - 1) / 2))


def alignment(features: Tensor, copies: Tensor) -> Tensor:
    """How far copies of an image lie from it: squared distances of unit vectors, float64 [N, A].

    Equation 1 of section 4.1 of Wang and Isola (see `uniformity`), alpha = 2, is the mean of these.
    0: a copy has the same feature; 2: it is at right angles. Features that are all equal have 0
    too, so read it beside uniformity. Pairs are an image and a changed copy of it; other changes
    have other values.

    Args:
        features: [N, D] of the images, any scale.
        copies: [N, A, D] of their copies.
    """
    one, other = (functional.normalize(x.double(), dim=-1) for x in (features, copies))
    distances: Tensor = (one[:, None] - other).norm(dim=-1) ** ALIGNMENT_ALPHA
    return distances


def patch_smoothness(patches: Tensor, grid: Sequence[int]) -> Tensor:
    """By how much neighbouring patches are more alike than any two of the same image, float64 [N].

    Mean cosine of patches that share an edge, less the mean cosine of all pairs of patches of the
    image. It is our measure; no paper has defined one that others use. 0: the place of a patch
    says nothing (noise, or all patches equal); high: patches change with what is shown, smoothly.
    A blur is smooth too, so it cannot say that borders are where objects end.

    Args:
        patches: [N, P, D], row by row, any scale.
        grid: rows and columns of the patches.

    Raises:
        DataError: there are fewer than two patches, or not those of the grid.
    """
    rows, columns = grid
    count, number, width = patches.shape
    if number < 2 or number != rows * columns:
        raise DataError(
            f"{number} patches are not the patches of a grid of {rows} x {columns}, or too few",
            "give larger images, so that there are several patches",
        )
    unit = functional.normalize(patches.double(), dim=2)
    maps = unit.view(count, rows, columns, width)
    beside = (maps[:, :, 1:] * maps[:, :, :-1]).sum(3).flatten(1)
    below = (maps[:, 1:] * maps[:, :-1]).sum(3).flatten(1)
    neighbours = torch.cat([beside, below], 1).mean(1)
    # The sum of all cosines is the square of the sum of the vectors; P of them are with themselves.
    own = unit.square().sum((1, 2))
    every = (unit.sum(1).square().sum(1) - own) / (number * (number - 1))
    smoothness: Tensor = neighbours - every
    return smoothness


def _checked(features: Tensor, least: int) -> Tensor:
    if len(features) < least:
        raise DataError(
            f"{len(features)} images are too few, at least {least} are needed",
            "evaluate on more images",
        )
    return features
