"""One batch through a model: CLS, mean of the patches, patches, CLS of the last blocks. And what
needs no model: the vectors of images that a model is measured against.

Shapes: B images, S side in pixels, C channels, P patches, D width, n blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.embed.embedders import Embedder

Images = np.ndarray[Any, np.dtype[np.uint8]]
UNMODELLED = ("pixels", "colours")  # the same of every model
OUTPUTS = ("cls", "mean", "patches", "blocks", *UNMODELLED)
Run = Callable[[Iterator[Images], Sequence[str], int], dict[str, Any]]  # batches, outputs, n


def tokens(network: Any, x: Any, want: Sequence[str], blocks: int) -> dict[str, Any]:
    """What is wanted of a batch [B, C, S, S], float32 or float16, on its device."""
    import torch

    outputs = {}
    if "blocks" in want:
        layers = last_blocks(network, x, blocks)
        patches, cls = layers[-1]
        outputs["blocks"] = torch.stack([one.float() for _, one in layers], 1)
    else:
        features = network.forward_features(x)
        cls, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"]
    outputs["cls"] = cls.float()
    if "mean" in want:
        outputs["mean"] = patches.float().mean(1)
    if "patches" in want:
        outputs["patches"] = patches.half()
    return outputs


def one_by_one(run: Callable[[Images], dict[str, Any]]) -> Run:
    """Of a model that takes a batch, what takes several of them."""

    def several(batches: Iterator[Images], want: Sequence[str], blocks: int) -> dict[str, Any]:
        parts = [run(batch) for batch in batches]
        return {name: np.concatenate([part[name] for part in parts]) for name in want}

    return several


def described(images: Images) -> dict[str, Any]:
    """Descriptors of prepared images, as `cls`."""
    from pipeline.curate.images import descriptor

    return {"cls": descriptor.describe_grey(descriptor.averaged(images[..., 0]))[0]}


class Unmodelled:
    """`pixels` and `colours` of batches that pass by on their way to a model.

    Attributes:
        outputs: those wanted; the others are the model's.
    """

    def __init__(self, want: Sequence[str], gpu: bool = False) -> None:
        self.outputs = [name for name in want if name in UNMODELLED]
        self._gpu = gpu
        self._parts: dict[str, list[Any]] = {name: [] for name in self.outputs}

    def passing(self, batches: Iterator[Images]) -> Iterator[Images]:
        """The same batches; the vectors of each are computed when it is asked for."""
        if not self.outputs:
            yield from batches
            return
        import torch

        from pipeline.evaluate import baselines

        kinds = {"pixels": baselines.pixel_vectors, "colours": baselines.colour_vectors}
        device = "cuda" if self._gpu and torch.cuda.is_available() else "cpu"
        for batch in batches:
            for name in self.outputs:
                self._parts[name].append(kinds[name](batch, device))
            yield batch

    def vectors(self, passing: Iterator[Images]) -> dict[str, Any]:
        """float32 [B, D] of each wanted output, of all batches; those pass that did not yet."""
        for _ in passing:
            pass
        if not self.outputs:
            return {}
        import torch

        return {name: torch.cat(parts).cpu().numpy() for name, parts in self._parts.items()}


def last_blocks(network: Any, x: Any, blocks: int) -> list[tuple[Any, Any]]:
    """Normed patch tokens [B, P, D] and CLS [B, D] of the last blocks, the last one last."""
    if hasattr(network, "intermediate"):
        return [
            (maps.flatten(2).transpose(1, 2), cls) for maps, cls in network.intermediate(x, blocks)
        ]
    layers = network.module.forward_intermediates(
        x, indices=blocks, return_prefix_tokens=True, norm=True, output_fmt="NLC",
        intermediates_only=True,
    )  # fmt: skip
    return [(patches, prefix[:, 0]) for patches, prefix in layers]


def timm_blocks(network: Any) -> Any:
    """Blocks of a timm ViT; none for what has no CLS token in each of them."""
    module = getattr(network, "module", None)
    tokens = getattr(network, "has_patches", False) and getattr(network, "prefix_tokens", 0)
    return getattr(module, "blocks", ()) if tokens else ()


def own_size(network: Any) -> int:
    """The image size that a backbone's position embeddings are for, else 224."""
    position, patch = getattr(network, "pos_embed", None), int(getattr(network, "patch_size", 0))
    if position is None or not patch:
        return 224
    return int((position.shape[1] - 1) ** 0.5) * patch


def with_mean(outputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs with the mean of the patches, where there are patches."""
    if "patches" in outputs:
        outputs["mean"] = outputs["patches"].astype(np.float32).mean(1)
    return outputs


def dtype_of(output: str) -> Any:
    """The type of an output in memory."""
    return np.float16 if output == "patches" else np.float32


def shape_of(
    output: str, dim: int, grid: Sequence[int], blocks: int, channels: int = 3
) -> tuple[int, ...]:
    """The shape of an output of one image: [D], [P, D] or [n, D]; `pixels` and `colours` have a
    width of their own.

    Args:
        output: of OUTPUTS.
        dim: D.
        grid: rows and columns of the patches.
        blocks: n.
        channels: C.
    """
    if output in UNMODELLED:
        from pipeline.evaluate.baselines import colour_width, pixel_width

        return (pixel_width(channels) if output == "pixels" else colour_width(channels),)
    if output == "patches":
        return (math.prod(grid), dim)
    return (blocks, dim) if output == "blocks" else (dim,)


def check_outputs(embedder: Embedder, want: Sequence[str], blocks: int) -> None:
    """Refuses outputs that a model does not have.

    Raises:
        DataError: it has none of that name, or not so many blocks.
    """
    name, network = embedder.spec.name, embedder.network
    for output in want:
        if output not in OUTPUTS:
            raise DataError(f"there is no output {output}", f"there are {', '.join(OUTPUTS)}")
        if output in ("mean", "patches") and embedder.patch_size is None:
            raise DataError(f"{name} gives no patch tokens, so it has no {output}", "ask for cls")
        if output in UNMODELLED and embedder.spec.kind == "descriptor":
            raise DataError(
                f"the descriptor takes small grey images, which have no {output}",
                "take another model, or ask for cls",
            )
        depth = len(getattr(network, "blocks", ()) or timm_blocks(network))
        if output == "blocks" and not blocks <= depth:
            what = f"has {depth} blocks" if depth else "gives nothing of single blocks"
            raise DataError(f"{name} {what}, {blocks} were asked for", "ask for cls")


def check_channels(network: Any, name: str, channels: int) -> None:
    """Refuses a network whose weights take another number of channels than it is given.

    Raises:
        DataError: it does.
    """
    embed = getattr(getattr(network, "module", network), "patch_embed", None)
    weight = getattr(getattr(embed, "proj", None), "weight", None)
    if weight is not None and weight.ndim == 4 and weight.shape[1] != channels:
        raise DataError(
            f"{name} takes images of {weight.shape[1]} channels, but mean and std have {channels} "
            "numbers",
            "give one for each channel: augment.mean and augment.std, in Python mean= and std=",
        )
