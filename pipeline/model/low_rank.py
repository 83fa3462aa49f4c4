"""Low-rank updates of a network's matrices and kernels (LoRA, Hu et al. 2021), and their merge.

Our own, for it is three products and a sum: the package peft would bring transformers and
accelerate into training, gives other names to the weights that it wraps, and knows neither our
checkpoints nor our exports. `tests/model/test_low_rank.py` holds both against each other.

Here a layer keeps its class and the names of its weights, and gets two more: `low_rank_down` and
`low_rank_up`. So rates by layer, slices over workers and checkpoints find what they know.

Shapes: d width in, e width out, r rank; of a convolution d and e channels, k side of the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import PipelineError

DOWN, UP = "low_rank_down", "low_rank_up"
ATTENTION = ("qkv", "proj")  # of each attention, in our ViT and in those of timm
Layer = nn.Linear | nn.Conv2d
T = TypeVar("T", nn.Linear, nn.Conv2d)


class LowRankLinear(nn.Linear):
    """A frozen linear layer, and an update of rank r that is learnt: `W x + up(down(x))`.

    The paper scales the update by alpha / r. Here alpha is r, so it is 1: at another rank the
    learning rate stays. `up` begins with 0, so the network begins as it was (section 4.1). One
    update serves query, key and value, which are one matrix here.
    """

    low_rank_down: nn.Parameter  # [r, d]
    low_rank_up: nn.Parameter  # [e, r]

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias, device="meta")
        _take(self, linear, rank, generator)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` to `[..., e]`."""
        out = F.linear(x, self.weight, self.bias)
        return out + F.linear(F.linear(x, self.low_rank_down), self.low_rank_up)

    def merged(self) -> nn.Linear:
        """One linear layer that gives the same, up to rounding."""
        bias = self.bias is not None
        plain = nn.Linear(self.in_features, self.out_features, bias, device="meta")
        return _give(self, plain)


