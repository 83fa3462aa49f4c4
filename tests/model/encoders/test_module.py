"""Encoders that a factory makes: what it gets, what it must give, and the network of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from pipeline.errors import PipelineError
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.encoders.module import ModuleSpec
from pipeline.model.encoders.residual import Block, small
from pipeline.model.encoders.source import Name, read_source
from pipeline.model.encoders.stemmed import vit
from pipeline.model.foreign_weights import load_any, save_module, verify_module
from pipeline.model.pair import HeadSpec, build_pair

TEXT = '''
import torch
from torch import nn

class Pooled(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))

class Tokens(nn.Module):
    """A patch embedding with a CLS token that is the mean, and a mask token."""

    def __init__(self, patch, width=8):
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.mask_token = nn.Parameter(torch.ones(width))

    def forward(self, x, masks=None):
        patches = self.embed(x).flatten(2).mT
        if masks is not None:
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        return torch.cat([patches.mean(1, keepdim=True), patches], 1)

def pooled(in_channels, image_size=0, *, width=8):
    net = Pooled(in_channels, width)
    net.got = image_size
    return net

def everything(**keywords):
    net = Pooled(keywords["in_channels"], 8)
    net.got = keywords
    return net

def tokens(patch_size):
    return Tokens(patch_size)

def wants(depth):
    return None

def fails():
    raise ValueError("no such width")

def returns():
    return 3

def few(patch_size):
    return Tokens(2 * patch_size)

class Flat(nn.Module):
    def forward(self, x):
        return x

def flat():
    return Flat()

def other():
    return Pooled(4, 8)

NUMBER = 1
'''


def spec(factory: str, **sizes: int) -> ModuleSpec:
    sizes = {"image_size": 16, "patch_size": 4} | sizes
    return ModuleSpec(f"mine:{factory}", files={"mine.py": TEXT}, **sizes)  # type: ignore[arg-type]


def test_a_factory_gets_the_keywords_that_it_takes() -> None:
    assert spec("pooled").build().module.got == 16
    every = {"image_size": 16, "patch_size": 4, "in_channels": 3, "drop_path": 0.0}
    assert spec("everything").build().module.got == every
    assert spec("pooled", in_channels=5).build()(torch.zeros(2, 5, 16, 16)).shape == (2, 8)


def test_features_and_tokens() -> None:
    pooled, tokens = spec("pooled").build(), spec("tokens").build()
    assert (pooled.width, pooled.has_patches) == (8, False)
    assert (tokens.width, tokens.has_patches) == (8, True)
    x = torch.randn(2, 3, 16, 16)
    out = tokens.forward_features(x)
    assert out["x_norm_patchtokens"].shape == (2, 16, 8)
    assert torch.equal(out["x_norm_clstoken"], tokens(x))


def test_masked_tokens_of_a_module_are_scored() -> None:
    pair = build_pair(spec("tokens"), HeadSpec(prototypes=6, bottleneck=4, hidden=8), None, seed=0)
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[1, 3] = True
    x = torch.randn(2, 3, 16, 16)
    hidden = pair.student(x, masks=masks, masked=torch.tensor([19]))
    changed = x.clone()
    changed[1, :, :4, 12:] = 5.0  # patch 3
    again = pair.student(changed, masks=masks, masked=torch.tensor([19]))
    assert torch.equal(hidden.dino[2], again.dino[2])
    assert not torch.equal(pair.student(x, masked=torch.tensor([19])).dino[2], hidden.dino[2])


def test_the_seed_decides_and_both_networks_are_equal() -> None:
    pairs = [build_pair(spec("pooled"), HeadSpec(6, 4, 8), None, seed) for seed in (1, 1, 2)]
    first, again, other = (pair.student.backbone.module.conv.weight for pair in pairs)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(pairs[0].teacher.backbone.module.conv.weight, first)


BAD = {
    "absent": "has no function absent",
    "NUMBER": "has no function NUMBER",
    "wants": "wants depth, and a factory gets image_size, patch_size, in_channels, drop_path",
    "fails": "failed with no arguments: ValueError: no such width",
    "returns": "returned int, expected an nn.Module",
    "few": r"returned \[2, 5, 8\] for images \[2, 3, 16, 16\], expected features \[2, D\] or "
    r"tokens \[2, 17, D\]",
    "flat": r"returned \[2, 3, 16, 16\]",
    "other": r"fails on images \[2, 3, 16, 16\]: RuntimeError",
}


@pytest.mark.parametrize("factory", BAD)
def test_what_is_wrong_with_a_factory_is_said_in_one_sentence(factory: str) -> None:
    with pytest.raises(PipelineError, match=BAD[factory]) as said:
        spec(factory).build()
    assert "\n" not in said.value.what and said.value.hint


def test_weights_of_a_module_come_back_with_their_text(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = spec("pooled").build()
    folder = save_module(backbone, tmp_path / "module", Preprocessing(None, (0.5,) * 3, (0.2,) * 3))
    assert (folder / "encoder" / "mine.py").read_text() == TEXT
    assert verify_module(backbone, folder) == "equal to the bit, read back"
    again, made_of = load_any(folder)
    assert made_of == backbone.spec
    assert all(
        torch.equal(x, again.state_dict()[name]) for name, x in backbone.state_dict().items()
    )
    (folder / "encoder" / "mine.py").unlink()
    with pytest.raises(PipelineError, match="no text of its encoder"):
        load_any(folder)


def test_the_small_network_is_made_of_blocks_as_in_torchvision() -> None:
    torch.manual_seed(0)
    around = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    theirs, ours = BasicBlock(8, 16, 2, around), Block(8, 16, 2)
    names = {"bn1": "norm1", "bn2": "norm2", "downsample": "around"}
    state = theirs.state_dict()
    renamed = {".".join([names.get(n.split(".")[0], n.split(".")[0]), *n.split(".")[1:]]): x
               for n, x in state.items()}  # fmt: skip
    ours.load_state_dict(renamed)
    x = torch.randn(4, 8, 6, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_small_network_has_the_size_that_its_recipe_names() -> None:
    name = Name.of("module:pipeline.model.encoders.residual:small")
    made = ModuleSpec("pipeline.model.encoders.residual:small", 32, files=read_source(name)).build()
    assert made.width == 256 and made.convolutional and not made.has_patches
    assert 1.2e6 < sum(p.numel() for p in small().parameters()) < 1.25e6
    assert made(torch.zeros(2, 3, 48, 48)).shape == (2, 256)


@pytest.mark.parametrize("make", [small, vit])
def test_networks_of_ours_compute_in_every_type(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network, x = make(), torch.randn(8, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(x).dtype == torch.float32  # of the feature's statistics
    for dtype in (torch.float32, torch.float16):  # of an export
        assert network.eval().to(dtype)(x.to(dtype)).dtype == dtype


def test_channels_last_in_memory_changes_nothing_but_the_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    backbone = ModuleSpec("mine:pooled", 16, files={"mine.py": TEXT}).build()
    seen: list[Tensor] = []
    backbone.module.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(4, 3, 16, 16)
    none = torch.zeros(0, dtype=torch.long)
    last = backbone.encode([x], [None], none)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, backbone(x), rtol=1e-5, atol=1e-6)
    assert seen[1].is_contiguous()


def test_places_are_patches_that_cannot_be_hidden() -> None:
    name = Name.of("module:pipeline.model.encoders.residual:small_map")
    made = ModuleSpec("pipeline.model.encoders.residual:small_map", 32, 8, files=read_source(name))
    torch.manual_seed(0)
    backbone, plain = made.build().eval(), small().eval()
    plain.load_state_dict(backbone.module.state_dict())
    assert backbone.has_patches and not backbone.takes_masks
    x = torch.randn(2, 3, 32, 32)
    out = backbone.forward_features(x)
    assert out["x_norm_patchtokens"].shape == (2, 16, 256)
    torch.testing.assert_close(backbone(x), plain(x))
    last_row = x.clone()
    last_row[:, :, 31, 31] += 1  # seen in the last place, not in the first
    other = backbone.forward_features(last_row)["x_norm_patchtokens"]
    assert torch.equal(other[:, 0], out["x_norm_patchtokens"][:, 0])
    assert not torch.equal(other[:, 15], out["x_norm_patchtokens"][:, 15])
    # seen, they can be learnt from another network; what cannot be hidden is nothing for iBOT
    row = backbone.encode([x], [None], torch.tensor([3]))[2]
    assert torch.equal(row, backbone.encode([x], [None], torch.arange(32))[2 + 3])
    student = build_pair(backbone, HeadSpec(8, 4, 8), None, 0).student
    with pytest.raises(PipelineError, match="patch tokens that can be hidden"):
        student(x, None, None, torch.tensor([3]))


def test_the_small_vit_sees_places_and_other_sizes() -> None:
    torch.manual_seed(0)
    network = vit().eval()
    assert 1.7e6 < sum(p.numel() for p in network.parameters()) < 1.8e6
    x = torch.randn(2, 3, 32, 32)
    seen, tokens = network(x), network.stem(x)
    assert seen.shape == (2, 192) and tokens.shape == (2, 192, 4, 4)
    shuffled = tokens.flatten(2)[..., torch.randperm(16)].unflatten(2, (4, 4))
    network.stem = nn.Identity()
    assert not torch.allclose(network(shuffled), seen, atol=1e-3)
    with torch.no_grad():  # without positions it knows a set of patches
        network.position.zero_()
    torch.testing.assert_close(network(tokens), network(shuffled), rtol=1e-4, atol=1e-5)
    assert network(torch.randn(2, 192, 6, 6)).shape == (2, 192)
