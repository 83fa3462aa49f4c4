"""Transformer blocks over packed tokens.

All views of a step travel as one matrix of tokens, so every linear layer runs once; only attention
looks at where one view ends and the next begins. T tokens in all, D width, H heads, n views of N
tokens each in a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.views.copies import sent

LAYER_NORM_EPS = 1e-6  # the reference; torch's own default is 1e-5

Group = tuple[int, int]  # (views, tokens per view) of one crop size


class Subset(NamedTuple):
    """The tokens one residual branch runs on: stochastic depth on a subset of the views."""

    groups: tuple[Group, ...]
    rows: Tensor  # [T'] rows of the packed tokens
    scale: Tensor  # [T', 1] views / views kept, so that the expectation stays


def draw_subsets(
    groups: Sequence[Group],
    rate: float,
    branches: int,
    generator: torch.Generator | None,
    device: torch.device,
) -> list[Subset]:
    """Draw the views that each of `branches` residual branches keeps (DINOv2 layers/block.py).

    Of a group of n views `max(int(n * (1 - rate)), 1)` are kept, drawn anew for every branch and
    group, branches first. All draws are made here and travel in one copy, as views, of which the
    device makes rows. The blocks hold no randomness.
    """
    source = generator.device if generator is not None else torch.device("cpu")
    kept = tuple((max(int(n * (1 - rate)), 1), tokens) for n, tokens in groups)
    picked = torch.empty(branches, sum(views for views, _ in kept), dtype=torch.long, device=source)
    for branch in range(branches):
        start = 0
        for (views, _), (kept_views, _) in zip(groups, kept, strict=True):
            order = torch.randperm(views, generator=generator, device=source)
            picked[branch, start : start + kept_views] = order[:kept_views]
            start += kept_views
    indices, scales, offset = [], [], 0
    chosen = torch.split(sent(picked, device), [views for views, _ in kept], dim=1)
    for (views, tokens), (kept_views, _), of_group in zip(groups, kept, chosen, strict=True):
        inside = torch.arange(tokens, device=device)
        indices.append((offset + of_group[:, :, None] * tokens + inside).flatten(1))
        scales.append(torch.full((kept_views * tokens, 1), views / kept_views, device=device))
        offset += views * tokens
    index, scale = torch.cat(indices, dim=1), torch.cat(scales)
    return [Subset(kept, index[branch], scale) for branch in range(branches)]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(d)) v over the tokens of each view, [views, heads, tokens, d].

    torch's fused kernel is the best one on GPUs and in float32. In bfloat16 on a CPU its backward
    pass is up to 7 times slower than the products written out (benchmarks/RESULTS.md).
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head self-attention inside each view; qkv packed as [q; k; v]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, groups: Sequence[Group]) -> Tensor:
        """Tokens `[T, D]` to `[T, D]`."""
        qkv = self.qkv(x)
        outputs = []
        for part, (views, tokens) in zip(
            qkv.split([views * tokens for views, tokens in groups]), groups, strict=True
        ):
            q, k, v = part.view(views, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            out = _attend(q, k, v)
            outputs.append(out.transpose(1, 2).reshape(views * tokens, -1))
        mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        projected: Tensor = self.proj(mixed)
        return projected


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, D]`."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGlu(nn.Module):
    """Gated feed-forward layer; the hidden width is two thirds of `hidden`, rounded up to a
    multiple of 8.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        inner = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(width, 2 * inner)
        self.w3 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, D]`."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """`[T, D]` to `[T, D]`."""
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm block: attention and feed-forward, each scaled and added to its input."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, ffn: str, layer_scale: float
    ) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = SwiGlu(width, hidden) if ffn == "swiglu" else Mlp(width, hidden)
        self.ls2 = LayerScale(width, layer_scale)

    def forward(
        self,
        x: Tensor,
        groups: tuple[Group, ...],
        attention_subset: Subset | None = None,
        mlp_subset: Subset | None = None,
    ) -> Tensor:
        """Packed tokens `[T, D]` to `[T, D]`; with subsets, each branch runs on its subset only."""
        if attention_subset is None:
            x = (x + self.ls1(self.attn(self.norm1(x), groups))).to(x.dtype)
        else:
            part = self.norm1(x[attention_subset.rows])
            x = _add(x, self.ls1(self.attn(part, attention_subset.groups)), attention_subset)
        if mlp_subset is None:
            out: Tensor = (x + self.ls2(self.mlp(self.norm2(x)))).to(x.dtype)
            return out
        return _add(x, self.ls2(self.mlp(self.norm2(x[mlp_subset.rows]))), mlp_subset)


def _add(x: Tensor, residual: Tensor, subset: Subset) -> Tensor:
    # Every row occurs once in the index, so the sum is deterministic on any device.
    return x.index_add(0, subset.rows, (residual * subset.scale).to(x.dtype))
