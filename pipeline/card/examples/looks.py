"""What a network saw before its training and sees after it: components and attention, side by side.

Images are those that an evaluation gives the networks: squares of S pixels, h x w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from pipeline.embed.embedders import BACKBONE, Embedder, EmbedderSpec, open_embedder
from pipeline.errors import PipelineError
from pipeline.evaluate.features import normalise
from pipeline.evaluate.pictures import token_colours
from pipeline.images.bad_image import BadImage
from pipeline.images.decode import decode_image
from pipeline.images.shown import Pixels, png, three_channels
from pipeline.use import pictures
from pipeline.use.attention import attention, without_attention

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 128  # pixels of a picture

Pair = tuple[bytes, bytes]


@dataclass(frozen=True)
class Looks:
    """Pictures as PNG, `SIDE` x `SIDE`, of each image.

    Attributes:
        images: as the network gets them.
        pictures: by "components" and "attention": before, after.
        remark: why there are none, or no attention; "" where all is there.
    """

    images: tuple[bytes, ...] = field(default=(), repr=False)
    pictures: tuple[dict[str, Pair], ...] = field(default=(), repr=False)
    remark: str = ""


@dataclass(frozen=True)
class _Seen:
    """Prepared images uint8 [n, S, S, C], colours of patches [n, h, w, 3], attention [n, h, w]."""

    images: Pixels
    colours: Tensor
    attention: Tensor | None
    remark: str


def looks_of(
    before: EmbedderSpec,
    after: EmbedderSpec,
    images: Sequence[bytes],
    max_pixels: int,
    gpu: bool = False,
) -> Looks:
    """Pictures of encoded images.

    Args:
        before: the network as its training began.
        after: the network that was trained.
        images: encoded.
        max_pixels: of an image that is decoded.
        gpu: whether a GPU may be used.
    """
    if after.kind != BACKBONE:
        return Looks(remark=f"{after.name} gives vectors only, so there are no patches to show")
    try:
        decoded = [
            decode_image(one, len(after.mean), max_pixels, after.value_range) for one in images
        ]
        was, now = (_seen(spec, decoded, gpu) for spec in (before, after))
    except BadImage as error:
        return Looks(remark=error.detail)
    except PipelineError as error:  # a network without patches
        return Looks(remark=error.what)
    drawn = []
    for n in range(len(decoded)):
        kinds = {"components": (_squares(was.colours[n]), _squares(now.colours[n]))}
        if was.attention is not None and now.attention is not None:
            kinds["attention"] = _heats(now.images[n], was.attention[n], now.attention[n])
        drawn.append(kinds)
    shown = tuple(png(_shown(now.images[n])) for n in range(len(decoded)))
    return Looks(shown, tuple(drawn), now.remark)


def _seen(spec: EmbedderSpec, decoded: Sequence[Pixels], gpu: bool) -> _Seen:
    import torch

    embedder = open_embedder(replace(spec, half=False), gpu=gpu)
    images = np.stack([embedder.prepare(one) for one in decoded])
    tokens = torch.from_numpy(embedder.outputs(images, ("patches",))["patches"]).float()
    colours = token_colours(tokens).reshape(len(tokens), *embedder.grid, 3)
    remark = without_attention(embedder.network)
    return _Seen(images, colours, None if remark else _attention(embedder, images), remark)


def _attention(embedder: Embedder, images: Pixels) -> Tensor:
    """Of the CLS token to the patches, the mean of the heads of the last block, [n, h, w]."""
    device = next(embedder.network.parameters()).device
    x = normalise(images, embedder.mean, embedder.std, device)
    return attention(embedder.network, x).mean(1).cpu()


def _squares(colours: Tensor) -> bytes:
    return png(pictures.patches(colours, (SIDE, SIDE)))


def _heats(image: Pixels, before: Tensor, after: Tensor) -> Pair:
    """Both on one scale, so that an even map stays even."""
    low = min(float(one.min()) for one in (before, after))
    high = max(float(one.max()) for one in (before, after))
    first, second = (pictures.heat(_shown(image), one, (low, high)) for one in (before, after))
    return png(first), png(second)


def _shown(pixels: Pixels) -> Pixels:
    return pictures.resized(three_channels(pixels), (SIDE, SIDE))
