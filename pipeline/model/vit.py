"""The vision transformer of DINOv2, with the parameter names of its released weights.

Order of a forward (models/vision_transformer.py): patches, mask token, CLS, position embedding,
registers (which have no position), blocks, norm. B views, P patches, R registers, N = 1 + R + P
tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.errors import PipelineError
from pipeline.model.block import LAYER_NORM_EPS, Block, Group, draw_subsets


class Packed(NamedTuple):
    """Tokens of several groups of views, one after the other, before the last norm."""

    tokens: Tensor  # [T, D]
    groups: tuple[Group, ...]

    def views(self) -> list[Tensor]:
        """The tokens of each group as `[B, N, D]` (no copy)."""
        parts = torch.split(self.tokens, [views * tokens for views, tokens in self.groups])
        return [
            part.view(views, tokens, -1)
            for part, (views, tokens) in zip(parts, self.groups, strict=True)
        ]


def check_masks(masks: Tensor, patches: Tensor) -> None:
    """Refuses masks that are not `[B, P]` for patches `[B, P, D]`: some would be broadcast.

    Raises:
        PipelineError: with both shapes.
    """
    if masks.shape != patches.shape[:2]:
        raise PipelineError(
            f"masks {list(masks.shape)} for {patches.shape[1]} patches of {len(patches)} views, "
            f"expected {list(patches.shape[:2])}",
            "give each global view one value for each of its patches",
        )


class PatchEmbed(nn.Module):
    """Cut an image into square patches and project each."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, P, D]`, row by row."""
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return out


@dataclass(frozen=True)
class BackboneSpec:
    """What a backbone is made of. Widths, depths, heads: S 384/12/6, B 768/12/12, L 1024/24/16, g
    1536/40/24.

    Defaults give the models for which DINOv2, Hugging Face and timm agree at every size: registers,
    antialiased position embedding, offset 0. Models trained with the reference's own default use
    offset 0.1 and no antialias.
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    ffn: str = "mlp"
    registers: int = 4
    layer_scale: float = 1e-5
    drop_path: float = 0.0
    in_channels: int = 3
    interpolate_offset: float = 0.0
    interpolate_antialias: bool = True

    def build(self) -> VisionTransformer:
        """A freshly initialised backbone, drawn from torch's global generator."""
        return VisionTransformer(self)


