"""What turns images into vectors, described so that tasks can open it: by name, weights or model.

The descriptor needs no weights. A backbone comes from any file or folder that `model.init` takes,
or from a function that builds it, which is how a run folder's checkpoint is handed down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.curate.embed.onnx import OnnxModel
from pipeline.curate.embed.onnx_files import files_of, is_onnx, on_this_node
from pipeline.curate.rows.exact import Halves, unit_half
from pipeline.errors import DataError, PipelineError
from pipeline.uri import is_uri, public

DESCRIPTOR, BACKBONE, ONNX = "descriptor", "backbone", "onnx"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
_BLOCK = 2**24

Images = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class EmbedderSpec:
    """An embedder as tasks receive it; small, pickled.

    Attributes:
        kind: DESCRIPTOR, BACKBONE or ONNX.
        name: for messages.
        digest: changes with the weights; results are kept under it.
        load: of a backbone: gives a module [b, C, S, S] -> [b, D]. A function of a module (or a
            partial of one), so that it can be pickled.
        path: of an ONNX model, that all nodes reach; or its URI.
        image_size: side of the images; None: the model's own.
        mean: of each channel, for values in 0 to 1.
        std: of each channel.
        batch_size: images at once.
        half: backbones compute in bfloat16 (on a GPU).
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

    @property
    def identity(self) -> list[Any]:
        """What must be equal for vectors to be compared, as JSON reads it back."""
        return [self.kind, self.digest, self.image_size, list(self.mean), list(self.std)]

    @property
    def settings(self) -> list[Any]:
        """What vectors depend on, JSON-like: part of a step's key."""
        return [*self.identity, self.batch_size, self.half]


def spec_of(
    embedder: str,
    image_size: int | None = None,
    batch_size: int = 64,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> EmbedderSpec:
    """The embedder that `descriptor`, a `.onnx` file, or weights as for `model.init` mean.

    Raises:
        PipelineError: there is no such file or folder.
    """
    if embedder == DESCRIPTOR:
        return EmbedderSpec()
    fields: dict[str, Any] = {
        "name": public(embedder),
        "digest": digest_of(embedder),
        "image_size": image_size,
        "batch_size": batch_size,
        "mean": tuple(mean),
        "std": tuple(std),
    }
    path = embedder if is_uri(embedder) else str(Path(embedder).absolute())
    if is_onnx(embedder):
        return EmbedderSpec(ONNX, path=path, **fields)
    return EmbedderSpec(BACKBONE, load=partial(load_weights, path), **fields)


def digest_of(path: str | Path) -> str:
    """Of a file's content, or of all files in a folder and their names. To a `.onnx` file belong
    the files beside it that hold its weights.

    Raises:
        PipelineError: there is none.
    """
    if is_onnx(path):
        return files_of(str(path)).digest
    if is_uri(path):
        raise PipelineError(
            f"no embedder: {public(path)} holds no checkpoint of ours",
            "at a URI, name a run folder or a .onnx file; download other weights",
        )
    place = Path(path)
    if not place.exists():
        raise PipelineError(
            f"no embedder: there is no {path}",
            "give descriptor, a run folder, weights as for model.init, or a .onnx file",
        )
    hashed = blake2b(digest_size=8)
    files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
    for file in files:
        hashed.update(f"{file.relative_to(place)}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                hashed.update(block)
    return hashed.hexdigest()


def load_weights(path: str) -> Any:
    """The backbone in a file or folder that `model.init` takes; its sizes are read off the weights.

    Raises:
        PipelineError: no weights, or not those of a DINOv2 backbone.
    """
    import math

    import torch

    from pipeline.model.fit import Facts, fit
    from pipeline.model.pair import BackboneSpec
    from pipeline.model.weights import read_weights

    weights = read_weights(path)
    facts = Facts.of(weights.state)
    if not facts.width or not facts.depth or not facts.patch_size:
        raise PipelineError(
            f"{path} ({weights.origin}) holds no vision transformer", "see model.init"
        )
    swiglu = facts.ffn == "swiglu"
    spec = BackboneSpec(
        image_size=max(1, math.isqrt(facts.patches)) * facts.patch_size,
        patch_size=facts.patch_size,
        width=facts.width,
        depth=facts.depth,
        heads=weights.heads or max(1, facts.width // 64),  # 64 wide in every ViT of DINOv2
        mlp_ratio=facts.hidden / facts.width * (1.5 if swiglu else 1.0),
        ffn=facts.ffn,
        registers=facts.registers,
        in_channels=facts.in_channels,
    )
    with torch.device("meta"):
        backbone = spec.build().eval()
    fit(backbone, weights, path)
    return backbone


class Embedder:
    """An opened backbone or ONNX model: prepares and embeds images.

    Attributes:
        dim: width of its vectors.
        size: side of the images that it takes, pixels.
        channels: of these images.
    """

    def __init__(self, spec: EmbedderSpec, gpu: bool = False, threads: int = 1) -> None:
        self.spec = spec
        self.channels = len(spec.mean)
        if spec.kind == ONNX:
            path = on_this_node(spec.path, spec.digest)
            sizes = (spec.image_size, spec.mean, spec.std)
            model = OnnxModel(path, *sizes, threads=threads, gpu=gpu, name=spec.name)
            self._run: Callable[[Images], Any] = model
            self.size, self.dim = model.signature.size, model.dim
            return
        if spec.load is None:
            raise DataError(f"embedder {spec.name} has nothing to load", "give weights or a model")
        import torch

        from pipeline.evaluate.features import embed

        torch.set_num_threads(threads)
        device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if spec.half and device == "cuda" else torch.float32
        network = spec.load().to(device)
        self._run = lambda images: embed(
            network, [images], spec.mean, spec.std, device, dtype
        ).numpy()
        self.size = spec.image_size or _own_size(network)
        self.dim = len(self._features(np.zeros((1, self.size, self.size, self.channels), "u1"))[0])

    def prepare(self, pixels: Images) -> Images:
        """A decoded image [H, W, C] as [S, S, C]: the evaluation's centre crop."""
        from pipeline.views.crops import resize_centre_crop

        return resize_centre_crop(pixels, self.size)

    def embed(self, images: Sequence[Images]) -> Halves:
        """Prepared images to unit vectors [n, D].

        Raises:
            DataError: the model gives values that are no numbers.
        """
        vectors = [np.zeros((0, self.dim), np.float32)]
        for at in range(0, len(images), self.spec.batch_size):
            vectors.append(self._features(np.stack(images[at : at + self.spec.batch_size])))
        return unit_half(np.concatenate(vectors))

    def _features(self, images: Images) -> np.ndarray[Any, Any]:
        features = np.asarray(self._run(images), np.float32)
        if not np.isfinite(features).all():
            raise DataError(
                f"{self.spec.name} gives values that are not finite",
                "try it in float32, and check curate.image_size, mean and std",
            )
        return features


def _own_size(network: Any) -> int:
    """The image size that a backbone's position embeddings are for, else 224."""
    position, patch = getattr(network, "pos_embed", None), int(getattr(network, "patch_size", 0))
    if position is None or not patch:
        return 224
    return int((position.shape[1] - 1) ** 0.5) * patch


_open: dict[tuple[str, bool, int], Embedder] = {}


def opened(spec: EmbedderSpec, gpu: bool = False, threads: int = 1) -> Embedder:
    """The embedder, from the last call where it was the same one: a worker runs many tasks."""
    key = (repr(spec.settings), gpu, threads)
    if key not in _open:
        _open.clear()  # the memory of one model, not of all that this worker has seen
        _open[key] = Embedder(spec, gpu, threads)
    return _open[key]
