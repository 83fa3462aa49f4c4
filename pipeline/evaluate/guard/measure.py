"""From features and patch tokens to what the guard compares.

Shapes: N images, D width, P patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pipeline.evaluate.deciding import why_unusable
from pipeline.evaluate.features import Images, LabelledFeatures, inference, normalise
from pipeline.evaluate.guard.structure import Structure
from pipeline.evaluate.neighbours.nearest import SameImages, nearest
from pipeline.evaluate.unlabelled import patch_smoothness, rank_me
from pipeline.shards.overlap import labels_of
from pipeline.shards.shards import ShardSet

IMAGES = 1024  # whose neighbours and rank are compared
SMOOTH_IMAGES = 256  # whose patches are
FEWEST = 10  # images for each neighbour: else chance shares too many


def structure_of(
    features: LabelledFeatures, k: int, smoothness: npt.NDArray[np.float64]
) -> Structure:
    """Rank and neighbours of the first `IMAGES` images.

    Args:
        features: [N, D], with ids.
        k: neighbours of an image; fewer where there are fewer than ten images for each.
        smoothness: of the first images, from `smoothness_of`.
    """
    assert features.ids is not None
    ids, few = features.ids[:IMAGES], features.features[:IMAGES].float()
    k = max(1, min(k, (len(ids) - 1) // FEWEST))
    if not bool(torch.isfinite(few).all()) or not bool(few.any()):
        return Structure(ids, np.full((len(ids), k), -1, np.int64), 0.0, smoothness)
    _, rows = nearest(few, few, k, SameImages.of(ids, ids))
    return Structure(ids, rows.cpu().numpy().astype(np.int64), rank_me(few), smoothness)


def unusable_labels(shards: ShardSet) -> str:
    """Why the labels of a set say nothing about a backbone; empty where they do."""
    return why_unusable(torch.from_numpy(labels_of(shards)))


def smoothness_of(
    backbone: nn.Module, batches: Iterable[Images], mean: Sequence[float], std: Sequence[float]
) -> npt.NDArray[np.float64]:
    """Smoothness of the patches of the first `SMOOTH_IMAGES` images, float64 [M]; empty for a
    backbone that gives no tokens, or one token for an image.

    Args:
        backbone: with `forward_features` as a VisionTransformer has it.
        batches: uint8 [b, S, S, C] each.
        mean: of each channel.
        std: of each channel.
    """
    device = next(backbone.parameters()).device
    values: list[npt.NDArray[np.float64]] = []
    images = 0
    with inference(backbone, device, torch.float32):
        for batch in batches:
            part = normalise(batch[: SMOOTH_IMAGES - images], mean, std, device)
            tokens = backbone.forward_features(part)["x_norm_patchtokens"]  # type: ignore[operator]
            if tokens is None or tokens.shape[1] < 2:
                return np.zeros(0)
            side = math.isqrt(tokens.shape[1])
            smoothness = patch_smoothness(tokens.float(), (side, side))
            values.append(smoothness.nan_to_num(0.0).cpu().numpy())
            images += len(part)
            if images >= SMOOTH_IMAGES:
                break
    return np.concatenate(values) if values else np.zeros(0)
