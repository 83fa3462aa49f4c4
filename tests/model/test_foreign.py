"""Foreign encoders: timm models against timm itself, and free modules."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.encoders.module import ModuleBackbone
from pipeline.model.foreign import TimmSpec, check_sizes
from pipeline.model.foreign_weights import fit_foreign, load_any, save_foreign, verify_foreign
from pipeline.model.groups import parameter_groups
from pipeline.model.pair import HeadSpec, build_pair, ema_update

timm = pytest.importorskip("timm", reason="needs timm")

VIT = TimmSpec("vit_tiny_patch16_224", image_size=64, patch_size=16)
HEAD = HeadSpec(prototypes=16, bottleneck=8, hidden=16)
NONE = torch.zeros(0, dtype=torch.long)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_vit_is_the_model_of_timm() -> None:
    torch.manual_seed(0)
    ours = VIT.build().eval()
    theirs = timm.create_model(VIT.name, num_classes=0, img_size=64, dynamic_img_size=True).eval()
    theirs.load_state_dict(ours.module.state_dict())
    for size in (64, 32, 96):  # not the native one: position embeddings are resized by timm
        x = drawn(2, 3, size, size)
        out = theirs.forward_features(x)
        features = ours.forward_features(x)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
        torch.testing.assert_close(features["x_norm_patchtokens"], out[:, 1:], rtol=0, atol=0)


def test_a_hidden_patch_is_replaced_by_the_mask_token() -> None:
    torch.manual_seed(0)
    ours = VIT.build().eval()
    nn.init.normal_(ours.mask_token)
    x = drawn(2, 3, 64, 64)
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, 5] = True
    hidden = ours.forward_features(x, masks)["x_norm_patchtokens"]
    other = x.clone()
    other[0, :, 16:32, 16:32] = 7.0  # what is under patch 5 (second row, second column)
    assert torch.equal(ours.forward_features(other, masks)["x_norm_patchtokens"], hidden)
    plain = ours.forward_features(x)["x_norm_patchtokens"]
    assert torch.equal(hidden[1], plain[1])
    assert not torch.allclose(hidden[0, 5], plain[0, 5])
    # by hand: timm's own forward, with the token put in between
    model = ours.module
    embedded = model.patch_embed(x)
    embedded[0, 1, 1] = ours.mask_token[0]
    tokens = model.norm(model.blocks(model.norm_pre(model._pos_embed(embedded))))
    torch.testing.assert_close(hidden, tokens[:, 1:], rtol=0, atol=0)


def test_encode_gives_cls_of_all_views_then_the_chosen_patches() -> None:
    torch.manual_seed(0)
    ours = VIT.build().eval()
    big, small = drawn(2, 3, 64, 64), drawn(3, 3, 32, 32, seed=1)
    places = torch.tensor([3, 16 + 5])
    encoded = ours.encode([big, small], [None, None], places)
    patches = ours.forward_features(big)["x_norm_patchtokens"]
    assert patches is not None
    expected = [ours(big), ours(small), patches[0, 3][None], patches[1, 5][None]]
    torch.testing.assert_close(encoded, torch.cat(expected))


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_a_convolutional_model_has_no_patches(name: str) -> None:
    torch.manual_seed(0)
    ours = TimmSpec(name, image_size=64, patch_size=32).build().eval()
    assert not ours.has_patches
    assert not any("mask_token" in n for n, _ in ours.named_parameters())
    x = drawn(2, 3, 64, 64)
    theirs = timm.create_model(name, num_classes=0).eval()
    theirs.load_state_dict(ours.module.state_dict())
    assert torch.equal(ours(x), theirs(x))
    assert ours(x).shape == (2, ours.width)
    with pytest.raises(PipelineError, match="iBOT needs patch tokens"):
        ours.encode([x], [None], torch.tensor([0]))


def test_batch_norm_of_the_teacher_normalises_with_the_batch() -> None:
    """As in DINO: running means of the student do not fit averaged weights. By hand: a copy of the
    teacher's weights in training mode gives the teacher's targets.
    """
    pair = build_pair(TimmSpec("resnet10t", image_size=32), HEAD, None, seed=0)
    x = drawn(4, 3, 32, 32)
    for _ in range(2):
        expected = copy.deepcopy(pair.teacher).train()(x, None, None, NONE).dino
        torch.testing.assert_close(pair.teacher(x, None, None, NONE).dino, expected)
        with torch.no_grad():
            for p in pair.student.parameters():
                p.add_(0.1 * torch.randn_like(p))
        ema_update(pair, 0.5)
    name = next(n for n, _ in pair.teacher.named_buffers() if n.endswith("running_mean"))
    assert dict(pair.teacher.named_buffers())[name].abs().sum() > 0  # kept for evaluation
    assert not any(m.training for m in build_pair(VIT, HEAD, None, seed=0).teacher.modules())


def test_layers_are_those_of_timm() -> None:
    """Against timm's own groups for layerwise decay."""
    from timm.optim import param_groups_layer_decay

    pair = build_pair(VIT, HEAD, None, seed=0)
    module = pair.student.backbone.module
    expected: dict[int, float] = {
        id(p): group["lr_scale"]
        for group in param_groups_layer_decay(module, layer_decay=0.5, weight_decay=0.1)
        for p in group["params"]
    }
    factors = {
        id(p): group["lr_multiplier"]
        for group in parameter_groups(pair.student, 0.5, 1.0)
        for p in group["params"]
    }
    assert {factors[key] / factor for key, factor in expected.items()} == {1.0}
    decays = {
        name: group["weight_decay_multiplier"]
        for group in parameter_groups(pair.student)
        for name in group["names"]
    }
    assert decays["backbone.module.blocks.0.norm1.weight"] == 0
    assert decays["backbone.module.blocks.0.attn.qkv.weight"] == 1
    assert len(decays) == len(list(pair.student.parameters()))


