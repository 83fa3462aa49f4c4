"""The projection head: an MLP to a bottleneck, L2 normalisation, and weight-normed prototypes.

BatchNorm after each hidden layer and on the feature is what DINO (2021, section 5.3) tried and
what small convolutional encoders learn better with.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import PipelineError


class Prototypes(nn.Module):
    """Linear layer without bias whose rows are `weight_g * weight_v / |weight_v|`; both are
    trained.
    """

    def __init__(self, bottleneck: int, prototypes: int, float32: bool = False) -> None:
        """Directions uniform, lengths 1. `float32`: logits are float32 under autocast too."""
        super().__init__()
        self.float32 = float32
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(prototypes, bottleneck))
        bound = 1 / math.sqrt(bottleneck)
        nn.init.uniform_(self.weight_v, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, bottleneck]` to `[N, K]`."""
        length = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        weight = self.weight_v * (self.weight_g / length)
        if not self.float32:
            return F.linear(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), weight.float())


Norm = Literal["none", "batch"]


class Norms(NamedTuple):
    """Where a head has BatchNorm."""

    hidden: Norm = "none"  # after each hidden layer, before its GELU
    feature: Norm = "none"  # on what the head gets, without weights of its own


PLAIN = Norms()  # nowhere


class RowNorm(nn.BatchNorm1d):
    """BatchNorm over the first rows of `[N, D]`: those behind them fill a batch up and count in no
    statistics; what they become is used nowhere.

    In training mode the statistics are those of this worker's micro batch. Fewer than two rows have
    none: they are normalised by the running ones.
    """

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """`[N, D]` to `[N, D]`.

        Args:
            x: rows.
            rows: how many count; None: all.
        """
        count = len(x) if rows is None else rows
        if not self.training or count < 2:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        if count == len(x):
            return super().forward(x)
        return torch.cat([super().forward(x[:count]), x[count:]])


class HeadMLP(nn.Sequential):
    """The layers before the bottleneck; keys are those of `nn.Sequential`."""

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """`[N, D]` to `[N, bottleneck]`; `rows` as for `RowNorm`."""
        for layer in self:
            x = layer(x, rows) if isinstance(layer, RowNorm) else layer(x)
        return x


class Head(nn.Module):
    """Scores of tokens against K prototypes (DINOv2 layers/dino_head.py); keys `mlp.*`,
    `last_layer.weight_g/_v`, `input_norm.*` where there is one.
    """

    def __init__(
        self,
        width: int,
        prototypes: int = 65536,  # 131072 in the long recipe
        bottleneck: int = 256,  # 384 for the DINO head of the long recipe
        hidden: int = 2048,
        layers: int = 3,
        float32: bool = False,  # logits under autocast too
        norms: Norms = PLAIN,
    ) -> None:
        """Build and initialise: Linear truncated normal 0.02, bias 0, directions uniform, lengths
        1.

        Raises:
            PipelineError: fewer than one layer.
        """
        super().__init__()
        if layers < 1:
            raise PipelineError(f"a head of {layers} layers", "use at least 1 (the papers use 3)")
        sizes = [width, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(sizes), 1):
            # BatchNorm takes a bias away again: a layer before it has none
            hidden = norms.hidden == "batch" and number < layers
            linear = nn.Linear(before, after, bias=not hidden)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if not hidden:
                nn.init.zeros_(linear.bias)
            parts += [linear, *([RowNorm(after)] if hidden else []), nn.GELU()]
        parts.pop()
        self.input_norm = RowNorm(width, affine=False) if norms.feature == "batch" else None
        # One layer has the key `mlp.weight` in the reference, several have `mlp.0.weight`,
        # `mlp.2.weight` ...
        self.mlp = parts[0] if layers == 1 else HeadMLP(*parts)
        self.last_layer = Prototypes(bottleneck, prototypes, float32)

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """Tokens `[N, D]` to logits `[N, K]`, bounded by `|weight_g|`. An empty `x` keeps every
        parameter in the graph.

        Args:
            x: tokens.
            rows: how many of them count in the statistics of BatchNorm, the first; None: all.
        """
        if self.input_norm is not None:
            x = self.input_norm(x, rows)
        projected = self.mlp(x, rows) if isinstance(self.mlp, HeadMLP) else self.mlp(x)
        # The length is taken in fp32: squares of bf16 values lose too much.
        logits: Tensor = self.last_layer(F.normalize(projected.float(), dim=-1, eps=1e-12))
        return logits
