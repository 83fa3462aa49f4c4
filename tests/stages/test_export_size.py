"""The size of the images that exported weights ask for: that of the verdict, where it may be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config.load import load
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.pair import BackboneSpec
from pipeline.stages import export

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SIZES = {"image_size": 28, "patch_size": 7, "width": 32, "depth": 2, "heads": 2, "registers": 0}


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_formats_that_differ_from_ours_at_the_verdicts_size_stay_at_the_trainings(
    tmp_path: Path, offset: float
) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    spec = BackboneSpec(**SIZES, interpolate_offset=offset, interpolate_antialias=True)
    backbone = spec.build().eval()
    with torch.no_grad():
        backbone.pos_embed.normal_()
        for name, value in backbone.named_parameters():
            if "gamma" in name:  # LayerScale of 1e-5 would hide what blocks do
                value.fill_(0.7)
    said = export._write(backbone, spec, tmp_path, Preprocessing(42, MEAN, STD))

    # at 42 pixels timm's features are ours without an offset alone
    images = torch.randn(2, 3, 42, 42)
    theirs = timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True).eval()
    with torch.no_grad():
        ours, other = backbone(images), theirs(images)
    same = bool(torch.allclose(ours, other, atol=1e-5 * float(ours.abs().max())))
    assert same == (offset == 0)
    asked = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    assert asked["input_size"][-1] == (42 if same else 28)
    assert ("cuts images to 28 x 28 pixels" in said["timm"]) == (not same)
    # and Hugging Face's without registers never, for antialiased position embeddings
    processor = json.loads((tmp_path / "huggingface" / "preprocessor_config.json").read_text())
    assert processor["crop_size"]["height"] == 28 and "28 x 28" in said["huggingface"]
    own = json.loads((tmp_path / "dinov2" / "preprocessor_config.json").read_text())
    assert own["crop_size"] == 42


def test_the_size_is_that_of_todays_recipe_else_of_the_training() -> None:
    trained: Any = SimpleNamespace(
        config=load(["augment.global_size=56", "evaluate.image_size=70"])
    )

    def size(*fields: str) -> int:
        context: Any = SimpleNamespace(config=load(list(fields)))
        return export.scored_size(context, trained)

    assert size() == 70 and size("evaluate.image_size=84") == 84
    # there it is the size of other models
    assert size("evaluate.image_size=84", "evaluate.models=[timm:resnet10t]") == 70
    trained.config = load(["augment.global_size=56"])
    assert size() == 56
