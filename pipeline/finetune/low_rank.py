"""Low-rank updates of attention (LoRA, Hu et al. 2021), and their merge into the weights.

Our own, for it is three products and a sum: the package peft would bring transformers and
accelerate into training, and knows neither our ViT nor its exports.

Shapes: d width in, e width out, r rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import PipelineError

ADAPTED = ("qkv", "proj")  # of each attention, in our ViT and in those of timm


class LowRankLinear(nn.Module):
    """A frozen linear layer, and an update of rank r that is learnt: `W x + up(down(x))`.

    The paper scales the update by alpha / r. Here alpha is r, so it is 1: at another rank the
    learning rate stays. `up` begins with 0, so the network begins as it was (section 4.1). One
    update serves query, key and value, which are one matrix here.
    """

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        bound = 1 / math.sqrt(linear.in_features)  # of a linear layer of torch
        drawn = torch.rand(rank, linear.in_features, generator=generator)
        weight = linear.weight
        self.down = nn.Parameter(
            ((2 * drawn - 1) * bound).to(weight.device, weight.dtype)
        )  # [r, d]
        self.up = nn.Parameter(weight.new_zeros(linear.out_features, rank))  # [e, r]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` to `[..., e]`."""
        out: Tensor = self.linear(x)
        return out + F.linear(F.linear(x, self.down), self.up)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One linear layer that gives the same, up to rounding."""
        self.linear.weight += self.up @ self.down
        return self.linear


def add_low_rank(backbone: nn.Module, rank: int, seed: int) -> int:
    """Replaces the linear layers of each attention, in place; gives how many.

    Args:
        backbone: of which all other weights are left as they are.
        rank: r.
        seed: of what is drawn.

    Raises:
        PipelineError: there is no attention, or the rank is not low.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = [
        (parent, name, child)
        for path, parent in backbone.named_modules()
        if path.rpartition(".")[2] == "attn"
        for name, child in parent.named_children()
        if name in ADAPTED and isinstance(child, nn.Linear)
    ]
    if not layers:
        raise PipelineError(
            "low-rank updates are made to attention, and this backbone has none that is known",
            "set finetune.tune=all or finetune.tune=head",
        )
    narrow = min(layer.in_features for _, _, layer in layers)
    if rank > narrow:
        raise PipelineError(
            f"finetune.rank={rank} is more than the width {narrow} of the backbone",
            f"set finetune.rank to {max(1, narrow // 8)} or so",
        )
    for parent, name, layer in layers:
        setattr(parent, name, LowRankLinear(layer, rank, generator))
    return len(layers)


def merge_low_rank(backbone: nn.Module) -> None:
    """Puts the updates into the weights, in place: the backbone is then what it was before."""
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LowRankLinear):
                setattr(parent, name, child.merged())
