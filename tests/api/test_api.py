"""The Python API: its sizes are those of the reference, its mistakes are said."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipeline import api
from pipeline.errors import PipelineError

ROOT = Path(__file__).parents[2]


def test_a_size_by_name_has_the_published_shapes() -> None:
    golden = json.loads((ROOT / "tests/golden/state_dict_shapes_vits14_518.json").read_text())
    golden = golden.get("shapes", golden)
    with torch.device("meta"):
        built = api.sized("vits14", image_size=518, registers=0).build()
    assert {n: list(x.shape) for n, x in built.state_dict().items()} == golden


@pytest.mark.parametrize(
    ("name", "millions"), [("vits14", 22), ("vitb14", 86.6), ("vitl14", 304), ("vitg14", 1136)]
)
def test_sizes_have_the_papers_parameters(name: str, millions: int) -> None:
    """Against the model card of DINOv2: 21 M, 86 M, 300 M and 1,100 M, at its image size."""
    with torch.device("meta"):
        built = api.sized(name, image_size=518, registers=0).build()
    count = sum(math.prod(p.shape) for p in built.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", ["vith14", "vits", "resnet50"])
def test_no_such_size(name: str) -> None:
    with pytest.raises(PipelineError, match=f"no size '{name}'"):
        api.sized(name)


def test_a_module_without_its_width() -> None:
    with pytest.raises(PipelineError, match="the width of Conv2d is not known"):
        api.student_teacher(nn.Conv2d(3, 8, 4))


def test_what_train_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"run\.name in settings"):
        api.train(tmp_path, tmp_path / "x", settings={"run.name": "y"})
    with pytest.raises(PipelineError, match=r"finetune\.model in settings"):
        api.finetune(tmp_path, tmp_path / "x", "m", settings={"finetune.model": "y"})
    with pytest.raises(PipelineError, match=r"optim\.lrr: no such field"):
        api.train(tmp_path, tmp_path / "x", settings={"optim.lrr": 1.0})


def test_train_does_not_share_a_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    with pytest.raises(PipelineError, match="a Ray is running in this process"):
        api.train(tmp_path, tmp_path / "x")
