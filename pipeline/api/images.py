"""Images to what networks take: crops as a run makes them, the evaluation's pixels and features.

An image is a path, a picture of Pillow, or uint8: a tensor or array `[H, W, C]`, or a tensor
`[C, H, W]`. Several are a list of these, or one tensor with a dimension more. B images, S side in
pixels, C channels, D width.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.embed.embedders import Embedder
from pipeline.embed.forward import own_size
from pipeline.errors import DataError, PipelineError
from pipeline.evaluate import features
from pipeline.images.decode import MAX_PIXELS, BadImage, decode_image
from pipeline.images.value_range import FULL, ValueRange
from pipeline.model.pair import Encoder, Pair
from pipeline.shards.columns import image_id
from pipeline.shards.shard_set import ShardColumns
from pipeline.stream.decoder import StreamSpec, make_chunk
from pipeline.stream.reader import EncodedImages
from pipeline.views.batch import Batch, Views
from pipeline.views.crops import CropSpec, resize_centre_crop
from pipeline.views.masks import MaskSpec
from pipeline.views.photometric import PhotometricSpec

MEAN, STD = PhotometricSpec.mean, PhotometricSpec.std
BATCH = 64  # images that are embedded at once


def multi_crop(
    images: Any,
    crops: CropSpec | None = None,
    colour: PhotometricSpec | None = None,
    *,
    seed: int = 0,
    pass_index: int = 0,
    patch_size: int = 0,
) -> Views:
    """Global and local crops with changed colours, as a run cuts them: a file's crops are those
    that a run with this seed makes of it in this pass.

    Args:
        images: see the top of this file.
        crops: sizes, scales, number of local crops; default: DINOv2's 2 of 224 and 8 of 98 pixels.
        colour: strengths and probabilities, mean and std; default: DINOv2's.
        seed: of all that is drawn.
        pass_index: other crops of the same images.
        patch_size: where it is not 0, masks are drawn too, for patches of so many pixels.

    Returns:
        Normalised float views, crop-major, without masks unless `patch_size` is given.

    Raises:
        DataError: an image cannot be decoded; says which and why.
    """
    crops, colour = crops or CropSpec(), colour or PhotometricSpec()
    encoded = [_encoded(one) for one in _listed(images)]
    if patch_size and crops.global_size % patch_size:
        raise PipelineError(
            f"crops of {crops.global_size} pixels have no whole patches of {patch_size}",
            "give CropSpec(global_size=…) a multiple of patch_size",
        )
    side = crops.global_size // patch_size if patch_size else 1
    count = len(encoded)
    spec = StreamSpec(
        columns=ShardColumns("", "image", "", labels=False),
        seed=seed,
        global_batch=count,
        steps_per_pass=1,
        crops=crops,
        photometric=colour,
        masks=MaskSpec((side, side), 0.5 * bool(patch_size), (0.1, 0.5)),
        chunk=count,
        max_pixels=MAX_PIXELS,
    )
    ids = np.stack([np.frombuffer(bytes.fromhex(image_id(x)), np.uint8) for x in encoded])
    offsets = np.cumsum([0, *map(len, encoded)])
    unknown = np.full(count, -1, np.int64)
    sizes = np.zeros((count, 2), np.int64)  # read from the files
    places = np.arange(count)
    portion = EncodedImages(
        pass_index, places, ids, unknown, sizes, offsets, b"".join(encoded), 0.0, 0
    )
    chunk = make_chunk(portion, 0, count, spec)
    for number in np.flatnonzero(~chunk["valid"]).tolist():
        _decoded(encoded[number], number, crops.channels)  # says why
    batch = Batch.from_chunk(chunk | {"reason": np.full(count, "")})
    views = batch.views(colour)
    return views if patch_size else Views(views.global_views, views.local_views, images=count)


def prepare(
    images: Any,
    image_size: int = 224,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Tensor:
    """The evaluation's pixels: the whole image to a square, its centre, normalised.

    Args:
        images: see the top of this file.
        image_size: S.
        mean: of each channel, for values in 0 to 1.
        std: of each channel.

    Returns:
        float32 `[B, C, S, S]`.

    Raises:
        DataError: an image cannot be decoded; says which and why.
    """
    crops = [
        resize_centre_crop(_decoded(_encoded(one), number, len(mean)), image_size)
        for number, one in enumerate(_listed(images))
    ]
    return features.normalise(np.stack(crops), mean, std)


def embed(
    network: nn.Module | Pair | Embedder,
    images: Any,
    image_size: int | None = None,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Tensor:
    """The CLS features of plain images, as the evaluation computes them: no crops, no gradients.

    Args:
        network: a backbone `[B, C, S, S]` to `[B, D]`; of a pair the teacher's, of an encoder its
            own. An embedder brings S, mean and std itself, and those here are not looked at.
        images: see the top of this file.
        image_size: S; None: what the backbone's position embeddings are for, else 224.
        mean: of each channel, for values in 0 to 1.
        std: of each channel.

    Returns:
        float32 `[B, D]` on the CPU, not of unit length.

    Raises:
        DataError: an image cannot be decoded; says which and why.
    """
    listed = _listed(images)
    if isinstance(network, Embedder):
        return torch.cat([_embedded(network, listed, at) for at in range(0, len(listed), BATCH)])
    encoder = network.teacher if isinstance(network, Pair) else network
    backbone = encoder.backbone if isinstance(encoder, Encoder) else encoder
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    side = image_size or own_size(backbone)

    def batches() -> Iterator[np.ndarray[Any, Any]]:
        for at in range(0, len(listed), BATCH):
            part = enumerate(listed[at : at + BATCH], at)
            pixels = [_decoded(_encoded(one), number, len(mean)) for number, one in part]
            yield np.stack([resize_centre_crop(x, side) for x in pixels])

    return features.embed(backbone, batches(), mean, std, device)


def _embedded(embedder: Embedder, images: list[Any], first: int) -> Tensor:
    prepared = [
        embedder.prepare(
            _decoded(_encoded(one), number, embedder.channels, embedder.spec.value_range)
        )
        for number, one in enumerate(images[first : first + BATCH], first)
    ]
    return torch.from_numpy(embedder.outputs(prepared)["cls"])


def _listed(images: Any) -> list[Any]:
    """One list, whatever was given."""
    if isinstance(images, str | Path | Image.Image) or getattr(images, "ndim", 4) == 3:
        return [images]
    listed = list(images)
    if not listed:
        raise PipelineError("no images were given", "give one or more")
    return listed


def _encoded(image: Any) -> bytes:
    """An image as a file of the kinds that `decode_image` reads; of pixels without loss."""
    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise DataError(f"no image at {image}: {error.strerror}", "give a file") from None
    file = io.BytesIO()
    if isinstance(image, Image.Image):
        exif = image.getexif().tobytes() if image.getexif() else b""  # which way up it is
        lossless = image.convert("RGB") if image.mode in ("CMYK", "YCbCr", "HSV", "LAB") else image
        lossless.save(file, "PNG", exif=exif, compress_level=1)
        return file.getvalue()
    pixels = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3:
        kind = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else ""
        raise PipelineError(
            f"an image is {kind or type(image).__name__}, expected a path, a picture of Pillow, "
            "or uint8 [H, W, C] or [C, H, W]",
            "convert it, e.g. (x * 255).round().to(torch.uint8)",
        )
    if isinstance(image, Tensor) and pixels.shape[0] <= 4 < pixels.shape[2]:
        pixels = pixels.transpose(1, 2, 0)
    np.save(file, np.ascontiguousarray(pixels))
    return file.getvalue()


def _decoded(
    encoded: bytes, number: int, channels: int, value_range: ValueRange = FULL
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        return decode_image(encoded, channels, value_range=value_range)
    except BadImage as bad:
        raise DataError(
            f"image {number} is {bad.reason}: {bad.detail}", "leave it out, or mend it"
        ) from None