class LowRankConv2d(nn.Conv2d):
    """A frozen convolution, and an update that is learnt: a convolution with the same kernel size
    to r channels, and one of 1 x 1 from them. All its products together have rank r.
    """

    low_rank_down: nn.Parameter  # [r, d, k, k]
    low_rank_up: nn.Parameter  # [e, r]

    def __init__(self, conv: nn.Conv2d, rank: int, generator: torch.Generator) -> None:
        super().__init__(**_conv_arguments(conv))
        _take(self, conv, rank, generator)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, d, H, W]` to `[B, e, H', W']`."""
        out: Tensor = self._conv_forward(x, self.weight, self.bias)
        low = self._conv_forward(x, self.low_rank_down, None)
        return out + F.conv2d(low, self.low_rank_up[:, :, None, None])

    def merged(self) -> nn.Conv2d:
        """One convolution that gives the same, up to rounding."""
        return _give(self, nn.Conv2d(**_conv_arguments(self)))


def _conv_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    return {name: getattr(conv, name) for name in (*names, "groups", "padding_mode")} | {
        "bias": conv.bias is not None,
        "device": "meta",
    }


def _take(layer: nn.Module, plain: Layer, rank: int, generator: torch.Generator) -> None:
    """Gives a layer the weights of a plain one, which freeze, and an update that is 0."""
    for name, parameter in plain.named_parameters(recurse=False):
        parameter.requires_grad_(False)
        layer.register_parameter(name, parameter)
    weight = plain.weight
    bound = 1 / math.sqrt(weight[0].numel())  # of a linear layer or a convolution of torch
    drawn = torch.rand(rank, *weight.shape[1:], generator=generator)
    layer.low_rank_down = nn.Parameter(((2 * drawn - 1) * bound).to(weight.device, weight.dtype))
    layer.low_rank_up = nn.Parameter(weight.new_zeros(len(weight), rank))
    layer.train(plain.training)


@torch.no_grad()
def _give(layer: LowRankLinear | LowRankConv2d, plain: T) -> T:
    """Gives a plain layer the weights with their update."""
    layer.weight += product(layer.low_rank_up, layer.low_rank_down)
    for name in ("weight", "bias"):
        plain.register_parameter(name, getattr(layer, name))
    return plain.train(layer.training)


def product(up: Tensor, down: Tensor) -> Tensor:
    """The update of the weights: `[e, r]` and `[r, …]` to `[e, …]`."""
    return (up @ down.flatten(1)).view(len(up), *down.shape[1:])


def add_low_rank(
    backbone: nn.Module,
    rank: int,
    seed: int,
    field: str,
    attention_only: bool = False,
    image: Tensor | None = None,
) -> int:
    """Replaces layers in place; gives how many.

    A network with attention gets updates of the linear layers of attention and MLP; another one of
    its linear layers and its convolutions, but for those in groups. A layer that has no more
    weights than its update stays as it is.

    Args:
        backbone: of which all other weights are left as they are.
        rank: r.
        seed: of what is drawn.
        field: of the recipe, that says the rank; for what is said.
        attention_only: leave the MLPs of a network with attention out (section 4.2 of the paper).
        image: `[1, C, S, S]`; layers that a forward of it does not call are left out, for their
            weights are read in another way. None: all are called.

    Raises:
        PipelineError: there is no such layer, or the rank is not low.
    """
    places = _places(backbone, attention_only)
    if image is not None:
        called = _called(backbone, [layer for _, _, layer in places], image)
        places = [place for place in places if place[2] in called]
    if not places:
        raise PipelineError(
            f"{field}: this backbone has no linear layer and no convolution that is known",
            f"set {field.partition('=')[0]} to another value",
        )
    fitting = [place for place in places if _smaller(place[2], rank)]
    if not fitting:
        widest = max(min(len(x.weight), x.weight[0].numel()) for _, _, x in places)
        raise PipelineError(
            f"{field} is no low rank: no matrix of this backbone has more rows and columns than "
            f"{widest}, and an update has as many weights as the matrix",
            f"take a rank of {max(1, widest // 8)} or so",
        )
    generator = torch.Generator().manual_seed(seed)
    for parent, name, layer in fitting:
        kind = LowRankLinear if isinstance(layer, nn.Linear) else LowRankConv2d
        setattr(parent, name, kind(layer, rank, generator))  # type: ignore[arg-type]
    return len(fitting)


Place = tuple[nn.Module, str, Layer]  # a parent, and the name and module of its child


def _places(backbone: nn.Module, attention_only: bool) -> list[Place]:
    """Where an update can be."""
    layers = [
        (path.split("."), (parent, name, child))
        for path, parent in backbone.named_modules()
        for name, child in parent.named_children()
        # of these very classes: others compute with their weights in ways of their own
        if type(child) is nn.Linear or (type(child) is nn.Conv2d and child.groups == 1)
    ]
    attention = [
        place
        for path, place in layers
        if path[-1] == "attn" and place[1] in ATTENTION and isinstance(place[2], nn.Linear)
    ]
    if not attention:
        return [place for _, place in layers]
    return (
        attention
        if attention_only
        else [
            place
            for path, place in layers
            if {"attn", "mlp"} & set(path) and isinstance(place[2], nn.Linear)
        ]
    )


def _smaller(layer: Layer, rank: int) -> bool:
    weight = layer.weight
    return rank * (len(weight) + weight[0].numel()) < weight.numel()


@torch.no_grad()
def _called(backbone: nn.Module, layers: Iterable[Layer], image: Tensor) -> set[nn.Module]:
    """The layers that a forward calls; some networks read the weights of a layer instead."""
    called: set[nn.Module] = set()
    hooks = [
        layer.register_forward_hook(lambda module, inputs, out: called.add(module))
        for layer in layers
    ]
    was = backbone.training
    backbone.eval()(image)
    backbone.train(was)
    for hook in hooks:
        hook.remove()
    return called


def merge_low_rank(backbone: nn.Module) -> None:
    """Puts the updates into the weights, in place: the backbone is then what it was before."""
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LowRankLinear | LowRankConv2d):
                setattr(parent, name, child.merged())


def merged_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name without updates: these are in the weights, of which others get no copy."""
    ends = (f".{DOWN}", f".{UP}")
    plain = {name: x for name, x in state.items() if not name.endswith(ends)}
    for name, up in state.items():
        layer, end = name.rpartition(".")[0], f".{name.rpartition('.')[2]}"
        if end == ends[1]:
            weight = f"{layer}.weight"
            plain[weight] = plain[weight] + product(up, state[f"{layer}.{DOWN}"])
    return plain
