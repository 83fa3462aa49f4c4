"""One look at images of several sizes, against the functions it is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import PipelineError
from pipeline.evaluate.features import normalise
from pipeline.model.foreign import TimmBackbone, TimmSpec
from pipeline.use.attention import attention
from pipeline.use.components import Components
from pipeline.use.looking import Question, look
from pipeline.use.network import fitted, patch_maps
from pipeline.use.segment import Reference
from tests.use.made import drawn

MEAN = STD = (0.5, 0.5, 0.5)
ASKED = {"image_size": 28, "mean": MEAN, "std": STD}


def photos(*sizes: tuple[int, int]) -> list[np.ndarray]:
    draws = np.random.default_rng(0)
    return [draws.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def test_images_of_any_size_share_their_components() -> None:
    network, images = drawn(), photos((60, 40), (30, 90))
    reference = photos((50, 50))[0]
    mask = np.arange(2500).reshape(50, 50) // 1250
    question = Question(**ASKED, block=1, mark=(39, 59), references=((reference, mask),), classes=2)
    seen = look(network, images, question)
    assert [tuple(one.shape) for one in seen.colours] == [(6, 4, 3), (4, 12, 3)]
    maps = []
    for number, pixels in enumerate(images):
        x = normalise(fitted(pixels, 28, 7)[None], MEAN, STD)
        maps.append(patch_maps(network, x)[0])
        torch.testing.assert_close(seen.attention[number], attention(network, x, 1)[0])
    shared = Components.fit(maps)
    torch.testing.assert_close(seen.colours[1], shared.colours(maps[1]))
    assert seen.foreground == pytest.approx(
        torch.cat([shared.foreground(one).flatten() for one in maps]).float().mean().item()
    )
    assert seen.marked == (5, 3)  # the last pixel of the first image
    expected = torch.cosine_similarity(maps[1], maps[0][5, 3][None, None], dim=-1)
    torch.testing.assert_close(seen.similarity[1], expected)
    known = patch_maps(network, normalise(fitted(reference, 28, 7)[None], MEAN, STD))
    scores = Reference.of(known, torch.from_numpy(mask)[None]).scores(maps[0])
    torch.testing.assert_close(seen.scores[0], scores)


def test_networks_of_one_size_get_squares() -> None:
    timm: Any = pytest.importorskip("timm", reason="needs timm")
    spec = TimmSpec("test_vit", image_size=32, patch_size=16)
    question = Question(image_size=32, mean=MEAN, std=STD)
    assert look(spec.build(), photos((60, 30)), question).colours[0].shape == (4, 2, 3)
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    fixed = TimmBackbone(module, spec, {})
    assert look(fixed, photos((60, 30)), question).colours[0].shape == (2, 2, 3)


def test_what_a_network_lacks() -> None:
    pytest.importorskip("timm", reason="needs timm")
    question = Question(image_size=64, mean=MEAN, std=STD)
    with pytest.raises(PipelineError, match="gives no patches"):
        look(TimmSpec("resnet18", image_size=64).build(), photos((64, 64)), question)
    pooled = TimmSpec("test_vit3", image_size=64, patch_size=16).build()
    seen = look(pooled, photos((64, 64)), question)
    assert seen.attention == [] and "no CLS token" in seen.no_attention
    assert len(seen.colours) == 1


def test_a_mark_outside() -> None:
    with pytest.raises(PipelineError, match="pixel 40,0 of an image of 40 x 60 pixels"):
        look(drawn(), photos((60, 40)), Question(**ASKED, mark=(40, 0)))
