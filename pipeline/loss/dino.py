"""DINO: CLS tokens of the student predict the teacher's CLS targets of the other global views.

Crop-major rows: crop c of image i is row c * B + i. B images, G global and L local crops, K
prototypes.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.loss.form import Kernels
from pipeline.loss.prototypes import STUDENT_TEMPERATURE, Span, check_rows, cross_entropy
from pipeline.loss.target import Target

GLOBAL, LOCAL = 0, 1  # places of the two terms


def dino_span(target: Target, local_crops: int, global_crops: int = 2) -> Span:
    """Logits rows [global crops 0 .. G-1, local crops 0 .. L-1] of B images each.

    Both terms share the number of pairs as their denominator: G (G - 1) pairs of two global views,
    and G L of a local view with a global one, 2 + 2L in DINOv2 (train/ssl_meta_arch.py). All rows
    of an image have one weight in the target; the mean is over the images that count.
    """
    images = len(target.row) // global_crops
    pairs = global_crops * (global_crops - 1 + local_crops)
    weight = target.weights()[:images]
    terms = (GLOBAL,) * global_crops + (LOCAL,) * local_crops
    return Span(target, weight / (weight.sum().clamp(min=1) * pairs), terms, others=True)


def dino_loss(
    logits: Tensor,
    target: Target,
    local_crops: int,
    temperature: float = STUDENT_TEMPERATURE,
    global_crops: int = 2,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Tensor]:
    """Global and local term, 0-d fp32, of student logits `[(G + L) * B, K]` against a target of
    G * B rows.

    With `pairs = G (G - 1) + G L`, the global term is `sum_g sum_(h != g) mean_b CE(q_h, s_g) /
    pairs`, the local one `sum_l sum_g mean_b CE(q_g, s_l) / pairs`.

    Raises:
        PipelineError: the shapes do not fit each other.
    """
    images, left = divmod(len(target.row), global_crops) if global_crops > 1 else (0, 1)
    if left or local_crops < 0:
        raise PipelineError(
            f"a target of {len(target.row)} rows for {global_crops} global and {local_crops} local "
            "crops an image",
            "give the target G * B rows for G >= 2 global crops (global_crops=G) of B images",
        )
    check_rows("dino_loss", logits, target, images * (global_crops + local_crops))
    span = dino_span(target, local_crops, global_crops)
    sums = cross_entropy(logits, [span], 2, temperature, kernels=kernels)
    return sums[GLOBAL], sums[LOCAL]
