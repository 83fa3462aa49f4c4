"""What the CLS token looks at: its row of a block's attention, over the patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pipeline.errors import PipelineError
from pipeline.model.foreign import TimmBackbone
from pipeline.model.vit import VisionTransformer
from pipeline.use.network import grid_of, reading


def attention(network: nn.Module, images: Tensor, block: int = -1) -> Tensor:
    """Attention of the CLS token to each patch, for each head, float32 `[B, heads, h, w]`.

    The fused kernel gives no probabilities. So the block's queries and keys are taken as they reach
    the kernel, and the one row of softmax(q k / sqrt(d)) is computed from them. It is a
    distribution over all tokens: what is missing to 1 goes to CLS and the registers.

    Args:
        network: a `VisionTransformer`, or a `TimmBackbone` with a CLS token; its mode is as before.
        images: normalised, `[B, C, H, W]`, sides that are multiples of the patch size.
        block: number of the block, from 0; negative ones count from the last.

    Raises:
        PipelineError: no such block, no CLS token, no patches, or a size that does not fit.
    """
    rows, columns = grid_of(network, images)
    inside, prefix = block_of(network, block)
    with _Taken.inside(inside) as taken, reading(network, images), taken:
        network.forward_features(images)  # type: ignore[operator]
    if len(taken.calls) != 1:
        raise PipelineError(
            f"block {block} attends {len(taken.calls)} times with torch's kernel, expected once",
            "use a plain vision transformer",
        )
    to_patches = _first_row(*taken.calls[0])[:, :, prefix:]
    return to_patches.reshape(*to_patches.shape[:2], rows, columns)


def without_attention(network: nn.Module) -> str:
    """Why a network has no attention to show; "" where it has."""
    try:
        _blocks(network)
    except PipelineError as error:
        return error.what
    return ""


def block_of(network: nn.Module, block: int) -> tuple[nn.Module, int]:
    """A block by its number, from 0 or from the last, and how many tokens come before the patches.

    Raises:
        PipelineError: no such block, or a network without attention to show.
    """
    blocks, prefix = _blocks(network)
    if not -len(blocks) <= block < len(blocks):
        raise PipelineError(
            f"block {block} of a network with {len(blocks)} blocks",
            f"use 0 to {len(blocks) - 1}, or -1 for the last",
        )
    return blocks[block], prefix


def _first_row(q: Tensor, k: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    """Probabilities `[B, heads, N]` of the first token's row, from q and k `[B, heads, N, d]`."""
    scores = (q[:, :, :1].float() * (scale or q.shape[-1] ** -0.5)) @ k.float().transpose(-2, -1)
    if mask is not None:
        mask = mask if mask.shape[-2] == 1 else mask[..., :1, :]
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    return torch.softmax(scores, -1)[:, :, 0]


def _blocks(network: nn.Module) -> tuple[Any, int]:
    """The blocks of a network, and how many tokens come before its patches."""
    if isinstance(network, VisionTransformer):
        return network.blocks, 1 + network.registers
    if isinstance(network, TimmBackbone) and network.has_patches:
        if getattr(network.module, "cls_token", None) is not None:
            return network.module.blocks, network.prefix_tokens
        raise PipelineError(
            f"timm:{network.spec.name} has no CLS token whose attention could be shown",
            "its components and similarities can be",
        )
    raise PipelineError(
        f"attention of a {type(network).__name__} is not known",
        "use a vision transformer: a run of ours, DINOv2 weights, or a ViT of timm",
    )


class _Taken(TorchFunctionMode):
    """Keeps the queries and keys of attention calls that are made inside one block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, float | None, Tensor | None]] = []
        self.on = False

    @classmethod
    @contextmanager
    def inside(cls, block: nn.Module) -> Iterator[_Taken]:
        """On while the block runs, with its fused kernel where it has the choice (timm)."""
        taken = cls()

        def switch(on: bool) -> None:
            taken.on = on

        hooks = [
            block.register_forward_pre_hook(lambda *_: switch(True)),
            block.register_forward_hook(lambda *_: switch(False)),
        ]
        choices = [
            (part, part.fused_attn) for part in block.modules() if hasattr(part, "fused_attn")
        ]
        try:
            for part, _ in choices:
                part.fused_attn = True  # type: ignore[assignment]
            yield taken
        finally:
            for part, fused in choices:
                part.fused_attn = fused
            for hook in hooks:
                hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.on and func is F.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            self.calls.append((args[0], args[1], kwargs.get("scale"), mask))
        return func(*args, **kwargs)
