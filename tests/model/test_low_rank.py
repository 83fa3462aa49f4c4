"""Low-rank updates: nothing at first, the paper's formula afterwards, the same when merged, and
those of the package peft.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import PipelineError
from pipeline.model.foreign import TimmSpec
from pipeline.model.low_rank import (
    LowRankConv2d,
    LowRankLinear,
    add_low_rank,
    merge_low_rank,
    merged_state,
)
from tests.finetune.small import backbone, classifier

FIELD = "train.tune=lora(rank=2)"


def learn(module: nn.Module) -> None:
    """Updates as after training: no longer 0."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, LowRankLinear | LowRankConv2d):
            part.low_rank_up.data = torch.randn(part.low_rank_up.shape, generator=generator)


def convolutions(last: dict[str, Any] | None = None) -> nn.Sequential:
    last = last or {"padding": 2, "dilation": 2, "padding_mode": "reflect"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.Conv2d(8, 8, 3, padding="same", groups=8, bias=False),
            nn.Conv2d(8, 16, 1, bias=False),
            nn.Conv2d(16, 16, 3, **last),
            nn.Flatten(),
            nn.Linear(16 * 16, 12),
        )


def test_it_begins_as_the_network_was_and_only_the_updates_learn() -> None:
    x = torch.randn(3, 3, 8, 8)
    plain, adapted = backbone(), backbone().requires_grad_(False)
    assert add_low_rank(adapted, 2, 0, FIELD) == 8  # qkv, proj and both of the MLP of two blocks
    assert torch.equal(plain(x), adapted(x))
    learnt = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert learnt == {
        f"blocks.{i}.{layer}.low_rank_{part}"
        for i in (0, 1)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for part in ("down", "up")
    }
    attention = backbone()
    assert add_low_rank(attention, 2, 0, FIELD, attention_only=True) == 4
    assert {name for name, _ in attention.named_parameters()} < {
        name for name, _ in adapted.named_parameters()
    }
    # the weights keep their names
    assert plain.state_dict().keys() == {
        name for name in adapted.state_dict() if "low_rank" not in name
    }


def test_it_is_the_formula_of_the_paper() -> None:
    linear, x = nn.Linear(6, 4), torch.randn(5, 6)
    layer = LowRankLinear(linear, 2, torch.Generator().manual_seed(0))
    learn(layer)
    up, down = layer.low_rank_up, layer.low_rank_down
    with torch.no_grad():
        expected = [linear.weight @ row + linear.bias + up @ (down @ row) for row in x]
        torch.testing.assert_close(layer(x), torch.stack(expected))


def test_a_convolution_is_one_whose_kernel_has_the_product_in_it() -> None:
    conv, x = nn.Conv2d(6, 4, 3, stride=2, padding=1), torch.randn(2, 6, 9, 9)
    kernel = conv.weight.detach().clone()
    layer = LowRankConv2d(conv, 2, torch.Generator().manual_seed(0))
    learn(layer)
    up, down = layer.low_rank_up.detach(), layer.low_rank_down.detach()
    update = torch.einsum("er,rdhw->edhw", up, down)
    expected = F.conv2d(x, kernel + update, conv.bias, stride=2, padding=1)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert torch.linalg.matrix_rank(update.flatten(1)) == 2


@pytest.mark.parametrize("network", ["vit", "swiglu", "convolutions", "timm vit", "timm cnn"])
def test_merged_it_gives_the_same_and_is_what_it_was(network: str) -> None:
    x = torch.randn(3, 3, 8, 8)
    if network == "vit":
        adapted: nn.Module = backbone()
    elif network == "swiglu":
        adapted = backbone(ffn="swiglu")
    elif network == "convolutions":
        adapted = convolutions()
    else:
        pytest.importorskip("timm")
        name = "test_vit" if network == "timm vit" else "test_efficientnet"
        x = torch.randn(3, 3, 32, 32)
        adapted = TimmSpec(name, image_size=32).build().eval()
    plain = copy.deepcopy(adapted)
    names = list(adapted.state_dict())
    assert add_low_rank(adapted, 1, 0, FIELD, image=x[:1]) > 2
    torch.testing.assert_close(adapted(x), plain(x), atol=1e-6, rtol=1e-6)
    learn(adapted)
    before = adapted(x)
    by_name = merged_state(adapted.state_dict())
    merge_low_rank(adapted)
    assert list(adapted.state_dict()) == names
    assert by_name.keys() == set(names)
    torch.testing.assert_close(adapted(x), before, atol=1e-5, rtol=1e-5)
    for name, tensor in adapted.state_dict().items():
        torch.testing.assert_close(by_name[name], tensor, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before, plain(x), atol=1e-3)
    assert not any("LowRank" in type(part).__name__ for part in adapted.modules())