def test_drop_path_is_drawn_from_the_generator_alone() -> None:
    pair = build_pair(replace(VIT, drop_path=0.5), HEAD, None, seed=0)
    x, outputs = drawn(8, 3, 32, 32), []
    for seed in (1, 1, 2):
        torch.manual_seed(len(outputs))  # must not matter
        generator = torch.Generator().manual_seed(seed)
        before = torch.get_rng_state()
        outputs.append(pair.student(x, None, None, NONE, generator=generator).cls)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def test_a_copy_hides_its_own_patches() -> None:
    """The hook of a deep copy must belong to the copy: the teacher is one."""
    ours = VIT.build().eval()
    nn.init.normal_(ours.mask_token)
    copied = copy.deepcopy(ours)
    nn.init.zeros_(copied.mask_token)
    x, masks = drawn(1, 3, 64, 64), torch.ones(1, 16, dtype=torch.bool)
    assert not torch.allclose(copied.features(x, masks)[0], ours.features(x, masks)[0])
    assert torch.equal(copied.features(x, None)[0], ours.features(x, None)[0])


@pytest.mark.parametrize(
    ("spec", "what", "hint"),
    [
        (TimmSpec("vit_tiny_patch16_242"), "no model 'vit_tiny_patch16_242'", "vit_tiny_patch16"),
        (replace(VIT, patch_size=14), "has patches of 16 pixels, not 14", "model.patch_size=16"),
    ],
)
def test_what_timm_does_not_have(spec: TimmSpec, what: str, hint: str) -> None:
    with pytest.raises(PipelineError, match=what) as caught:
        spec.build()
    assert hint in caught.value.hint


def test_a_size_that_the_encoder_does_not_take() -> None:
    fixed = TimmSpec("mixer_s32_224", image_size=64, patch_size=32).build()
    with pytest.raises(PipelineError, match="32 x 32 pixels") as caught:
        check_sizes(fixed, 3, [64, 32])
    assert "local_crops=0" in caught.value.hint


def test_weights_of_the_same_model_fit_and_others_do_not() -> None:
    source = timm.create_model(VIT.name, num_classes=10, img_size=64)
    ours = VIT.build()
    text = fit_foreign(ours, source.state_dict(), "x.safetensors")
    assert "2 of a classifier left out" in text
    assert torch.equal(ours.module.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)
    broken = source.state_dict()
    broken["blocks.0.extra"] = broken.pop("blocks.0.norm1.weight")
    with pytest.raises(PipelineError) as caught:
        fit_foreign(ours, broken, "x.safetensors")
    assert "missing blocks.0.norm1.weight; unexpected blocks.0.extra" in caught.value.what