class VisionTransformer(nn.Module):
    """ViT with registers, LayerScale, mask token and stochastic depth on subsets of the batch."""

    def __init__(self, spec: BackboneSpec) -> None:
        """Build and initialise. Draws from torch's global generator (see `build_pair` for a seed).

        Raises:
            PipelineError: sizes that do not fit each other, an unknown `ffn`, or a drop rate
                outside [0, 1).
        """
        super().__init__()
        _check(spec)
        width, side = spec.width, spec.image_size // spec.patch_size
        self.patch_size, self.width, self.registers = spec.patch_size, width, spec.registers
        self.drop_path = spec.drop_path
        self.has_patches = self.takes_masks = True
        # Of training alone: the type of the tokens between two blocks under autocast, and whether
        # the backward pass computes each block again instead of keeping what it needs.
        self.residual = torch.float32
        self.checkpointing = False
        self.interpolate_offset = spec.interpolate_offset
        self.interpolate_antialias = spec.interpolate_antialias
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, width))
        if spec.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, spec.registers, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.patch_embed = PatchEmbed(spec.patch_size, spec.in_channels, width)
        self.blocks = nn.ModuleList(
            Block(width, spec.heads, spec.mlp_ratio, spec.ffn, spec.layer_scale)
            for _ in range(spec.depth)
        )
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self._initialise()

    def _initialise(self) -> None:
        """Linear and position truncated normal 0.02, CLS and registers normal 1e-6, mask token 0,
        conv as torch.
        """
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.registers:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def position(self, height: int, width: int) -> Tensor:
        """Position embedding `[1, 1 + P, D]` for a view of `height` x `width` pixels, bicubic where
        not native.
        """
        rows, columns = height // self.patch_size, width // self.patch_size
        patches = self.pos_embed.shape[1] - 1
        if rows * columns == patches and height == width:
            return self.pos_embed
        side = math.isqrt(patches)
        embedding = self.pos_embed.float()
        table = embedding[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        # A scale factor and a size give different samples: the factor itself reaches the kernel.
        offset = self.interpolate_offset
        where: dict[str, tuple[float, float] | tuple[int, int]] = (
            {"scale_factor": ((rows + offset) / side, (columns + offset) / side)}
            if offset
            else {"size": (rows, columns)}
        )
        resized = F.interpolate(
            table,
            mode="bicubic",
            antialias=self.interpolate_antialias,
            **where,  # type: ignore[arg-type]
        )
        if resized.shape[-2:] != (rows, columns):
            raise PipelineError(
                f"position embedding came out as {tuple(resized.shape[-2:])}, "
                f"expected {(rows, columns)} patches",
                "use model.interpolate_offset=0",
            )
        flat = resized.permute(0, 2, 3, 1).reshape(1, rows * columns, -1)
        return torch.cat([embedding[:, :1], flat], dim=1)

    def tokens(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Input tokens `[B, N, D]` of views `[B, C, H, W]`; patches under `masks` (bool `[B, P]`)
        are replaced.
        """
        height, width = x.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise PipelineError(
                f"image of {height} x {width} pixels, but the patch size is {self.patch_size}",
                "use crop sizes that are multiples of the patch size",
            )
        patches = self.patch_embed(x)
        if masks is not None:
            check_masks(masks, patches)
            # `where` keeps the mask token in the graph even if nothing is masked: DDP needs its
            # gradient.
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        cls = self.cls_token.to(patches.dtype).expand(x.shape[0], -1, -1)
        tokens = torch.cat([cls, patches], dim=1) + self.position(height, width)
        if self.registers:
            registers = self.register_tokens.to(tokens.dtype).expand(x.shape[0], -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        return tokens

    def packed(
        self,
        inputs: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        generator: torch.Generator | None = None,
    ) -> Packed:
        """One forward over several crop sizes up to, but without, the last norm.

        Equals separate forwards. In training mode with `drop_path > 0` the subsets come from
        `generator`.
        """
        parts = [self.tokens(x, mask) for x, mask in zip(inputs, masks, strict=True)]
        groups = tuple((part.shape[0], part.shape[1]) for part in parts)
        flat = [part.flatten(0, 1) for part in parts]
        x = flat[0] if len(flat) == 1 else torch.cat(flat)
        if self.residual != torch.float32 and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.residual)
        if self.training and self.drop_path > 0:
            subsets = draw_subsets(
                groups, self.drop_path, 2 * len(self.blocks), generator, device=x.device
            )
            for block, first, second in zip(self.blocks, subsets[::2], subsets[1::2], strict=True):
                x = self._run(block, x, groups, first, second)
        else:
            for block in self.blocks:
                x = self._run(block, x, groups)
        return Packed(x, groups)

    def _run(self, block: nn.Module, x: Tensor, *arguments: Any) -> Tensor:
        if not (self.checkpointing and torch.is_grad_enabled()):
            out: Tensor = block(x, *arguments)
            return out
        # What is random has been drawn before: no state of a generator need be kept.
        again: Tensor = checkpoint(
            block, x, *arguments, use_reentrant=False, preserve_rng_state=False
        )
        return again

    def encode(
        self,
        inputs: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        masked: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Normed tokens that the losses use, `[R + M, D]`: the CLS of all R views, then M patches.

        Args:
            inputs: groups of views `[B, C, H, W]`.
            masks: bool `[B, P]` of each group, or None.
            masked: int64 `[M]`, flat places in `[B * P]` of the first group.
            generator: source of stochastic depth, used in training mode only.
        """
        packed = self.packed(inputs, masks, generator)
        tokens = packed.groups[0][1]
        patches = tokens - 1 - self.registers
        cls = torch.cat([part[:, 0] for part in packed.views()])
        # The norm works token by token: select first, then norm only what is used.
        rows = masked // patches * tokens + (tokens - patches) + masked % patches
        chosen: Tensor = self.norm(torch.cat([cls, packed.tokens.index_select(0, rows)]))
        return chosen

    def forward_packed(
        self,
        inputs: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        generator: torch.Generator | None = None,
    ) -> list[dict[str, Tensor | None]]:
        """`forward_features` of several groups of views in one packed forward."""
        packed = self.packed(inputs, masks, generator)
        outputs: list[dict[str, Tensor | None]] = []
        for tokens, mask in zip(packed.views(), masks, strict=True):
            normed = self.norm(tokens)
            outputs.append(
                {
                    "x_norm_clstoken": normed[:, 0],
                    "x_norm_regtokens": normed[:, 1 : 1 + self.registers],
                    "x_norm_patchtokens": normed[:, 1 + self.registers :],
                    "x_prenorm": tokens,
                    "masks": mask,
                }
            )
        return outputs

    def forward_features(
        self, x: Tensor, masks: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, Tensor | None]:
        """All output tokens of views `[B, C, H, W]` under the reference's names."""
        return self.forward_packed([x], [masks], generator)[0]

    def forward(self, x: Tensor) -> Tensor:
        """The normed CLS token `[B, D]`."""
        cls: Tensor = self.norm(self.packed([x], [None]).views()[0][:, 0])
        return cls

    def intermediate(
        self, x: Tensor, n: int | Sequence[int] = 1, norm: bool = True
    ) -> list[tuple[Tensor, Tensor]]:
        """Outputs of the last `n` blocks (or of the blocks numbered `n`): patch maps `[B, D, h, w]`
        and CLS `[B, D]`.
        """
        depth = len(self.blocks)
        layers = range(depth - n, depth) if isinstance(n, int) else n
        rows, columns = (size // self.patch_size for size in x.shape[-2:])
        tokens = self.tokens(x)
        shape = tokens.shape
        flat = tokens.flatten(0, 1)
        outputs: dict[int, tuple[Tensor, Tensor]] = {}
        for number, block in enumerate(self.blocks):
            flat = block(flat, ((shape[0], shape[1]),))
            if number in layers:
                out = (self.norm(flat) if norm else flat).view(shape)
                patches = out[:, 1 + self.registers :].transpose(1, 2)
                outputs[number] = (patches.unflatten(2, (rows, columns)), out[:, 0])
        return [outputs[number] for number in layers]


def _check(spec: BackboneSpec) -> None:
    image, patch = spec.image_size, spec.patch_size
    if image % patch:
        raise PipelineError(
            f"image size {image} is not a multiple of the patch size {patch}",
            f"use {image // patch * patch} or {(image // patch + 1) * patch}",
        )
    if spec.width % spec.heads:
        raise PipelineError(f"width {spec.width} does not divide into {spec.heads} heads")
    if spec.ffn not in ("mlp", "swiglu"):
        raise PipelineError(f"unknown ffn {spec.ffn!r}", "use mlp or swiglu")
    if not 0 <= spec.drop_path < 1:
        raise PipelineError(f"drop_path is {spec.drop_path}, expected 0 <= drop_path < 1")
