"""Which patches are hidden from the student: block masks, drawn per step from a key.

The block algorithm is the one of BEiT as DINOv2 uses it (data/masking.py), the share of masked
views the one of its collate (data/collate.py). Here nothing is shared between workers: a mask
depends on (seed, step, view) only.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.views.draws import GOLDEN, mix

Bools = npt.NDArray[np.bool_]

ROUNDS = 10  # tries to place one block before giving up


def block_mask(
    grid: tuple[int, int],
    target: int,
    rng: random.Random,
    min_patches: int = 4,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Bools:
    """A mask `[h, w]` of random rectangles with `target` patches, or a few fewer when a block
    cannot be placed.

    One block covers at most half the grid; its area is uniform in `[min_patches, what is still
    missing]` and its aspect ratio log-uniform in `aspect`.
    """
    height, width = grid
    mask = np.zeros(grid, dtype=np.bool_)
    largest = height // 2 * width
    log_aspect = (math.log(aspect[0]), math.log(aspect[1]))
    masked = 0
    while masked < target:
        added = _add_block(mask, min(target - masked, largest), min_patches, log_aspect, rng)
        if added == 0:
            break
        masked += added
    return mask


def _add_block(
    mask: Bools,
    room: int,
    min_patches: int,
    log_aspect: tuple[float, float],
    rng: random.Random,
) -> int:
    """Set one rectangle of at most `room` new patches in `mask`; return how many were new (0: no
    luck).
    """
    height, width = mask.shape
    for _ in range(ROUNDS):
        area = rng.uniform(min_patches, room)
        ratio = math.exp(rng.uniform(*log_aspect))
        h = round(math.sqrt(area * ratio))
        w = round(math.sqrt(area / ratio))
        if h >= height or w >= width:
            continue
        top = rng.randint(0, height - h)
        left = rng.randint(0, width - w)
        block = mask[top : top + h, left : left + w]
        new = h * w - int(block.sum())
        if 0 < new <= room:
            block[:] = True
            return new
    return 0


@dataclass(frozen=True)
class MaskSpec:
    """Which patches the student does not see (DINOv2 configs/ssl_default_config.yaml).

    Attributes:
        grid: patches of a global crop, (rows, columns).
        probability: share of the global crops that are masked.
        ratio: smallest and largest share of their patches.
        global_crops: of an image.
    """

    grid: tuple[int, int]
    probability: float = 0.5
    ratio: tuple[float, float] = (0.1, 0.5)
    global_crops: int = 2


def masks_for(
    seed: int, step: int, indices: npt.ArrayLike, global_batch: int, spec: MaskSpec
) -> Bools:
    """Masks `[n, G, P]` for the images at `indices` (places in the global batch) of one step, with
    G global crops each.

    Of the `G * global_batch` views, `int(G * global_batch * probability)` are masked. The range
    `ratio` is cut into as many equal bins, each masked view draws its share of patches from its own
    bin, and a permutation keyed by (seed, step) deals the bins out. The result does not depend on
    how the batch is split over workers.

    Raises:
        ValueError: an index lies outside `[0, global_batch)`.
    """
    places = np.asarray(indices, dtype=np.int64).reshape(-1)
    if places.size and (places.min() < 0 or places.max() >= global_batch):
        raise ValueError(
            f"mask indices run from {places.min()} to {places.max()}, "
            f"expected 0 to {global_batch - 1}"
        )
    crops = spec.global_crops
    views = crops * global_batch
    masked_views = int(views * spec.probability)
    edges = np.linspace(*spec.ratio, masked_views + 1)
    bins = _permutation(_key("bins", seed, step), views)
    patches = spec.grid[0] * spec.grid[1]
    masks = np.zeros((places.size, crops, patches), dtype=np.bool_)
    for row, place in enumerate(places.tolist()):
        for crop in range(crops):
            view = crop * global_batch + place
            slot = int(bins[view])
            if slot >= masked_views:
                continue
            rng = random.Random(_key("mask", seed, step, view))
            share = rng.uniform(float(edges[slot]), float(edges[slot + 1]))
            masks[row, crop] = block_mask(spec.grid, int(patches * share), rng).reshape(-1)
    return masks


def _key(name: str, *numbers: int) -> int:
    """64 well-mixed bits from a name and some integers; stable over Python and numpy versions."""
    text = f"{name}:" + ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _permutation(key: int, size: int) -> npt.NDArray[np.int64]:
    """A permutation of `range(size)`: the order of SplitMix64 outputs, so numpy's own streams do
    not matter.
    """
    counter = np.arange(1, size + 1, dtype=np.uint64) * GOLDEN
    return np.argsort(mix(np.uint64(key) + counter), kind="stable").astype(np.int64)
