"""The projection head: an MLP to a bottleneck, L2 normalisation, and weight-normed prototypes."""

from __future__ import annotations

import math
from itertools import pairwise

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


class Head(nn.Module):
    """Scores of tokens against K prototypes (DINOv2 layers/dino_head.py); keys `mlp.*`,
    `last_layer.weight_g/_v`.
    """

    def __init__(
        self,
        width: int,
        prototypes: int = 65536,  # 131072 in the long recipe
        bottleneck: int = 256,  # 384 for the DINO head of the long recipe
        hidden: int = 2048,
        layers: int = 3,
        float32: bool = False,  # logits under autocast too
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
        for before, after in pairwise(sizes):
            linear = nn.Linear(before, after)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            parts += [linear, nn.GELU()]
        parts.pop()
        # One layer has the key `mlp.weight` in the reference, several have `mlp.0.weight`,
        # `mlp.2.weight` ...
        self.mlp = parts[0] if layers == 1 else nn.Sequential(*parts)
        self.last_layer = Prototypes(bottleneck, prototypes, float32)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[N, D]` to logits `[N, K]`, bounded by `|weight_g|`. An empty `x` keeps every
        parameter in the graph.
        """
        projected = self.mlp(x)
        # The length is taken in fp32: squares of bf16 values lose too much.
        logits: Tensor = self.last_layer(F.normalize(projected.float(), dim=-1, eps=1e-12))
        return logits