@pytest.mark.parametrize("other", ["resnet18", "vit_base_patch16_224"])
def test_weights_of_another_model_are_told_in_one_sentence(other: str) -> None:
    """Three names of a kind and their number, not all thousand."""
    state = timm.create_model(other, num_classes=0).state_dict()
    with pytest.raises(PipelineError) as caught:
        fit_foreign(VIT.build(), state, "x.safetensors")
    said = caught.value.what
    assert len(said) < 500
    assert "model.encoder" in caught.value.hint
    if other == "resnet18":
        assert f"{len(state)} unexpected, such as conv1.weight, bn1.weight, bn1.bias" in said
        assert re.search(r"15\d missing, such as cls_token, pos_embed, patch_embed", said)
    else:
        assert "cls_token: (1, 1, 768), expected (1, 1, 192)" in said
        assert re.search(r"1\d\d of another shape, such as", said)


class Pooled(nn.Module):
    """[B, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


class Tokens(Pooled):
    """[B, 1 + P, D], hides masked patches itself."""

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        patches = self.conv(x).flatten(2).transpose(1, 2)
        if masks is not None:
            patches = patches.masked_fill(masks[..., None], 0)
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)


@pytest.mark.parametrize("kind", [Pooled, Tokens])
def test_a_module_of_ones_own(kind: Any) -> None:
    wrapped = ModuleBackbone(kind(), width=6, patch_size=4)
    assert wrapped.has_patches is (kind is Tokens)
    pair = build_pair(wrapped, HEAD, None, seed=0)
    x = drawn(4, 3, 8, 8)
    masks = torch.zeros(4, 4, dtype=torch.bool)
    masks[:, 1] = True
    places = masks.flatten().nonzero().squeeze(1) if kind is Tokens else NONE
    out = pair.student(x, drawn(2, 3, 4, 4), masks, places)
    assert out.cls.shape == (4, 6)
    assert out.dino.shape == (6 + len(places), 16)
    out.dino.sum().backward()


def test_a_module_with_another_shape() -> None:
    with pytest.raises(PipelineError, match=r"returned \(2, 6, 2, 2\) for \(2, 3, 8, 8\)"):
        ModuleBackbone(nn.Conv2d(3, 6, 4, 4), width=6)(drawn(2, 3, 8, 8))


@pytest.mark.parametrize(
    "spec",
    [VIT, replace(VIT, in_channels=1), TimmSpec("convnext_atto", image_size=64, patch_size=32)],
    ids=["vit", "grey", "convnet"],
)
def test_the_export_is_read_by_timm_and_by_us(tmp_path: Any, spec: TimmSpec) -> None:
    torch.manual_seed(0)
    ours = spec.build().eval()
    folder = save_foreign(ours, tmp_path / "timm", Preprocessing(None, (0.5,), (0.25,)))
    assert "equal to the bit" in verify_foreign(ours, folder)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = drawn(2, spec.in_channels, 64, 64)
    assert torch.equal(theirs(x), ours(x))
    again, read_spec = load_any(folder)
    assert read_spec == spec and torch.equal(again(x), ours(x))
    broken = load_file(folder / "model.safetensors")
    name = next(n for n in broken if n.endswith("weight"))
    broken[name] = broken[name] + 1
    save_file(broken, folder / "model.safetensors")
    with pytest.raises(PipelineError, match="gives other features"):
        verify_foreign(ours, folder)


def test_position_embeddings_of_another_size() -> None:
    torch.manual_seed(0)
    small = VIT.build().eval()
    large = replace(VIT, image_size=96).build().eval()
    with pytest.raises(PipelineError, match="pos_embed") as caught:
        fit_foreign(large, small.state_dict(), "x.safetensors")
    assert "model.init_resize=true" in caught.value.hint
    fit_foreign(large, small.state_dict(), "x.safetensors", resize=True)
    x = drawn(1, 3, 96, 96)  # timm resizes on the fly in the small model: the same features
    torch.testing.assert_close(large(x), small(x), rtol=1e-4, atol=1e-4)


def test_a_model_whose_layers_timm_does_not_know() -> None:
    pair = build_pair(TimmSpec("poolformer_s12", image_size=64), HEAD, None, seed=0)
    assert not pair.student.backbone.has_layers
    factors = {group["lr_multiplier"] for group in parameter_groups(pair.student, 0.5, 1.0)}
    assert factors == {1.0}


def test_tokens_that_cannot_be_hidden_are_not_scored() -> None:
    class Open(Tokens):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return Tokens.forward(self, x)

    wrapped = ModuleBackbone(Open(), width=6, patch_size=4)
    assert not wrapped.has_patches
    with pytest.raises(PipelineError, match="that can be hidden"):
        wrapped.encode([drawn(1, 3, 8, 8)], [None], torch.tensor([0]))