@pytest.mark.parametrize("network", ["vit", "convolutions"])
def test_it_is_lora_of_peft(network: str) -> None:
    """The same weights put into both give the same outputs, gradients and merged weights."""
    peft = pytest.importorskip("peft")
    x = torch.randn(3, 3, 8, 8)
    # peft knows no dilation, and pads its update with zeros whatever the layer does
    ours = backbone() if network == "vit" else convolutions({"padding": 1})
    theirs = copy.deepcopy(ours)
    add_low_rank(ours, 2, 0, FIELD)
    learn(ours)
    adapted = {
        name: part
        for name, part in ours.named_modules()
        if isinstance(part, LowRankLinear | LowRankConv2d)
    }
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=list(adapted))
    theirs = peft.inject_adapter_in_model(config, theirs)
    for name, part in adapted.items():
        layer = theirs.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(part.low_rank_down)
        up = layer.lora_B["default"].weight.data
        up.copy_(part.low_rank_up.view(up.shape))
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for name, part in adapted.items():
        layer = theirs.get_submodule(name)
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for a, b in ((part.low_rank_down, down), (part.low_rank_up, up)):
            assert a.grad is not None
            torch.testing.assert_close(a.grad, b.grad.view(a.shape), atol=1e-3, rtol=1e-4)
    learnt = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert learnt == sum(p.numel() for n, p in ours.named_parameters() if ".low_rank_" in n)
    merge_low_rank(ours)
    for name in adapted:
        layer = theirs.get_submodule(name)
        layer.merge()
        torch.testing.assert_close(
            ours.get_submodule(name).weight, layer.get_base_layer().weight, atol=1e-6, rtol=1e-6
        )


class Reads(nn.Module):
    """Has one layer that it calls, and one whose weights it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn.proj(F.linear(x, self.attn.qkv.weight))  # type: ignore[union-attr, operator, arg-type]


def test_a_layer_that_is_not_called_gets_no_update() -> None:
    network = Reads()
    assert add_low_rank(network, 1, 0, FIELD, image=torch.zeros(1, 8)) == 1
    assert isinstance(network.attn.proj, LowRankLinear)  # type: ignore[union-attr]


def test_the_same_seed_draws_the_same() -> None:
    first, again, other = backbone(), backbone(), backbone()
    for network, seed in ((first, 0), (again, 0), (other, 1)):
        state = torch.get_rng_state()
        add_low_rank(network, 2, seed, FIELD)
        assert torch.equal(torch.get_rng_state(), state)
    name = "blocks.0.mlp.fc1.low_rank_down"
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_what_learns_follows_from_the_settings_of_fine_tuning() -> None:
    learnt = {}
    for tune in ("all", "head", "low_rank"):
        named = classifier(tune=tune).named_parameters()
        learnt[tune] = {name for name, p in named if p.requires_grad}
    assert learnt["head"] == {"head.weight", "head.bias"}
    assert "backbone.mask_token" not in learnt["all"]
    assert "backbone.blocks.0.mlp.fc1.weight" in learnt["all"]
    assert {name.rpartition(".")[2] for name in learnt["low_rank"] - learnt["head"]} == {
        "low_rank_down",
        "low_rank_up",
    }
    assert not any("mlp" in name for name in learnt["low_rank"])


def test_what_has_no_layer_or_is_too_narrow_is_refused() -> None:
    with pytest.raises(PipelineError, match="no linear layer and no convolution"):
        add_low_rank(nn.Sequential(nn.LayerNorm(3)), 2, 0, FIELD)
    with pytest.raises(PipelineError, match=r"finetune.rank=17 is no low rank: .* than 16"):
        add_low_rank(backbone(), 17, 0, "finetune.rank=17", attention_only=True)
