"""What turns images into vectors, opened in one place, described so that tasks can open it too.

`embedder_of` says what a name means, `open_embedder` loads it, and the `Embedder` prepares images
and gives their CLS vector, the mean of their patches, the patches, or the CLS of the last blocks;
and beside them `pixels` and `colours`, which every model is measured against.

Shapes: B images, S side in pixels, C channels, P patches, D width, n blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.embed import load
from pipeline.embed.forward import (
    Images,
    Run,
    Unmodelled,
    check_channels,
    check_outputs,
    described,
    dtype_of,
    one_by_one,
    own_size,
    shape_of,
    tokens,
    with_mean,
)
from pipeline.embed.onnx.embedder import OnnxModel
from pipeline.embed.onnx.files import files_of, is_onnx, on_this_node
from pipeline.errors import DataError, one_line
from pipeline.images.preprocessing import Preprocessing
from pipeline.images.shown import three_channels
from pipeline.images.value_range import FULL, ValueRange
from pipeline.storage.places import absolute_uri, exists, resolve_uri
from pipeline.storage.run_folder import fingerprint
from pipeline.uri import is_uri, join, public

DESCRIPTOR, BACKBONE, ONNX = "descriptor", "backbone", "onnx"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
BLOCKS = 4  # of the last blocks: what linear evaluation takes of a ViT (DINOv2 `eval/linear.py`)

Vectors = np.ndarray[Any, Any]


@dataclass(frozen=True)
class EmbedderSpec:
    """An embedder as tasks receive it; small, pickled.

    Attributes:
        kind: DESCRIPTOR, BACKBONE or ONNX.
        name: for messages, and to open it again: a path or URI, `timm:<name>` or `descriptor`.
        digest: changes with the weights; results are kept under it.
        load: of a backbone: gives a module [B, C, S, S] -> [B, D]. A function of a module (or a
            partial of one), so that it can be pickled.
        path: of an ONNX model, that all nodes reach; or its URI.
        image_size: side of the images; None: the model's own.
        mean: of each channel, for values in 0 to 1.
        std: of each channel.
        batch_size: images at once.
        half: backbones compute in bfloat16.
        value_range: that the images of its training were decoded with.
    """

    kind: str = DESCRIPTOR
    name: str = DESCRIPTOR
    digest: str = ""
    load: Callable[[], Any] | None = None
    path: str = ""
    image_size: int | None = None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    batch_size: int = 64
    half: bool = False
    value_range: ValueRange = FULL

    @property
    def identity(self) -> list[Any]:
        """What must be equal for vectors to be compared, as JSON reads it back."""
        deep = [] if self.value_range == FULL else [list(self.value_range)]
        return [self.kind, self.digest, self.image_size, list(self.mean), list(self.std), *deep]

    @property
    def settings(self) -> list[Any]:
        """What vectors depend on, JSON-like: part of a step's key."""
        return [*self.identity, self.batch_size, self.half]

    @property
    def key(self) -> str:
        """The same as one text: where the model is read from changes no vector."""
        return fingerprint(self.settings)


def embedder_of(
    model: str,
    *,
    image_size: int | None = None,
    batch_size: int = 64,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    half: bool = False,
    folder: str = "runs",
) -> EmbedderSpec:
    """The embedder that a name means.

    Args:
        model: a run's folder, its name in `folder`, or a checkpoint of one (the teacher of its
            chosen checkpoint); a file or folder of weights in one of the three formats;
            `timm:<name>`; a file in ONNX; or `descriptor`. A run and ONNX may be at a URI.
        image_size: default: the model's own.
        batch_size: images at once.
        mean: of each channel, where the model does not say its own; default: ImageNet's.
        std: likewise.
        half: compute in bfloat16.
        folder: where runs are looked for by their name.

    Raises:
        PipelineError: there is nothing of that kind; says which models are at hand.
    """
    if model == DESCRIPTOR:
        from pipeline.curate.images import descriptor

        return EmbedderSpec(digest=str(descriptor.VERSION))
    opened: Callable[[], Any] | None
    usual = Preprocessing(None, tuple(mean or MEAN), tuple(std or STD))
    if model.startswith(load.TIMM):
        name = model.removeprefix(load.TIMM)
        digest, known = load.timm_facts(name)
        opened, kind, path = partial(load.load_timm, name), BACKBONE, ""
    elif is_onnx(model):
        path = absolute_uri(model)
        files = files_of(path)
        digest = files.digest
        known = Preprocessing(None, files.mean, files.std, files.value_range)
        opened, kind, model = None, ONNX, path
    else:
        model = absolute_model(model, folder)
        opened, digest, known = load.known_run(model) or load.known_weights(model, folder)
        kind, path = BACKBONE, ""
    return EmbedderSpec(
        kind,
        name=public(model),
        digest=digest,
        load=opened,
        path=path,
        image_size=image_size or known.image_size,
        mean=known.mean or usual.mean,
        std=known.std or usual.std,
        batch_size=batch_size,
        half=half,
        value_range=known.value_range,
    )


