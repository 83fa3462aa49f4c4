"""What is exported, as other libraries load it; and networks drawn anew or at another size."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.embed.load import load_weights, preprocessing_of
from pipeline.errors import PipelineError
from pipeline.finetune.classifier import Classifier, classifier_of, spec_of
from pipeline.finetune.export import export, form_of
from pipeline.images.value_range import FULL
from pipeline.model.encoders.module import ModuleBackbone, ModuleSpec
from pipeline.model.encoders.source import Name, read_source
from pipeline.model.foreign import timm_by_name
from pipeline.model.low_rank import LowRankLinear, merge_low_rank
from pipeline.views.crops import resize_centre_crop
from tests.finetune.small import SPEC, backbone, settings

NAMES = ("ant", "bee", "cat")


def learnt(network: Classifier) -> Classifier:
    """With weights as after training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        network.head.weight.normal_(generator=generator)
        network.head.bias.normal_(generator=generator)
        for part in network.modules():
            if isinstance(part, LowRankLinear):
                part.low_rank_up.normal_(generator=generator)
    return network.eval()


@pytest.mark.long
@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("tune", ["all", "low_rank"])
def test_transformers_gives_the_same_logits_and_pixels(
    tmp_path: Path, registers: int, tune: Any
) -> None:
    transformers = pytest.importorskip("transformers")
    # 12 pixels instead of 8: position embeddings are resized once, before training
    given = settings(tune=tune, image_size=12)
    network = learnt(classifier_of(backbone(registers=registers), 3, given))
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    small = torch.from_numpy(resize_centre_crop(picture, 12)).permute(2, 0, 1)[None]
    x = (small / 255 - 0.5) / 0.25
    expected = network(x).detach()  # before the updates are merged
    merge_low_rank(network.backbone)
    said = export(network, NAMES, given, FULL, tmp_path)
    assert "in transformers" in said
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(model(x).logits, expected, atol=1e-5, rtol=1e-5)
    # the backbone in it is weights like any others
    again = load_weights(str(tmp_path)).state_dict()
    for name, tensor in network.backbone.state_dict().items():
        assert torch.equal(again[name], tensor), name
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {name: number for number, name in enumerate(NAMES)}
    assert (tmp_path / "classes.txt").read_text().split() == list(NAMES)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    pixels = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    assert pixels.shape == x.shape
    assert (pixels - x).abs().max() <= 1.01 / 255 / 0.25


@pytest.mark.long
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_timm_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm")
    given = settings(model=f"timm:{name}", image_size=32)
    network = learnt(classifier_of(timm_by_name(name), 3, given))
    assert form_of(network) == "timm"
    export(network, NAMES, given, FULL, tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), network(x), atol=1e-5, rtol=1e-5)
    again = load_weights(str(tmp_path))
    torch.testing.assert_close(again(x), network.backbone(x), atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["label_names"] == list(NAMES) and config["num_classes"] == 3


def test_an_encoder_of_ones_own_at_another_image_size(tmp_path: Path) -> None:
    name = "pipeline.model.encoders.stemmed:vit"  # its positions are those of 32 pixels
    own = ModuleSpec(name, image_size=32, files=read_source(Name.of(name))).build()
    given = settings(model="runs/own", image_size=40)
    network = learnt(classifier_of(own, 3, given))
    export(network, NAMES, given, FULL, tmp_path)
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_weights(str(tmp_path))(x), network.backbone(x))
    assert preprocessing_of(str(tmp_path)).image_size == 40


def test_an_encoder_with_a_classifier_of_its_own_is_refused() -> None:
    layers = OrderedDict(flat=nn.Flatten(), classifier=nn.Linear(192, 8))
    own = ModuleBackbone(nn.Sequential(layers), 8)
    with pytest.raises(PipelineError, match=r"tensors called classifier\.bias, classifier\.weight"):
        form_of(classifier_of(own, 3, settings(model="runs/own", image_size=8)))


def test_what_cannot_be_exported_is_refused() -> None:
    network = classifier_of(backbone(mlp_ratio=2.5), 3, settings())
    with pytest.raises(PipelineError, match=r"takes whole numbers as mlp_ratio only, not 2\.5"):
        form_of(network)
    with pytest.raises(PipelineError, match="cannot be fine-tuned: it is a Linear"):
        classifier_of(torch.nn.Linear(2, 2), 3, settings(model="x"))


def test_a_folder_that_was_changed_is_not_taken_for_the_classifier(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    network = learnt(classifier_of(backbone(), 3, settings()))
    from pipeline.finetune import export as module

    class Other:
        """What loads gives other logits."""

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return network(x) + 1e-3

    with pytest.raises(PipelineError, match="gives other logits in there"):
        module._compared(network, settings(), tmp_path, lambda: ("there", Other()))


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 3])
def test_a_backbone_says_what_it_is_made_of(ffn: str, registers: int) -> None:
    spec = replace(SPEC, ffn=ffn, registers=registers)
    assert spec_of(spec.build()) == spec


def test_drawn_anew_it_is_the_same_architecture_with_other_weights() -> None:
    given = settings(from_scratch=True)
    one, again = (classifier_of(backbone(seed), 3, given).state_dict() for seed in (0, 1))
    kept = classifier_of(backbone(0), 3, settings()).state_dict()
    assert {n: x.shape for n, x in one.items()} == {n: x.shape for n, x in kept.items()}
    for name, x in one.items():
        assert torch.equal(x, again[name]), name  # of the seed alone
    assert not torch.equal(one["backbone.pos_embed"], kept["backbone.pos_embed"])
    assert torch.equal(kept["backbone.pos_embed"], backbone(0).pos_embed)


def test_sizes_that_are_no_patches_are_refused() -> None:
    with pytest.raises(PipelineError, match=r"finetune.image_size=10 is not a multiple") as error:
        classifier_of(backbone(), 3, settings(image_size=10))
    assert error.value.hint == "set finetune.image_size=8"
