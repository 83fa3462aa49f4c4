"""Weights of any origin into a backbone: strictly, and with the reason where they do not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import PipelineError
from pipeline.model.vit import VisionTransformer

SIZES = {(384, 12): "vits", (768, 12): "vitb", (1024, 24): "vitl", (1536, 40): "vitg"}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Weights:
    """A backbone's tensors under our names (dinov2's, without block chunks)."""

    state: dict[str, Tensor]
    origin: str  # dinov2 .pth, Hugging Face, timm, raydino export
    note: str = ""  # what the file had more or less, for the log
    heads: int | None = None  # attention heads, where a config says; no shape does


class Facts(NamedTuple):
    """What names and shapes tell of a backbone; 0 where they do not."""

    width: int
    depth: int
    patch_size: int
    in_channels: int
    ffn: str
    hidden: int
    registers: int
    layer_scale: bool
    patches: int

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Facts:
        """Read off a state dict in our names."""

        def size(name: str, dim: int) -> int:
            x = state.get(name)
            return x.shape[dim] if x is not None and x.ndim >= max(1, -dim, dim + 1) else 0

        blocks = [_BLOCK.fullmatch(name) for name in state]
        swiglu = any(".mlp.w12." in name for name in state)
        inner = "w3" if swiglu else "fc2"
        return cls(
            width=size("cls_token", -1),
            depth=1 + max((int(block[1]) for block in blocks if block), default=-1),
            patch_size=size("patch_embed.proj.weight", -1),
            in_channels=size("patch_embed.proj.weight", 1),
            ffn="swiglu" if swiglu else "mlp",
            hidden=size(f"blocks.0.mlp.{inner}.weight", -1),
            registers=size("register_tokens", 1),
            layer_scale=any(name.endswith(".ls1.gamma") for name in state),
            patches=max(0, size("pos_embed", 1) - 1),
        )

    @property
    def mlp_ratio(self) -> float:
        """That gives the hidden width: a whole one where one does, for Hugging Face takes no other.

        SwiGLU has 2/3 of the width that the ratio says, rounded up to a multiple of 8 (`SwiGlu`).
        So several ratios give one width, and the plain quotient is often a broken one.
        """
        if self.ffn != "swiglu":
            return self.hidden / self.width
        ratio = 1.5 * self.hidden / self.width
        for whole in (math.floor(ratio), math.ceil(ratio)):
            if whole and (int(self.width * whole * 2 / 3) + 7) // 8 * 8 == self.hidden:
                return float(whole)
        return ratio


def fit(backbone: VisionTransformer, weights: Weights, source: str, resize: bool = False) -> None:
    """Load weights strictly: every name and every shape must be the model's.

    A loose load is how the reference came to evaluate random weights. A backbone on the meta
    device takes the tensors themselves, any other one copies them.

    Args:
        backbone: takes the weights, in place.
        weights: from `read_weights`.
        source: where they come from, for messages.
        resize: position embeddings of another grid are resized to the model's: bicubic, in float32,
            antialiased where the model's own are (`interpolate_antialias`), with no offset, the
            CLS row as it is.

    Raises:
        PipelineError: listing every missing and unknown name and every other shape, with the
            likely reason and the field to change.
    """
    expected = backbone.state_dict()
    state = dict(weights.state)
    ours, theirs = expected["pos_embed"], state.get("pos_embed")
    if resize and theirs is not None and theirs.shape != ours.shape and _square(theirs):
        side = math.isqrt(ours.shape[1] - 1)
        state["pos_embed"] = resized_position(theirs, side, backbone.interpolate_antialias)
    problems = [_listed("missing", [n for n in expected if n not in state])]
    problems += [_listed("unknown", [n for n in state if n not in expected])]
    problems += _shapes(state, expected)
    first: Any = backbone.blocks[0]
    heads: int = first.attn.heads
    if weights.heads not in (None, heads):
        problems.append(f"{weights.heads} attention heads, expected {heads}")
    if problems := [text for text in problems if text]:
        raise PipelineError(
            f"{source} ({weights.origin}) does not fit the model: {'; '.join(problems)}",
            _reasons(Facts.of(state), Facts.of(expected), weights.heads, heads),
        )
    if backbone.cls_token.is_meta:
        state = {name: x.to(expected[name].dtype) for name, x in state.items()}
        backbone.load_state_dict(state, assign=True)
    else:
        backbone.load_state_dict(state)


def resized_position(position: Tensor, side: int, antialias: bool = True) -> Tensor:
    """Position embedding `[1, 1 + P, D]` of a square grid for `side` x `side` patches.

    What `VisionTransformer.position` computes with offset 0.
    """
    old = math.isqrt(position.shape[1] - 1)
    table = position[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=(side, side), mode="bicubic", antialias=antialias)
    rows = table.permute(0, 2, 3, 1).reshape(1, side * side, -1)
    return torch.cat([position[:, :1].float(), rows], dim=1)


def fold(names: list[str]) -> list[str]:
    """Names of many blocks as one: `blocks.{0..11}.mlp.w12.weight`."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        block = _BLOCK.fullmatch(name)
        numbers.setdefault(f"blocks.#.{block[2]}" if block else name, []).extend(
            [int(block[1])] if block else []
        )
    return [
        name.replace("#", _ranges(sorted(block_numbers)), 1)
        for name, block_numbers in numbers.items()
    ]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    text = ",".join("..".join(map(str, run)) for run in runs)
    return text if text.isdigit() else f"{{{text}}}"


