"""Patches of whole images: by a model, or of raw pixels.

A whole image is resized to a square, nothing is cut off. Shapes: B images, S side in pixels, C
channels, h x w patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.card.dense.sets import DenseSet, Sample
from pipeline.embed.embedders import EmbedderSpec, open_embedder
from pipeline.errors import DataError, PipelineError
from pipeline.images.value_range import FULL, ValueRange
from pipeline.views.crops import resized

if TYPE_CHECKING:
    from torch import Tensor

Images = Sequence[npt.NDArray[np.uint8]]
Encode = Callable[[Images], "tuple[Tensor, Tensor]"]


@dataclass(frozen=True)
class Encoder:
    """What makes patches of images, and the images that it takes.

    Attributes:
        encode: B images uint8 [S, S, C] -> patches [B, h, w, D] and CLS [B, D].
        size: S.
        grid: h and w.
        channels: C; 0: that of the set.
        value_range: of images of more than 8 bits.
    """

    encode: Encode
    size: int
    grid: int
    channels: int = 0
    value_range: ValueRange = FULL

    def batches(
        self, dense: DenseSet, rows: Sequence[int], class_ids: Sequence[int], batch: int
    ) -> Iterator[tuple[list[Sample], Tensor, Tensor]]:
        """Decoded samples with their patches and CLS."""
        waiting: list[Sample] = []
        images: list[npt.NDArray[np.uint8]] = []
        for sample in dense.samples(rows, class_ids, self.channels, self.value_range):
            images.append(resized(sample.pixels, self.size, self.size))
            waiting.append(sample)
            if len(waiting) == batch:
                yield waiting, *self.encode(images)
                waiting, images = [], []
        if waiting:
            yield waiting, *self.encode(images)


def model_encoder(
    spec: EmbedderSpec, size: int | None = None, batch_size: int = 32, gpu: bool = False
) -> Encoder:
    """Patches of the last block after its norm.

    Args:
        spec: of the model.
        size: S; None: the model's own.
        batch_size: images at once.
        gpu: compute on a GPU.

    Raises:
        PipelineError: the model gives no patches, or takes no images of this size.
    """
    import torch

    spec = replace(spec, image_size=size or spec.image_size, batch_size=batch_size)
    try:
        embedder = open_embedder(spec, gpu)
    except PipelineError as error:
        if not size:
            raise
        hint = "it is evaluate.dense_size that says the side: give one that the model takes, a"
        raise DataError(error.what, f"{hint} multiple of its patch size") from error
    embedder.outputs([], ("patches",))  # says where there are none

    def encode(images: Images) -> tuple[Tensor, Tensor]:
        outputs = embedder.outputs(images, ("cls", "patches"))
        patches = torch.from_numpy(outputs["patches"])
        return patches.view(len(patches), *embedder.grid, -1), torch.from_numpy(outputs["cls"])

    return Encoder(encode, embedder.size, embedder.grid[0], embedder.channels, spec.value_range)


def pixel_encoder(grid: int) -> Encoder:
    """Raw pixels, `grid` patches a side; the CLS is the mean colour."""
    from pipeline.evaluate.dense.pixels import SIDE, pixel_patches

    return Encoder(partial(pixel_patches, grid=grid), SIDE * grid, grid)
