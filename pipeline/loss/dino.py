"""DINO: CLS tokens of the student predict the teacher's CLS targets of the other global view.

Crop-major rows: crop c of image i is row c * B + i. B images, L local crops, K prototypes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from pipeline.loss.prototypes import STUDENT_TEMPERATURE, Piece, cross_entropy
from pipeline.loss.target import Target, slices

GLOBAL, LOCAL = 0, 1  # places of the two terms


def dino_pieces(target: Target, local_crops: int) -> Iterator[Piece]:
    """Pieces over logits rows [global crops 0 and 1, local crops 0 .. L-1] of B images each.

    Both terms share the denominator 2 + 2L: two cross pairs of global views, and 2L pairs of a
    local view with each global view (DINOv2 train/ssl_meta_arch.py). A local view meets the sum of
    both targets at once.
    """
    images = len(target.row) // 2
    weight = 1 / (images * (2 + 2 * local_crops)) if images else 0.0
    for part in slices(images, target.logits.shape[1]):

        def crop(number: int, part: slice = part) -> slice:
            return slice(number * images + part.start, number * images + part.stop)

        first, second = target.probabilities(crop(0)), target.probabilities(crop(1))
        yield Piece(crop(0), second, weight, GLOBAL)
        yield Piece(crop(1), first, weight, GLOBAL)
        if local_crops:
            both = first.add_(second)
            for number in range(local_crops):
                yield Piece(crop(2 + number), both, weight, LOCAL)


def dino_loss(
    logits: Tensor, target: Target, local_crops: int, temperature: float = STUDENT_TEMPERATURE
) -> tuple[Tensor, Tensor]:
    """Global and local term, 0-d fp32, of student logits `[(2 + L) * B, K]` against a target of 2B
    rows.

    global: `sum_b [CE(q_1, s_0) + CE(q_0, s_1)] / B / (2 + 2L)`; local: `sum_l sum_g mean_b CE(q_g,
    s_l) / (2 + 2L)`.
    """
    sums = cross_entropy(logits, lambda: dino_pieces(target, local_crops), 2, temperature)
    return sums[GLOBAL], sums[LOCAL]
