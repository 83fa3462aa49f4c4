"""Who is on a card beside a model, and what models are called."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.card.inputs.networks import Opening, networks_of, short_names
from pipeline.embed.beginnings import untrained
from pipeline.embed.embedders import EmbedderSpec, embedder_of, open_embedder
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.vit import BackboneSpec
from pipeline.model.weights import save_huggingface, save_timm

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
SPEC = BackboneSpec(image_size=28, patch_size=7, width=32, depth=2, heads=2, registers=2)
OPENING = Opening(None, 4, MEAN, STD, "runs")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    return save_huggingface(
        SPEC.build(), SPEC, tmp_path / "net/dinov2", Preprocessing(28, MEAN, STD)
    )


def vectors(spec: EmbedderSpec) -> np.ndarray:  # type: ignore[type-arg]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
    return open_embedder(spec).outputs(pixels)["cls"]


def test_weights_stand_beside_the_same_network_with_random_ones(weights: Path) -> None:
    model, beside = networks_of([str(weights)], OPENING)
    assert (model.role, model.name, model.step) == ("model", "net/dinov2", None)
    assert (beside.role, beside.of, beside.step) == ("untrained", model.name, 0)
    assert beside.spec.digest != model.spec.digest and beside.spec.mean == model.spec.mean
    state = torch.get_rng_state()
    networks = [one.spec.load().state_dict() for one in (model, beside, beside) if one.spec.load]
    assert torch.equal(torch.get_rng_state(), state)  # nobody else draws other numbers
    assert {k: v.shape for k, v in networks[0].items()} == {
        k: v.shape for k, v in networks[1].items()
    }
    name = "patch_embed.proj.weight"
    assert torch.equal(networks[1][name], networks[2][name])  # always the same random weights
    assert not torch.equal(networks[0][name], networks[1][name])
    assert vectors(beside.spec).shape == (3, 32)
    assert not np.allclose(vectors(beside.spec), vectors(model.spec))


@pytest.mark.long
def test_a_timm_model_stands_beside_random_weights(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    folder = save_timm(SPEC.build(), SPEC, tmp_path / "timm", Preprocessing(28, MEAN, STD))
    spec = embedder_of(f"timm:local-dir:{folder}")
    random = untrained(spec)
    assert random is not None and vectors(random).shape == vectors(spec).shape
    assert not np.allclose(vectors(random), vectors(spec))


def test_what_a_model_is_made_of_may_not_be_known() -> None:
    assert untrained(embedder_of("descriptor")) is None
    assert untrained(EmbedderSpec("onnx", path="model.onnx")) is None
    assert untrained(EmbedderSpec("backbone", load=partial(SPEC.build))) is None


@pytest.mark.parametrize(
    "models, names",
    [
        (["/home/me/runs/photos"], ["runs/photos"]),
        (["/home/me/runs/a/checkpoints/step-00000005"], ["runs/a"]),
        (["/a/x/weights", "/b/x/weights"], ["a/x/weights", "b/x/weights"]),
        (["timm:vit_small_patch14_dinov2", "descriptor"], None),
        (["s3://bucket/runs/photos?endpoint=x"], ["runs/photos"]),
        (["/r/a/checkpoints/step-1", "/r/a/checkpoints/step-2"], ["r/a", "r/a"]),
    ],
)
def test_models_have_short_names(models: list[str], names: list[str] | None) -> None:
    assert short_names(models) == (names or models)
