"""Principal components of patches as colours, shared by images: like parts get like colours.

As in the DINOv2 paper (figure 1, and its "PCA of patch features"): a first analysis over all
patches of all images, whose first component is thresholded to tell the object from what is around
it; then a second one over the patches of the object alone, whose first three components are red,
green and blue.

Conventions, where the paper is silent. The threshold is 0, the mean of all patches. The sign of the
first component is such that the patches at the images' borders are lower on the mean than those
inside: an object is rather in the middle. Any other component has the sign of its largest loading.
A colour goes from the 2nd to the 98th percentile of the object's patches.

h x w patches, T patches of all images, D width, n components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import PipelineError
from pipeline.evaluate.pictures import principal_directions

PERCENTILES = (0.02, 0.98)


def components(patches: Tensor, n: int = 3) -> tuple[Tensor, Tensor]:
    """Components that all images share: scores `[B, h, w, n]`, and bool `[B, h, w]`, the object.

    Args:
        patches: `[B, h, w, D]`.
        n: components, at most D.

    Raises:
        PipelineError: no patches, or more components than D.
    """
    fitted = Components.fit(patches, n)
    return fitted.scores(patches), fitted.foreground(patches)


@dataclass(frozen=True)
class Components:
    """Two analyses that were fitted to images, to be applied to these and to others.

    Attributes:
        centre: float64 [D], mean of all patches.
        first: float64 [D], direction whose positive side is the object.
        mean: float64 [D], of the object's patches.
        directions: float64 [D, n], of the object's patches, strongest first.
        low: float64 [n], score that is colour 0.
        high: float64 [n], score that is colour 1.
        share: float64 [n], of the variance of the object's patches.
    """

    centre: Tensor
    first: Tensor
    mean: Tensor
    directions: Tensor
    low: Tensor
    high: Tensor
    share: Tensor

    @classmethod
    def fit(cls, maps: Tensor | Sequence[Tensor], n: int = 3) -> Components:
        """Fits maps `[h, w, D]` of images whose sizes may differ, or `[B, h, w, D]`.

        Raises:
            PipelineError: no patches, or more components than D.
        """
        if not len(maps) or not 1 <= n <= maps[0].shape[-1]:
            width = maps[0].shape[-1] if len(maps) else 0
            raise PipelineError(
                f"{n} components of {len(maps)} images with patches of width {width}",
                "give at least one image, and ask for 1 to that many components",
            )
        tokens = torch.cat([one.flatten(0, 1) for one in maps]).double()
        border = torch.cat([_border(*one.shape[:2]) for one in maps]).to(tokens.device)
        centre = tokens.mean(0)
        first = principal_directions(tokens - centre, 1)[0][:, 0]
        scores = (tokens - centre) @ first
        if 0 < border.sum() < len(border) and scores[border].mean() > scores[~border].mean():
            first, scores = -first, -scores
        kept = tokens[scores > 0] if bool((scores > 0).any()) else tokens
        mean = kept.mean(0)
        directions, variances = principal_directions(kept - mean, n)
        inside = (kept - mean) @ directions
        low, high = inside.quantile(inside.new_tensor(PERCENTILES), dim=0)
        total = variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
        return cls(centre, first, mean, directions, low, high, variances[:n] / total)

    def foreground(self, patches: Tensor) -> Tensor:
        """Whether patches `[…, D]` belong to the object: bool `[…]`."""
        return (patches.double() - self.centre) @ self.first > 0

    def scores(self, patches: Tensor) -> Tensor:
        """Scores of patches `[…, D]` on the object's components, float32 `[…, n]`."""
        return ((patches.double() - self.mean) @ self.directions).float()

    def colours(self, patches: Tensor) -> Tensor:
        """The first three components as colours from 0 to 1, float32 `[…, 3]`; black outside the
        object, half in components that do not vary.
        """
        scores = self.scores(patches).double()
        span = self.high - self.low
        varies = span > 1e-9 * self.mean.abs().amax().clamp(min=1e-30)
        scaled = (scores - self.low) / torch.where(varies, span, 1.0)
        shown = torch.where(varies, scaled, 0.5).clamp(0, 1)[..., :3]
        shown = F.pad(shown, (0, 3 - shown.shape[-1]), value=0.5)
        return (shown * self.foreground(patches)[..., None]).float()


def _border(rows: int, columns: int) -> Tensor:
    """Which patches of a map lie at its border, bool [h * w]."""
    border = torch.ones(rows, columns, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    return border.flatten()
