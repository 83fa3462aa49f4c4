"""Patches of images of any size, as a map: `[B, h, w, D]`, without CLS and registers.

B images, C channels, H x W pixels, h x w patches, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError, one_line
from pipeline.evaluate.features import inference
from pipeline.model.foreign import TimmBackbone
from pipeline.model.vit import VisionTransformer
from pipeline.views.crops import resized

NO_PATCHES = "the network gives no patches, only one vector an image"
NEEDS_PATCHES = "use a vision transformer: a run of ours, DINOv2 weights, or a ViT of timm"


def patch_maps(network: nn.Module, images: Tensor) -> Tensor:
    """Patch tokens of the last block after the last norm, float32 `[B, h, w, D]`.

    Args:
        network: a `VisionTransformer`, `TimmBackbone`, or another with their `forward_features`.
            Its mode is as before afterwards.
        images: normalised, `[B, C, H, W]`, on the network's device; H and W are multiples of the
            patch size.

    Raises:
        PipelineError: no patches, sides that are no multiples, or a size that it does not take.
    """
    rows, columns = grid_of(network, images)
    with reading(network, images):
        tokens = network.forward_features(images)["x_norm_patchtokens"]  # type: ignore[operator]
    if tokens is None:
        raise PipelineError(NO_PATCHES, NEEDS_PATCHES)
    maps: Tensor = tokens.float().unflatten(1, (rows, columns))
    return maps


def grid_of(network: nn.Module, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches in images `[B, C, H, W]`.

    Raises:
        PipelineError: as `patch_maps`.
    """
    patch = patch_size_of(network)
    height, width = images.shape[-2:]
    if height % patch or width % patch or not height or not width:
        raise PipelineError(
            f"images of {height} x {width} pixels, but the patch size is {patch}",
            f"resize them to multiples of {patch}; pipeline.use.network.fitted does",
        )
    return height // patch, width // patch


def patch_size_of(network: nn.Module) -> int:
    """Side of a patch in pixels.

    Raises:
        PipelineError: the network gives no patches.
    """
    if not getattr(network, "has_patches", hasattr(network, "forward_features")):
        raise PipelineError(NO_PATCHES, NEEDS_PATCHES)
    return int(network.patch_size)  # type: ignore[arg-type]


def takes_any_size(network: nn.Module) -> bool:
    """Whether images may have other sides than those it was built for."""
    if isinstance(network, TimmBackbone):
        return bool(getattr(network.module, "dynamic_img_size", False))
    return isinstance(network, VisionTransformer)


def fitted(pixels: np.ndarray[Any, Any], side: int, patch: int) -> np.ndarray[Any, Any]:
    """The whole image so that patches fit: its shorter side becomes `side`, both sides the nearest
    multiples of the patch. Nothing is cut off or padded; the longer side is stretched by less than
    half a patch.

    Args:
        pixels: uint8 `[H, W, C]`.
        side: pixels.
        patch: pixels.
    """
    rows, columns = fitted_grid(pixels.shape[0], pixels.shape[1], side, patch)
    return resized(pixels, rows * patch, columns * patch)


def fitted_grid(height: int, width: int, side: int, patch: int) -> tuple[int, int]:
    """Rows and columns of patches of what `fitted` makes of an image of so many pixels."""
    scale = side / min(height, width)
    rows, columns = (max(1, round(length * scale / patch)) for length in (height, width))
    return rows, columns


@contextmanager
def reading(network: nn.Module, images: Tensor) -> Iterator[None]:
    """Evaluation mode, float32, no gradients; a size that the network refuses in one sentence."""
    height, width = images.shape[-2:]
    try:
        with inference(network, images.device, torch.float32):
            yield
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (one_line(error) or type(error).__name__)[:200]
        raise PipelineError(
            f"the network does not take {images.shape[1]} channels of {height} x {width} pixels: "
            f"{reason}",
            "use the size that it was built for, and its channels",
        ) from error
