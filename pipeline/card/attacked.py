"""Images of a sample and attacked copies of them, decoded once and given to a model.

Shapes: n images, A copies of each, H and W sides, C channels, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.card.sample import Sample
from pipeline.curate.threshold.attacks import attacked_copies
from pipeline.embed.embedders import Embedder
from pipeline.embed.ids import Ids
from pipeline.embed.image_reader import ImageReader
from pipeline.evaluate.unlabelled import patch_smoothness
from pipeline.images.bad_image import BadImage
from pipeline.images.decode import MAX_PIXELS, decode_image
from pipeline.shards.shard_set import ShardSet

CHUNK = 32  # images whose copies are in memory at once
PATCHES_AT_ONCE = 1 << 23  # numbers, 64 MiB in float64

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Vectors = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a sample.

    Attributes:
        outputs: of each attacked copy; none: no copies are made.
        smoothness: of the patches of each image.
        max_pixels: larger images are refused.
        device: where smoothness is computed.
    """

    outputs: tuple[str, ...] = ("cls",)
    smoothness: bool = True
    max_pixels: int = MAX_PIXELS
    device: str = "cpu"


@dataclass(frozen=True)
class Attacked:
    """What a model gives of a sample.

    Attributes:
        kept: int64 [n], numbers of the images in the sample that could be decoded, rising.
        copies: of each wanted output float32 [n, A, D].
        smoothness: float64 [n], `patch_smoothness` of each; None where there are no patches.
        bad: images that could not be decoded.
    """

    kept: npt.NDArray[np.int64]
    copies: dict[str, Vectors]
    smoothness: npt.NDArray[np.float64] | None
    bad: int


def attacked(embedder: Embedder, shards: ShardSet, sample: Sample, wanted: Wanted) -> Attacked:
    """Decodes the images of a sample, attacks them, and embeds what is wanted.

    Raises:
        PipelineError: a shard cannot be read, or the model has not such outputs.
    """
    smooth = wanted.smoothness and embedder.grid[0] * embedder.grid[1] > 1
    kept: list[int] = []
    copies: dict[str, list[Vectors]] = {name: [] for name in wanted.outputs}
    smoothness: list[Vectors] = []
    for numbers, images in _chunks(embedder, shards, sample, wanted.max_pixels):
        kept += numbers
        if wanted.outputs:
            inputs = [
                embedder.prepare(copy)
                for number, pixels in zip(numbers, images, strict=True)
                for copy in copies_of(pixels, bytes.fromhex(sample.ids[number].decode()))
            ]
            vectors = embedder.outputs(inputs, wanted.outputs)
            for name in wanted.outputs:
                copies[name].append(vectors[name].reshape(len(numbers), -1, vectors[name].shape[1]))
        if smooth:
            prepared = [embedder.prepare(pixels) for pixels in images]
            patches = embedder.outputs(prepared, ("patches",))["patches"]
            smoothness.append(_smoothness(patches, embedder.grid, wanted.device))
    order = np.argsort(kept)
    return Attacked(
        np.array(kept, np.int64)[order],
        {name: np.concatenate(parts)[order] for name, parts in copies.items() if parts},
        np.concatenate(smoothness)[order] if smoothness else None,
        len(sample) - len(kept),
    )


def copies_of(pixels: Pixels, image_id: bytes) -> list[Pixels]:
    """The nine attacked copies of an image, uint8 [h, w, C], in the order of `attacks.ATTACKS`.

    Attacks are of three channels, so other numbers of channels are attacked three by three, each
    in the same way, and the last one again where some lack.

    Args:
        pixels: uint8 [H, W, C].
        image_id: 16 bytes; it alone decides the strengths.
    """
    channels = pixels.shape[2]
    threes = [
        np.ascontiguousarray(pixels[..., np.minimum(np.arange(at, at + 3), channels - 1)])
        for at in range(0, channels, 3)
    ]
    each = [attacked_copies(three, image_id)[1:] for three in threes]
    return [np.concatenate(parts, 2)[..., :channels] for parts in zip(*each, strict=True)]


def _chunks(
    embedder: Embedder, shards: ShardSet, sample: Sample, max_pixels: int
) -> Iterator[tuple[list[int], list[Pixels]]]:
    """Decoded images with their numbers in the sample, in the order of the shards."""
    reader = ImageReader(shards, Ids(sample.ids), sample.places)
    columns = shards.columns
    numbers: list[int] = []
    images: list[Pixels] = []
    for number in np.argsort(sample.places).tolist():
        encoded = reader[sample.ids[number].decode()]
        try:
            images.append(decode_image(encoded, embedder.channels, max_pixels, columns.value_range))
        except BadImage:  # it was good when its vector was made
            continue
        numbers.append(number)
        if len(numbers) == CHUNK:
            yield numbers, images
            numbers, images = [], []
    if numbers:
        yield numbers, images


def _smoothness(patches: Vectors, grid: Sequence[int], device: str) -> npt.NDArray[np.float64]:
    """`patch_smoothness` of float16 [n, P, D], a few images at a time."""
    import torch

    at_once = max(1, PATCHES_AT_ONCE // patches[0].size)
    parts = [torch.from_numpy(patches[at : at + at_once]) for at in range(0, len(patches), at_once)]
    values = [patch_smoothness(part.to(device), grid).cpu() for part in parts]
    return np.asarray(torch.cat(values).numpy())
