"""The code of the pages on Python runs, in the order in which it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import api
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.onnx_out import save_onnx
from pipeline.model.weights import save_huggingface
from pipeline.track import server
from pipeline.views.photometric import PhotometricSpec
from tests.card.conftest import folder_of_classes
from tests.tiny import write_tiny

ROOT = Path(__file__).parents[2]
PAGES = ["python.md", "python-use.md", "look.md"]
STARTS_RAY = ("api.train(", "api.evaluate(")


def blocks(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the pages find: `photos/`, and the exported weights of a run."""
    for n in range(8):
        place = tmp_path / "photos" / f"{n}.png"
        place.parent.mkdir(exist_ok=True)
        low = 128 * (n % 2)
        pixels = np.random.default_rng(n).integers(low, low + 128, (60, 60 + n, 3), np.uint8)
        Image.fromarray(pixels).save(place)
    spec = api.BackboneSpec(
        image_size=56, patch_size=14, width=48, depth=2, heads=3, layer_scale=1.0
    )
    torch.manual_seed(0)
    api.save_backbone(spec.build().eval(), spec, tmp_path / "runs" / "photos" / "weights/dinov2")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    server.stop(tmp_path / "runs" / "mlflow")  # that a call of a page started


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_the_page_runs(page: str, folder: Path) -> None:
    space: dict[str, Any] = {"api": api}
    for block in blocks(page):
        if not any(call in block for call in STARTS_RAY):
            exec(compile(block, page, "exec"), space)
    if page == "python.md":
        scalars = space["result"].scalars
        assert {"loss/total", "loss/ibot", "loss/koleo"} <= set(scalars)
        assert all(torch.isfinite(x) for x in scalars.values())


@pytest.mark.jobs
def test_the_whole_chain_of_the_page(folder: Path) -> None:
    """The one call trains, says what came of it, and does nothing when it is called again."""
    write_tiny(
        folder / "small.yaml",
        optim={"global_batch_size": 8},
        train={"workers": 1, "eval_every": 4, "log_every": 1},
    )
    (block,) = [one for one in blocks("python.md") if "api.train(" in one]
    space: dict[str, Any] = {}
    exec(compile(block, "python.md", "exec"), space)
    trained, out = space["trained"], folder / "runs" / "x"
    assert trained.folder == out and trained.report.is_file()
    assert set(trained.results) >= {"pack", "pretrain", "evaluate", "export"}
    assert trained.results["pretrain"]["step"] == 4
    card = json.loads((out / "evaluate" / "card.json").read_text())
    assert trained.verdict and trained.verdict == card["verdict"]["text"]
    assert all((place / "model.safetensors").is_file() for place in trained.weights.values())
    assert {"dinov2", "timm"} <= set(trained.weights)
    assert "health/feature_std" in trained.scores
    with torch.no_grad():
        assert space["features"](torch.zeros(2, 3, 16, 16)).shape == (2, 32)
    before = (out / "pretrain" / "_done.json").stat().st_mtime_ns
    settings = {"optim.steps": 4}
    assert api.train("photos/", "runs/x", "small.yaml", settings).scores == trained.scores
    assert (out / "pretrain" / "_done.json").stat().st_mtime_ns == before

    pytest.importorskip("onnxscript")  # the same run once more, now with ONNX: only the export runs
    settings |= {"export.onnx": True, "export.onnx_sizes": [24]}
    again = api.train("photos/", "runs/x", "small.yaml", settings)
    assert (out / "pretrain" / "_done.json").stat().st_mtime_ns == before
    backbone, paths = trained.backbone, sorted(Path("photos").glob("*.png"))
    for size in (16, 24):
        file = again.onnx[f"fp32-{size}.onnx"]
        embedder = api.open_embedder(api.embedder_of(str(file)))
        assert embedder.size == size
        torch.testing.assert_close(
            api.embed(embedder, paths), api.embed(backbone, paths, size), atol=1e-4, rtol=1e-4
        )


@pytest.mark.long
def test_the_code_of_the_page_about_weights(folder: Path) -> None:
    """Run, and what it gives compared with this package's own tokens and attention."""
    for package in ("transformers", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    network, spec = api.load_backbone("runs/photos/weights/dinov2")
    mean, std = PhotometricSpec.mean, PhotometricSpec.std
    exports = folder / "runs" / "photos" / "weights"
    save_huggingface(network, spec, exports / "huggingface", Preprocessing(56, mean, std))
    save_onnx(network, exports / "onnx", [56], Preprocessing(None, mean, std), ["fp32"])
    space: dict[str, Any] = {}
    for block in blocks("weights.md"):
        exec(compile(block, "weights.md", "exec"), space)
    pixels = api.prepare("photos/0.png", 56)
    assert space["R"] == spec.registers > 0
    with torch.no_grad():
        ours = network.forward_features(pixels)
    same = torch.testing.assert_close
    same(space["cls"], ours["x_norm_clstoken"], atol=1e-5, rtol=1e-5)
    same(space["patches"], ours["x_norm_patchtokens"], atol=1e-5, rtol=1e-5)
    same(space["attention"].unflatten(2, (4, 4)), api.attention(network, pixels))
    same(space["vectors"], ours["x_norm_clstoken"], atol=1e-4, rtol=1e-4)
    same(torch.from_numpy(space["patches_again"]), space["patches"], atol=1e-4, rtol=1e-4)


def test_everything_that_is_named_is_there() -> None:
    assert all(hasattr(api, name) for name in api.__all__)
    code = "".join(block for page in PAGES for block in blocks(page))
    assert set(re.findall(r"\bapi\.([A-Za-z_]+)", code)) <= set(api.__all__)


@pytest.mark.jobs
def test_the_evaluation_of_the_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one call scores both models; what it prints is of the card that it leaves."""
    folder_of_classes(folder / "labelled", 12)
    (block,) = [one for one in blocks("python-use.md") if "api.evaluate(" in one]
    space: dict[str, Any] = {"api": api}
    exec(compile(block, "python-use.md", "exec"), space)
    card = space["card"]
    assert [one.role for one in card.contenders].count("model") == 2
    assert card.verdict.text in capsys.readouterr().out
    assert (folder / "runs" / "labelled" / "evaluate" / "card.html").is_file()
