"""The losses of step 0 are what docs/objective.md derives for them."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.loss.koleo import koleo
from pipeline.model.groups import parameter_groups
from pipeline.model.pair import HeadSpec, build_pair
from pipeline.model.vit import BackboneSpec
from pipeline.schedule import StepValues
from pipeline.train.step import Objective, ObjectiveSpec, train_step
from pipeline.views.batch import Views

K, BOTTLENECK, IMAGES, LOCALS = 8192, 256, 16, 8


def first_step(spec: ObjectiveSpec, layer_scale: float = 1e-5) -> dict[str, float]:
    """The losses of step 0 of a small network with a head of the usual bottleneck."""
    backbone = BackboneSpec(
        image_size=112, width=192, depth=2, heads=3, registers=1, layer_scale=layer_scale
    )
    head = HeadSpec(prototypes=K, bottleneck=BOTTLENECK, hidden=256)
    pair = build_pair(backbone, head, None, seed=0)
    g = torch.Generator().manual_seed(1)
    masks = torch.zeros(2 * IMAGES, 64, dtype=torch.bool)
    masks[::2, 10:30] = True  # half of the crops
    views = Views(
        torch.randn(2 * IMAGES, 3, 112, 112, generator=g),
        torch.randn(LOCALS * IMAGES, 3, 42, 42, generator=g),
        masks,
    )
    values = StepValues(0.0, 0.04, 0.992, 0.04, 0.0)
    optimizer = torch.optim.AdamW(parameter_groups(pair.student))
    objective = Objective.for_pair(spec, pair)
    result = train_step(pair.student, pair, [views], optimizer, values, objective)
    return {name.partition("/")[2]: float(x) for name, x in result.scalars.items()}


def test_the_losses_of_step_0_with_sinkhorn() -> None:
    losses = first_step(ObjectiveSpec(centring="sinkhorn"))
    pairs = 2 + 2 * LOCALS
    cross_entropy = math.log(K) + 50 / BOTTLENECK  # logits are cosines of random vectors
    assert losses["dino_global"] == pytest.approx(cross_entropy * 2 / pairs, rel=0.01)
    assert losses["dino_local"] == pytest.approx(cross_entropy * 2 * LOCALS / pairs, rel=0.01)
    assert losses["ibot"] == pytest.approx(cross_entropy / 2, rel=0.02)
    total = losses["dino_global"] + losses["dino_local"] + losses["ibot"] + 0.1 * losses["koleo"]
    assert losses["total"] == pytest.approx(total, rel=1e-5)


@pytest.mark.long
def test_the_losses_of_step_0_with_the_centre() -> None:
    losses = first_step(ObjectiveSpec())
    cross_entropy = math.log(K) - 200 / BOTTLENECK  # both lean to the same prototypes
    assert losses["dino_global"] + losses["dino_local"] == pytest.approx(cross_entropy, rel=0.02)
    assert 15 < losses["koleo"] < 25  # 2 x -ln(4e-5) is 20.3; noise as images is more alike
    assert first_step(ObjectiveSpec(), layer_scale=1.0)["koleo"] < 10


def test_koleo_of_even_directions() -> None:
    axes = torch.eye(8)  # every neighbour is sqrt(2) away
    assert 2 * float(koleo(axes)) == pytest.approx(-math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("images", "width", "value"), [(64, 384, -0.56), (256, 384, -0.54), (64, 768, -0.60)]
)
def test_koleo_of_random_directions(images: int, width: int, value: float) -> None:
    g = torch.Generator().manual_seed(0)
    both = [koleo(torch.randn(images, width, generator=g)) for _ in range(2)]
    assert float(sum(both)) == pytest.approx(value, abs=0.01)
