"""Masks without training: patches that are like those under a reference mask.

B images, R references, H x W pixels, h x w patches, D width, K classes, T patches of references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import PipelineError
from pipeline.use.network import patch_maps

VOID = 255  # pixels of a mask that belong to no class
TEMPERATURE = 0.07  # of the votes of nearest patches, as in the k-NN of DINOv2's evaluation
CELLS = 1 << 26  # cosines of patches with those of the references at once, 256 MiB

Method = Literal["mean", "nearest"]


def similarity(patches: Tensor, reference: Tensor) -> Tensor:
    """Cosine of patches `[…, D]` with a patch `[D]`: `[…]`, from -1 to 1; with `[R, D]`: `[…, R]`.

    A patch of length 0 has the cosine 0 with all.

    Raises:
        PipelineError: another width, or more dimensions.
    """
    if reference.dim() not in (1, 2) or reference.shape[-1:] != patches.shape[-1:]:
        raise PipelineError(
            f"patches {list(patches.shape)} cannot be compared with {list(reference.shape)}",
            "give patches of the same network, [D] or [R, D]",
        )
    others = F.normalize(reference.float(), dim=-1)
    return F.normalize(patches.float(), dim=-1) @ (others.mT if others.dim() > 1 else others)


def segment(
    network: nn.Module,
    images: Tensor,
    references: Tensor,
    masks: Tensor,
    method: Method = "mean",
    k: int = 10,
) -> Tensor:
    """A mask for each image from reference images with masks: int64 `[B, H, W]`.

    A mask of one thing is 1 there and 0 elsewhere: 0 is a class as the others are.

    Args:
        network: as for `patch_maps`.
        images: normalised, `[B, C, H, W]`.
        references: normalised, `[R, C, H', W']`.
        masks: int64 `[R, …]` of any height and width; classes from 0, `VOID` where unknown.
        method: mean: the class whose mean patch is the most like; nearest: vote of the k nearest
            patches of the references.
        k: patches that vote.

    Raises:
        PipelineError: as `patch_maps` and `Reference.of`.
    """
    reference = Reference.of(patch_maps(network, references), masks)
    scores = reference.scores(patch_maps(network, images), method, k)
    return pixel_classes(scores, (images.shape[-2], images.shape[-1]))


@dataclass(frozen=True)
class Reference:
    """Patches whose classes are known.

    Attributes:
        tokens: float32 [T, D], of length 1.
        shares: float32 [T, K], of a patch's pixels that are of each class; the rest is void.
    """

    tokens: Tensor
    shares: Tensor

    @classmethod
    def of(
        cls, maps: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor], classes: int = 0
    ) -> Reference:
        """From maps `[R, h, w, D]` and masks int64 `[R, H, W]`, or sequences of one an image.

        Args:
            maps: patches of the reference images.
            masks: classes from 0, or `VOID`; of any height and width.
            classes: K; default: the highest class of the masks, and 1.

        Raises:
            PipelineError: another number of masks than of images, a class that is in no mask, or
                one class only.
        """
        if len(maps) != len(masks):
            raise PipelineError(
                f"{len(masks)} masks for {len(maps)} reference images", "give one mask an image"
            )
        known = torch.cat([mask[mask != VOID] for mask in masks])
        if not len(known):
            raise PipelineError(
                "the reference mask is empty: all its pixels are void",
                f"pixels with the id {VOID} belong to no class",
            )
        classes = classes or 1 + int(known.max())
        shares = torch.cat(
            [
                class_shares(mask, (one.shape[0], one.shape[1]), classes)
                .to(one.device)
                .flatten(0, 1)
                for one, mask in zip(maps, masks, strict=True)
            ]
        )
        absent = (shares.sum(0) == 0).nonzero().flatten().tolist()
        if absent or classes < 2:
            what = f"class {absent[0]} is in no reference mask" if absent else "masks of one class"
            raise PipelineError(
                what, "each class, and what is around an object, needs pixels of a reference mask"
            )
        tokens = torch.cat([one.flatten(0, 1) for one in maps]).float()
        of_any = shares.sum(1) > 0
        return cls(F.normalize(tokens[of_any], dim=1), shares[of_any])

    def means(self) -> Tensor:
        """The mean patch of each class, [K, D] of length 1; patches weigh by their share of it."""
        return F.normalize(self.shares.T @ self.tokens, dim=1)

    def scores(
        self,
        patches: Tensor,
        method: Method = "mean",
        k: int = 10,
        temperature: float = TEMPERATURE,
    ) -> Tensor:
        """How much patches `[…, D]` are of each class, `[…, K]`; see `segment`."""
        if method == "mean":
            return similarity(patches, self.means())
        k = min(k, len(self.tokens))
        return self._votes(F.normalize(patches.float(), dim=-1), k, temperature)

    def _votes(self, patches: Tensor, k: int, temperature: float) -> Tensor:
        votes = []
        for part in torch.split(patches.flatten(0, -2), max(1, CELLS // len(self.tokens))):
            cosines, nearest = (part @ self.tokens.T).topk(k, dim=1)
            weights = torch.softmax(cosines / temperature, 1)
            votes.append((weights[:, None] @ self.shares[nearest])[:, 0])
        return torch.cat(votes).view(*patches.shape[:-1], -1)


def class_shares(mask: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """The share of each class among the pixels of each patch, float32 `[h, w, K]`.

    Args:
        mask: int64 `[H, W]`; where patches do not divide it, their pixels overlap by one.
        grid: (h, w).
        classes: K.
    """
    each = [F.adaptive_avg_pool2d((mask == one)[None].float(), grid)[0] for one in range(classes)]
    return torch.stack(each, -1)


def upsampled(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores of patches `[B, h, w, K]` for each pixel, bilinear: `[B, K, H, W]`."""
    return F.interpolate(scores.permute(0, 3, 1, 2), size=size, mode="bilinear")


def pixel_classes(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The class with the highest score at each pixel, from scores of patches `[B, h, w, K]`:
    int64 `[B, H, W]`. Class by class, so that large images take the memory of one.
    """
    best = upsampled(scores[..., :1], size)[:, 0]
    classes = torch.zeros_like(best, dtype=torch.int64)
    for one in range(1, scores.shape[-1]):
        score = upsampled(scores[..., one : one + 1], size)[:, 0]
        classes[score > best] = one
        best = torch.maximum(best, score)
    return classes


def patch_at(x: int, y: int, size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the patch at pixel (x, y) of an image.

    Args:
        x: pixels from the left.
        y: pixels from the top.
        size: (H, W) of the image that the pixel is of.
        grid: (h, w).

    Raises:
        PipelineError: the pixel lies outside.
    """
    height, width = size
    if not (0 <= x < width and 0 <= y < height):
        raise PipelineError(
            f"pixel {x},{y} of an image of {width} x {height} pixels",
            f"x is 0 to {width - 1} from the left, y is 0 to {height - 1} from the top",
        )
    return y * grid[0] // height, x * grid[1] // width
