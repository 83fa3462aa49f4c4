"""Pictures of what a model sees in one image: attention, and components of its patches.

S side of the image, h x w patches.
"""

from __future__ import annotations

import numpy as np

from pipeline.embed.embedders import Embedder
from pipeline.errors import PipelineError
from pipeline.images.decode import UInt8Array
from pipeline.images.shown import three_channels

ATTENTION, COMPONENTS = "attention", "components"
LOOKS = (ATTENTION, COMPONENTS)
_DARK = 0.15  # of the light that is left where nothing is attended to


def looks_of(embedder: Embedder) -> tuple[str, ...]:
    """The pictures that a model can draw: none without patches."""
    if embedder.network is None or embedder.patch_size is None:
        return ()
    blank = np.zeros((embedder.size, embedder.size, embedder.channels), np.uint8)
    return tuple(what for what in LOOKS if _draws(embedder, blank, what))


def _draws(embedder: Embedder, image: UInt8Array, what: str) -> bool:
    try:
        drawn(embedder, image, what)
    except PipelineError:
        return False
    return True


def drawn(embedder: Embedder, image: UInt8Array, what: str) -> UInt8Array:
    """A picture [S, S, 3]: the image in the light of its attention, or components as colours.

    Args:
        embedder: with a network.
        image: prepared, [S, S, C].
        what: of `looks_of`.

    Raises:
        PipelineError: the network has no such thing.
    """
    from torch.nn import functional

    from pipeline.evaluate.features import normalise
    from pipeline.use.attention import attention
    from pipeline.use.components import Components
    from pipeline.use.network import patch_maps
    from pipeline.use.pictures import patches

    network = embedder.network
    device = next(network.parameters()).device
    x = normalise(image[None], embedder.mean, embedder.std, device)
    side = (embedder.size, embedder.size)
    if what == ATTENTION:
        mean = attention(network, x).mean(1, keepdim=True)  # over heads: [1, 1, h, w]
        wide = functional.interpolate(mean, side, mode="bilinear")[0, 0]
        light = (wide / wide.max().clamp(min=1e-12)).cpu().numpy()[..., None]
        bright = three_channels(image) * (_DARK + (1 - _DARK) * light)
        return np.asarray(bright.round().clip(0, 255), np.uint8)
    tokens = patch_maps(network, x)
    return patches(Components.fit(tokens).colours(tokens)[0], side)