def _listed(word: str, names: list[str]) -> str:
    return f"{word} {', '.join(fold(names))}" if names else ""


def _shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    groups: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name, x in state.items():
        if name in expected and x.shape != expected[name].shape:
            block = _BLOCK.fullmatch(name)
            key = (block[2] if block else name, tuple(x.shape), tuple(expected[name].shape))
            groups.setdefault(key, []).append(name)
    return [
        f"{fold(names)[0]} is {got}, expected {expected_shape}"
        for (_, got, expected_shape), names in groups.items()
    ]


def _square(position: Tensor) -> bool:
    return position.ndim == 3 and math.isqrt(position.shape[1] - 1) ** 2 == position.shape[1] - 1


def _reasons(have: Facts, want: Facts, heads: int | None, wanted_heads: int) -> str:
    """Why weights do not fit, and the fields that would make them."""
    if not have.width or not have.depth:
        return "these are not the weights of a vision transformer"
    out = []
    if (have.width, have.depth) != (want.width, want.depth):
        named = SIZES.get((have.width, have.depth))
        fields = f"model.size={named}" if named else _width_and_depth(have, want)
        out.append(
            f"the weights are {have.width} wide and {have.depth} deep, the model "
            f"{want.width} and {want.depth}: set {fields}"
        )
    if heads not in (None, wanted_heads):
        out.append(f"set model.heads={heads}")
    words = {"mlp": "an MLP", "swiglu": "SwiGLU"}
    if have.ffn != want.ffn:
        out.append(
            f"the weights have {words[have.ffn]}, the model {words[want.ffn]}: "
            f"set model.ffn={have.ffn}"
        )
    elif have.width == want.width and have.hidden != want.hidden:
        out.append(
            f"the feed-forward layers are {have.hidden} wide, the model's {want.hidden}: "
            f"set model.mlp_ratio to about {have.mlp_ratio:.3g}"
        )
    for field, what in (
        ("registers", "registers"),
        ("patch_size", "pixels a patch side"),
        ("in_channels", "channels"),
    ):
        theirs, ours = getattr(have, field), getattr(want, field)
        if theirs != ours and (theirs or field == "registers"):
            out.append(
                f"the weights have {theirs} {what}, the model {ours}: set model.{field}={theirs}"
            )
    if not have.layer_scale:
        out.append("the weights have no LayerScale, which every DINOv2 has: another kind of ViT")
    # With another patch size the grid differs too, and fits again once that is set.
    if have.patch_size == want.patch_size and have.patches not in (0, want.patches):
        out.append(_grid(have, want))
    return "; ".join(out) or "the file is not complete, or of another kind of model"


def _width_and_depth(have: Facts, want: Facts) -> str:
    fields = [f for f in ("width", "depth") if getattr(have, f) != getattr(want, f)]
    return " and ".join(f"model.{field}={getattr(have, field)}" for field in fields)


def _grid(have: Facts, want: Facts) -> str:
    side, ours = math.isqrt(have.patches), math.isqrt(want.patches)
    if side * side != have.patches:
        return f"the position embedding is for {have.patches} patches, which is no square"
    pixels = side * have.patch_size
    return (
        f"the position embedding is for {side} x {side} patches, the model has {ours} x {ours}: "
        f"set model.init_resize=true to resize it, or train at {pixels} pixels"
    )
