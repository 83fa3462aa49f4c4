"""All that is asked of one look at images: attention, components, similarity, masks.

h x w patches, which differ from image to image; C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipeline.errors import DataError
from pipeline.evaluate.features import normalise
from pipeline.images.shown import Pixels
from pipeline.use.attention import attention, block_of, without_attention
from pipeline.use.components import Components
from pipeline.use.network import (
    fitted,
    fitted_grid,
    patch_maps,
    patch_size_of,
    takes_any_size,
)
from pipeline.use.segment import Method, Reference, patch_at, similarity
from pipeline.views.crops import resized

MOST_PATCHES = 16_384  # of an image, 128 x 128: time and memory of attention grow with the square


@dataclass(frozen=True)
class Question:
    """What to look for.

    Attributes:
        image_size: shorter side of images as the network gets them, pixels.
        mean: of each channel, for values in 0 to 1.
        std: of each channel.
        block: whose attention is shown; -1 is the last.
        mark: pixel (x, y) of the first image whose patch all patches are compared with.
        references: images uint8 [H, W, C] with masks int64 [H, W].
        classes: K of the masks.
        method: see `segment`.
        k: likewise.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    block: int = -1
    mark: tuple[int, int] | None = None
    references: tuple[tuple[Pixels, npt.NDArray[np.int64]], ...] = ()
    classes: int = 0
    method: Method = "mean"
    k: int = 10


@dataclass(frozen=True)
class Seen:
    """What was seen in each image; lists are empty where it was not asked for, or not there.

    Attributes:
        attention: [heads, h, w] of each image.
        no_attention: why there is none.
        colours: [h, w, 3] of each image, of components that all share.
        shares: of the variance of the object's patches, by component.
        foreground: share of all patches that are of the object.
        marked: (row, column) of the marked patch.
        similarity: [h, w] of each image, with the marked patch.
        scores: [h, w, K] of each image.
    """

    colours: list[Tensor]
    shares: tuple[float, ...]
    foreground: float
    attention: list[Tensor] = field(default_factory=list)
    no_attention: str = ""
    marked: tuple[int, int] | None = None
    similarity: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)


def check(
    network: nn.Module,
    question: Question,
    images: Sequence[tuple[str, int, int]],
    references: Sequence[tuple[str, int, int]] = (),
) -> None:
    """Refuses what `look` could not answer, from the sizes of images alone.

    Args:
        network: whose patches, blocks and sizes count.
        question: what is asked.
        images: name, H and W of each.
        references: likewise.

    Raises:
        PipelineError: what is wrong, as `look`; also an image of more than MOST_PATCHES patches.
    """
    side, patch, free = question.image_size, patch_size_of(network), takes_any_size(network)
    for name, height, width in (*images, *references):
        rows, columns = fitted_grid(height, width, side, patch)
        if not free:
            rows = columns = side // patch
        if rows * columns > MOST_PATCHES:
            raise DataError(
                f"{name} of {width} x {height} pixels becomes {columns:,} x {rows:,} patches, at "
                f"most {MOST_PATCHES:,} are looked at",
                f"give a look.image_size below {side}, or cut the image",
            )
    if not free:
        blank = torch.zeros(1, len(question.mean), side, side)
        patch_maps(network, blank.to(next(network.parameters()).device))  # says what it takes
    if not without_attention(network):
        block_of(network, question.block)
    if question.mark is not None:
        _, height, width = images[0]
        patch_at(*question.mark, (height, width), fitted_grid(height, width, side, patch))


def look(network: nn.Module, images: Iterable[Pixels], question: Question) -> Seen:
    """Looks at images uint8 [H, W, C] of any sizes, in one pass over them; kept is of each what the
    network takes and gives.

    Raises:
        PipelineError: the network has no patches, or does not take the size; the mark lies
            outside; the block is not there.
    """
    inputs, sizes = [], []
    for pixels in images:
        inputs.append(_input(network, pixels, question))
        sizes.append((pixels.shape[0], pixels.shape[1]))
    maps = [patch_maps(network, x)[0] for x in inputs]
    shared = Components.fit(maps, min(3, maps[0].shape[-1]))
    in_object = torch.cat([shared.foreground(one).flatten() for one in maps])
    seen: dict[str, Any] = {}
    if reason := without_attention(network):
        seen["no_attention"] = reason
    else:
        seen["attention"] = [attention(network, x, question.block)[0].cpu() for x in inputs]
    if question.mark is not None:
        at = patch_at(*question.mark, sizes[0], (maps[0].shape[0], maps[0].shape[1]))
        seen["marked"] = at
        seen["similarity"] = [similarity(one, maps[0][at]).cpu() for one in maps]
    if question.references:
        known = [
            patch_maps(network, _input(network, pixels, question))[0]
            for pixels, _ in question.references
        ]
        masks = [torch.from_numpy(mask) for _, mask in question.references]
        reference = Reference.of(known, masks, question.classes)
        seen["scores"] = [reference.scores(one, question.method, question.k).cpu() for one in maps]
    return Seen(
        colours=[shared.colours(one).cpu() for one in maps],
        shares=tuple(shared.share.tolist()),
        foreground=float(in_object.float().mean()),
        **seen,
    )


def _input(network: nn.Module, pixels: Pixels, question: Question) -> Tensor:
    """The whole image as the network takes it, [1, C, …]: in its proportions where any size is
    taken, else squeezed to a square.
    """
    side, patch = question.image_size, patch_size_of(network)
    if takes_any_size(network):
        prepared = fitted(pixels, side, patch)
    else:
        prepared = resized(pixels, side, side)
    device = next(network.parameters()).device
    return normalise(prepared[None], question.mean, question.std, device)
