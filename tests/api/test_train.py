"""`api.train` does what the command does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import api
from pipeline.errors import PipelineError
from tests.tiny import write_tiny


@pytest.mark.jobs
def test_train_is_the_whole_chain(tmp_path: Path) -> None:
    for n in range(48):
        folder = tmp_path / "photos" / ("dark", "light")[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        low = 128 * (n % 2)
        pixels = np.random.default_rng(n).integers(low, low + 128, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    recipe = write_tiny(tmp_path / "tiny.yaml")
    settings = {"optim.steps": 4, "train.workers": 1, "train.eval_every": 4}
    out = tmp_path / "runs" / "x"
    trained = api.train(tmp_path / "photos", out, recipe, settings)
    assert trained.folder == out and trained.report.is_file()
    assert set(trained.results) >= {"pack", "pretrain", "evaluate", "export"}
    assert trained.results["pretrain"]["step"] == 4
    assert all((folder / "model.safetensors").is_file() for folder in trained.weights.values())
    assert {"dinov2", "timm"} <= set(trained.weights)
    assert "health/feature_std" in trained.scores
    with torch.no_grad():
        assert trained.backbone(torch.zeros(2, 3, 16, 16)).shape == (2, 32)
    before = (out / "pretrain" / "_done.json").stat().st_mtime_ns
    assert api.train(tmp_path / "photos", out, recipe, settings).scores == trained.scores
    assert (out / "pretrain" / "_done.json").stat().st_mtime_ns == before


def test_what_train_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"run\.name in settings"):
        api.train(tmp_path, tmp_path / "x", settings={"run.name": "y"})
    with pytest.raises(PipelineError, match=r"optim\.lrr: no such field"):
        api.train(tmp_path, tmp_path / "x", settings={"optim.lrr": 1.0})
