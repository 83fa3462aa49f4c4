"""Attention of the CLS token: against transformers, timm, and softmax written out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.encoders.module import ModuleBackbone
from pipeline.model.foreign import TimmSpec
from pipeline.model.vit import VisionTransformer
from pipeline.model.weights import save_huggingface
from pipeline.use.attention import attention
from tests.use.made import SPEC, Colours, drawn, images

SIZES = [(28, 28), (14, 42), (56, 35)]


def by_hand(backbone: VisionTransformer, x: Tensor, number: int) -> Tensor:
    """Softmax attention of the CLS token in ten lines."""
    tokens = backbone.tokens(x)
    for block in backbone.blocks[:number]:
        tokens = block(tokens.flatten(0, 1), ((len(x), tokens.shape[1]),)).view(tokens.shape)
    block = backbone.blocks[number]
    heads, width = block.attn.heads, tokens.shape[-1] // block.attn.heads
    q, k, _ = block.attn.qkv(block.norm1(tokens)).chunk(3, -1)
    maps = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = torch.einsum("bd,bnd->bn", q[:, 0, part], k[:, :, part]) / math.sqrt(width)
        maps.append(scores.exp() / scores.exp().sum(1, keepdim=True))
    return torch.stack(maps, 1)[:, :, 1 + backbone.registers :]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", [0, 1, -1])
def test_softmax_written_out(size: tuple[int, int], block: int) -> None:
    backbone, x = drawn(), images(2, *size)
    maps = attention(backbone, x, block)
    assert maps.shape == (2, 3, size[0] // 7, size[1] // 7)
    with torch.no_grad():
        expected = by_hand(backbone.eval(), x, block % 3)
    torch.testing.assert_close(maps.flatten(2), expected, rtol=1e-5, atol=1e-6)
    assert ((maps.sum((2, 3)) < 1) & (maps.sum((2, 3)) > 0)).all()  # the rest is of CLS, registers


@pytest.mark.parametrize("size", [(28, 28), (42, 42)])
def test_transformers_gives_the_same_on_exported_weights(
    size: tuple[int, int], tmp_path: Path
) -> None:
    transformers: Any = pytest.importorskip("transformers", reason="needs transformers")
    backbone, x = drawn(), images(2, *size)
    save_huggingface(backbone, SPEC, tmp_path, Preprocessing(28, [0.5] * 3, [0.5] * 3))
    model = transformers.AutoModel.from_pretrained(
        tmp_path, local_files_only=True, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        theirs = model(pixel_values=x, output_attentions=True).attentions
    for block in range(3):
        expected = theirs[block][:, :, 0, 1 + SPEC.registers :]
        torch.testing.assert_close(
            attention(backbone, x, block).flatten(2), expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224"]
)
@pytest.mark.parametrize("fused", [True, False])
def test_a_vit_of_timm(name: str, fused: bool) -> None:
    """Against the probabilities that timm's own unfused attention drops out."""
    pytest.importorskip("timm", reason="needs timm")
    patch = 14 if "14" in name else 16
    torch.manual_seed(0)
    network = TimmSpec(name, image_size=4 * patch, patch_size=patch).build()
    x = images(2, 4 * patch, 6 * patch)
    attends = network.module.blocks[1].attn
    attends.fused_attn = fused
    maps = attention(network, x, 1)
    assert attends.fused_attn == fused  # as before
    kept = []
    attends.fused_attn = False
    attends.attn_drop.register_forward_hook(lambda _, inputs, out: kept.append(out))
    with torch.no_grad():
        network.eval().forward_features(x)
    expected = kept[0][:, :, 0, network.prefix_tokens :]
    torch.testing.assert_close(maps.flatten(2), expected, rtol=1e-5, atol=1e-6)


def test_the_network_is_as_before() -> None:
    backbone = drawn().train()
    backbone.blocks[0].eval()
    attention(backbone, images(1, 28, 28))
    assert backbone.training and not backbone.blocks[0].training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in backbone.modules())


@pytest.mark.parametrize(
    ("network", "size", "block", "what"),
    [
        (drawn(), (28, 27), -1, "images of 28 x 27 pixels, but the patch size is 7"),
        (drawn(), (28, 28), 3, "block 3 of a network with 3 blocks"),
        (drawn(), (28, 28), -4, "block -4 of a network with 3 blocks"),
        (Colours(7), (28, 28), -1, "attention of a Colours is not known"),
        (ModuleBackbone(nn.Flatten(), 2352), (28, 28), -1, "only one vector an image"),
    ],
)
def test_sentences(network: nn.Module, size: tuple[int, int], block: int, what: str) -> None:
    with pytest.raises(PipelineError, match=what) as error:
        attention(network, images(1, *size), block)
    assert error.value.hint


def test_timm_without_what_is_needed() -> None:
    pytest.importorskip("timm", reason="needs timm")
    x = images(1, 64, 64)
    with pytest.raises(PipelineError, match="only one vector an image"):
        attention(TimmSpec("resnet18", image_size=64).build(), x)
    pooled = TimmSpec("test_vit3", image_size=64, patch_size=16).build()
    with pytest.raises(PipelineError, match="no CLS token"):
        attention(pooled, x)


def test_channels_that_the_network_does_not_take() -> None:
    with pytest.raises(PipelineError, match="does not take 4 channels of 28 x 28 pixels"):
        attention(drawn(), images(1, 28, 28, channels=4))
