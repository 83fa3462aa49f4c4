"""FLOPs against torch's own count of real steps, on tensors that have shapes and no contents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.load import load
from pipeline.model.pair import Pair
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan, SetFacts, resolve
from pipeline.train import build, estimate
from pipeline.train.speed import flops
from pipeline.views.masks import MaskSpec, masks_for

IMAGES = 5  # with a drop rate of 0.3: 7 of 10 global views, 28 of 40 local ones
SIXTEEN = ["model.patch_size=16", "augment.local_size=96"]
SIZES = {
    "S/16": ["model.size=vits", *SIXTEEN, "model.drop_path=0.1"],
    "B/14": ["model.size=vitb", "augment.local_size=98", "model.drop_path=0.3"],
    "L/16": ["model.size=vitl", *SIXTEEN, "model.registers=0", "model.drop_path=0.3"],
    "L/14": ["model.size=vitl", "augment.local_size=98", "ibot_head.separate=true"],
    "g/14": ["model.size=vitg", "model.ffn=swiglu", "augment.local_size=98", "model.drop_path=0.4"],
}
SMALL = ["model.width=64", "model.depth=2", "model.heads=2", "augment.global_size=56"]
SMALL += ["augment.local_size=28", "head.prototypes=512", "head.hidden=128"]


def plan(*overrides: str) -> Plan:
    fixed = [f"optim.global_batch_size={IMAGES}", "optim.steps=9", "train.workers=1"]
    config = load([*fixed, "train.precision=float32", *overrides])
    return resolve(config, SetFacts(100, "d"), machine=Machine(cpus=2, gpus=0, bfloat16=False))


def counted(of: Plan, pair: Pair, masked: int) -> float:
    """FLOPs of one step's forward and backward passes of `IMAGES` images, by torch's count of what
    runs. Attention is the plain one: fused ones compute their scores again in the backward pass.
    """
    config = of.config
    augment, channels = config.augment, config.model.in_channels
    patches = of.grid[0] * of.grid[1]
    whole = torch.zeros(2 * IMAGES, channels, *[augment.global_size] * 2, device="meta")
    shape = (augment.local_crops * IMAGES, channels, *[augment.local_size] * 2)
    local = torch.zeros(shape, device="meta") if augment.local_crops else None
    hidden = torch.zeros(2 * IMAGES, patches, dtype=torch.bool, device="meta")
    places = torch.zeros(masked, dtype=torch.long, device="meta")
    scores = config.loss.dino_weight > 0
    student, teacher = pair.student.to("meta"), pair.target_maker.to("meta")
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad():
            teacher(whole, None, None, places, scores)
        answer = student(whole, local, hidden, places, scores, torch.Generator())
        outputs = [x.sum() for x in answer if x is not None and x.numel()]
        torch.stack(outputs).sum().backward()
    return counter.get_total_flops()


def estimated(of: Plan, pair: Pair, monkeypatch: pytest.MonkeyPatch, masked: int) -> float:
    """Without KoLeo's similarities, which are no network's."""
    monkeypatch.setattr(estimate, "masked_patches", lambda _: masked / IMAGES)
    koleo = 2 * 2 * IMAGES**2 * pair.student.backbone.width * (of.config.loss.koleo_weight > 0)
    return IMAGES * estimate.flops_per_image(of, pair) - koleo


@pytest.mark.long
@pytest.mark.parametrize("size", SIZES)
def test_the_count_of_a_step_is_exact(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = plan(*SIZES[size])
    with torch.device("meta"):
        pair = build.pair(of.config)
    assert estimated(of, pair, monkeypatch, 293) == counted(of, pair, 293)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.drop_path=0"],
        ["model.drop_path=0.95"],  # one view of each group is always kept
        ["model.ffn=swiglu", "model.registers=4"],
        ["augment.local_crops=0"],
        ["ibot_head.separate=true", "ibot_head.prototypes=256", "ibot_head.hidden=64"],
        ["loss.dino_weight=0", "loss.koleo_weight=0"],
        ["model.in_channels=1", "augment.mean=[0.5]", "augment.std=[0.2]", "augment.jitter=0",
         "augment.greyscale=0"],
    ],
    ids=lambda overrides: overrides[0],
)  # fmt: skip
def test_the_count_follows_the_recipe(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = plan(*SMALL, *overrides)
    pair = build.pair(of.config)
    assert estimated(of, pair, monkeypatch, 17) == counted(of, pair, 17)


def test_without_ibot_no_patch_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    of = plan(*SMALL, "loss.ibot_weight=0")
    assert estimate.masked_patches(of) == 0
    pair = build.pair(of.config)
    assert estimated(of, pair, monkeypatch, 0) == counted(of, pair, 0)


@pytest.mark.long
def test_a_foreign_network_is_counted_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("resnet10t", "vit_tiny_patch16_224"):
        of = plan(
            f"model.encoder=timm:{name}", "loss.ibot_weight=0", "loss.mask_probability=0",
            "model.patch_size=16", "augment.global_size=64", "augment.local_size=32",
            "model.drop_path=0",
        )  # fmt: skip
        pair = build.pair(of.config)
        mine = estimated(of, pair, monkeypatch, 0)
        assert mine == counted(of, pair, 0)
        assert estimate.tokens_per_image(of, pair) == 0


@pytest.mark.parametrize("side", [224, 56])
def test_the_mean_of_masked_patches_is_that_of_drawn_masks(side: int) -> None:
    of = plan(f"augment.global_size={side}", "optim.global_batch_size=64")
    loss = of.config.loss
    spec = MaskSpec(of.grid, loss.mask_probability, loss.mask_ratio)
    drawn = [masks_for(0, step, np.arange(64), 64, spec).sum() / 64 for step in range(8)]
    assert estimate.masked_patches(of) == pytest.approx(float(np.mean(drawn)), rel=0.02)


def test_tokens_are_those_of_all_crops() -> None:
    of = plan(*SMALL, "model.registers=3", "augment.local_crops=5")
    pair = build.pair(of.config)
    seen: list[int] = []
    pair.student.backbone.blocks[0].register_forward_pre_hook(
        lambda _, inputs: seen.append(len(inputs[0]))
    )
    with torch.no_grad():
        pair.student.eval()(torch.zeros(2, 3, 56, 56), torch.zeros(5, 3, 28, 28))
    assert seen == [estimate.tokens_per_image(of, pair)]


def test_views_that_stochastic_depth_keeps() -> None:
    from pipeline.model.block import draw_subsets

    for views in (1, 2, 7, 64):
        for rate in (0.1, 0.3, 0.9):
            (subset,) = draw_subsets([(views, 3)], rate, 1, None, torch.device("cpu"))
            assert len(subset.rows) == 3 * flops.kept_views(views, rate)


def test_a_depthwise_convolution_costs_three_times_its_forward_pass() -> None:
    """Not as many times as it has groups, which is torch's own count of its backward pass."""
    channels, side = 16, 8
    layer = torch.nn.Sequential(
        torch.nn.Conv2d(3, channels, 1),
        torch.nn.Conv2d(channels, channels, 3, 1, 1, groups=channels),
    )
    first, depthwise = 2 * 3 * channels * side**2, 2 * 9 * channels * side**2
    groups = [flops.Group(1, side)]
    assert flops.measured_flops(layer, groups, 3, training=False) == first + depthwise
    # images need no gradient, so the first layer has one product less
    trained = 2 * first + 3 * depthwise
    assert flops.measured_flops(layer, groups, 3, training=True) == trained
