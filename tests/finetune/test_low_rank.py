"""Low-rank updates: nothing at first, the paper's formula afterwards, and the same when merged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.errors import PipelineError
from pipeline.finetune.low_rank import LowRankLinear, add_low_rank, merge_low_rank
from tests.finetune.small import backbone, classifier


def learn(module: nn.Module) -> None:
    """Updates as after training: no longer 0."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, LowRankLinear):
            part.up.data = torch.randn(part.up.shape, generator=generator)


def test_it_begins_as_the_network_was_and_only_the_updates_learn() -> None:
    x = torch.randn(3, 3, 8, 8)
    plain, adapted = backbone(), backbone().requires_grad_(False)
    assert add_low_rank(adapted, 2, seed=0) == 4  # qkv and proj of two blocks
    assert torch.equal(plain(x), adapted(x))
    learnt = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert learnt == {
        f"blocks.{i}.attn.{layer}.{part}"
        for i in (0, 1)
        for layer in ("qkv", "proj")
        for part in ("down", "up")
    }


def test_it_is_the_formula_of_the_paper() -> None:
    linear, x = nn.Linear(6, 4), torch.randn(5, 6)
    layer = LowRankLinear(linear, 2, torch.Generator().manual_seed(0))
    learn(layer)
    with torch.no_grad():
        expected = [linear.weight @ row + linear.bias + layer.up @ (layer.down @ row) for row in x]
        torch.testing.assert_close(layer(x), torch.stack(expected))


def test_merged_it_gives_the_same_and_is_what_it_was() -> None:
    x = torch.randn(3, 3, 8, 8)
    adapted = backbone()
    names = list(adapted.state_dict())
    add_low_rank(adapted, 3, seed=0)
    learn(adapted)
    before = adapted(x)
    merge_low_rank(adapted)
    assert list(adapted.state_dict()) == names
    torch.testing.assert_close(adapted(x), before, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, backbone()(x), atol=1e-2)


def test_what_learns_follows_from_the_settings() -> None:
    learnt = {}
    for tune in ("all", "head", "low_rank"):
        named = classifier(tune=tune).named_parameters()
        learnt[tune] = {name for name, p in named if p.requires_grad}
    assert learnt["head"] == {"head.weight", "head.bias"}
    assert "backbone.mask_token" not in learnt["all"]
    assert "backbone.blocks.0.mlp.fc1.weight" in learnt["all"]
    assert {name.rpartition(".")[2] for name in learnt["low_rank"] - learnt["head"]} == {
        "down",
        "up",
    }


def test_what_has_no_attention_or_is_too_narrow_is_refused() -> None:
    with pytest.raises(PipelineError, match="this backbone has none"):
        add_low_rank(nn.Sequential(nn.Linear(3, 3)), 2, 0)
    with pytest.raises(PipelineError, match=r"finetune.rank=17 is more than the width 16"):
        add_low_rank(backbone(), 17, 0)