def absolute_model(model: str, folder: str = "runs") -> str:
    """What `embedder_of` takes, as it can be given to a process of another folder: a path in full,
    and the folder of a run for its name.
    """
    if model == DESCRIPTOR or model.startswith(load.TIMM):
        return model
    if not is_uri(model) and not Path(model).exists() and not Path(model).is_absolute():
        named = str(join(folder, model))
        if exists(*resolve_uri(named)):
            return absolute_uri(named)
    return absolute_uri(model)


class Embedder:
    """An opened model: prepares images and gives their vectors.

    Attributes:
        spec: what it was opened from.
        dim: D, width of its vectors.
        size: S, side of the images that it takes, pixels.
        channels: C of these images.
        patch_size: side of a patch in pixels; None: it has no patch tokens.
        registers: tokens between CLS and the patches.
        network: the torch module on its device; None for ONNX and the descriptor.
        mean: of each channel, for values in 0 to 1.
        std: of each channel.
    """

    def __init__(self, spec: EmbedderSpec, gpu: bool = False, threads: int = 1) -> None:
        self.spec, self.mean, self.std = spec, spec.mean, spec.std
        self.channels = len(spec.mean)
        self.patch_size: int | None = None
        self.registers = 0
        self.network: Any = None
        self._gpu = gpu
        self._run: Run = self._forward
        if spec.kind == DESCRIPTOR:
            from pipeline.curate.images import descriptor

            self._run = one_by_one(described)
            self.dim, self.size = descriptor.DIM, 2 * descriptor.SIDE
            return
        if spec.kind == ONNX:
            path = on_this_node(spec.path, spec.digest)
            sizes = (spec.image_size, spec.mean, spec.std)
            model = OnnxModel(path, *sizes, threads=threads, gpu=gpu, name=spec.name)
            self._run = one_by_one(lambda images: with_mean(model.outputs(images)))
            self.patch_size = model.patch_size
            self.mean, self.std = model.signature.mean, model.signature.std
            self.channels = len(self.mean)
            self.size, self.dim = model.signature.size, model.dim
            return
        if spec.load is None:
            raise DataError(f"embedder {spec.name} has nothing to load", "give weights or a model")
        import torch

        torch.set_num_threads(threads)
        self._device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
        self._dtype = torch.bfloat16 if spec.half else torch.float32
        self.network = network = spec.load().to(self._device).eval()
        check_channels(network, spec.name, self.channels)
        if getattr(network, "has_patches", False):
            self.patch_size = int(network.patch_size)
        prefix = int(getattr(network, "prefix_tokens", 1))
        self.registers = int(getattr(network, "registers", max(0, prefix - 1)))
        self.size = spec.image_size or own_size(network)
        blank = np.zeros((self.size, self.size, self.channels), np.uint8)
        try:
            self.dim = self.outputs([blank])["cls"].shape[1]
        except (AssertionError, ValueError) as error:  # of timm
            raise DataError(
                f"{spec.name} takes no images of {self.size} x {self.size} pixels: "
                f"{one_line(error)}",
                "leave image_size out, or give one that it takes",
            ) from error

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches of an image; (0, 0) without patch tokens."""
        side = self.size // self.patch_size if self.patch_size else 0
        return side, side

    def prepare(self, pixels: Images) -> Images:
        """A decoded image [H, W, C] as [S, S, C]: the evaluation's resize and centre crop; for the
        descriptor its small grey image, [S, S, 1].
        """
        return prepared(self.spec.kind, self.size, pixels)

    def outputs(
        self,
        images: Sequence[Images] | Images,
        want: Sequence[str] = ("cls",),
        blocks: int = BLOCKS,
    ) -> dict[str, Vectors]:
        """What the model says of prepared images, as it gives it: not of unit length.

        Args:
            images: B of them, uint8 [S, S, C]; taken `batch_size` at a time.
            want: of `forward.OUTPUTS`.
            blocks: n.

        Returns:
            `cls` float32 [B, D]; `mean` float32 [B, D], of the patch tokens; `patches` float16
            [B, P, D]; `blocks` float32 [B, n, D], the normed CLS of the last n blocks, the last
            one last; `pixels` and `colours` float32, as `evaluate/baselines.py` says.

        Raises:
            DataError: the model has no such output, or gives values that are no numbers.
        """
        check_outputs(self, want, blocks)
        if not len(images):
            facts = (self.dim, self.grid, blocks, self.channels)
            shapes = {name: shape_of(name, *facts) for name in want}
            return {name: np.zeros((0, *shape), dtype_of(name)) for name, shape in shapes.items()}
        size = self.spec.batch_size
        batches = (np.stack(list(images[at : at + size])) for at in range(0, len(images), size))
        beside = Unmodelled(want, self._gpu)
        asked = [name for name in want if name not in beside.outputs]
        passing = beside.passing(batches)
        outputs = self._run(passing, asked, blocks) if asked else {}
        outputs |= beside.vectors(passing)
        joined = {}
        for name in want:
            vectors = np.asarray(outputs[name], dtype_of(name))
            if not np.isfinite(vectors).all():
                raise DataError(
                    f"{self.spec.name} gives values that are not finite ({name})",
                    "try it in float32, and check its image size, mean and std",
                )
            joined[name] = vectors
        return joined

    def _forward(
        self, batches: Iterator[Images], want: Sequence[str], blocks: int
    ) -> dict[str, Any]:
        import torch

        from pipeline.evaluate.features import embed, inference, normalise

        network, dtype = self.network, self._dtype
        if set(want) == {"cls"}:  # what an evaluation does while the network is trained
            return {
                "cls": embed(network, batches, self.mean, self.std, self._device, dtype).numpy()
            }
        parts: dict[str, list[Any]] = {name: [] for name in want}
        with inference(network, self._device, dtype):
            for batch in batches:
                outputs = tokens(
                    network, normalise(batch, self.mean, self.std, self._device), want, blocks
                )
                for name in want:
                    parts[name].append(outputs[name])
        # Copied at the end: a copy waits for the device, which then has nothing to do. Not under
        # autocast, which joins no float16 on CPUs.
        return {name: torch.cat(part).cpu().numpy() for name, part in parts.items()}


def prepared(kind: str, size: int, pixels: Images) -> Images:
    """`Embedder.prepare` where no model is open."""
    if kind == DESCRIPTOR:
        from pipeline.curate.images import descriptor

        return descriptor.twice(three_channels(pixels))[..., None]
    from pipeline.views.crops import resize_centre_crop

    return resize_centre_crop(pixels, size)


_open: dict[tuple[str, bool, int], Embedder] = {}


def open_embedder(spec: EmbedderSpec, gpu: bool = False, threads: int = 1) -> Embedder:
    """The embedder, from the last call where it was the same one: a worker runs many tasks.

    Raises:
        PipelineError: it cannot be loaded, or does not fit its own description.
    """
    key = (repr(spec.settings), gpu, threads)
    if key not in _open:
        _open.clear()  # the memory of one model, not of all that this worker has seen
        _open[key] = Embedder(spec, gpu, threads)
    return _open[key]
