"""The logged model against the backbone it was made from."""

from __future__ import annotations

import ast
import io
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.track import ModelCard, TrackSettings, open_pipeline
from pipeline.track.embedder import PACKAGES


@pytest.mark.slow
def test_the_logged_model_embeds_as_the_backbone_does(tmp_path: Path, mlflow_server: Any) -> None:
    import mlflow
    import pandas as pd
    import torch
    from PIL import Image

    from pipeline.model.vit import BackboneSpec
    from pipeline.model.weights import save_backbone

    spec = BackboneSpec(image_size=28, patch_size=14, width=48, depth=2, heads=3)
    torch.manual_seed(0)
    backbone = spec.build().eval()
    folder = tmp_path / "run" / "weights"
    save_backbone(backbone, spec, folder)
    settings = TrackSettings(str(tmp_path / "run"), "", "models", mlflow_server.uri)
    with open_pipeline(settings, "run") as pipeline:
        tracker = pipeline.stage("export")
        for score in (0.5, 0.75, 0.25):
            facts = {"metrics": {"eval/knn20_top1": score}, "params": {"steps": 40, "lr": "0.001"}}
            tracker.model(folder, ModelCard("embedder-test", score, f"k-NN {score}", **facts))
    client = mlflow_server.client
    assert len(client.search_model_versions("name = 'embedder-test'")) == 3
    best = client.get_model_version_by_alias("embedder-test", "best")
    assert best.description == "k-NN 0.75"

    images, pixels = [], np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)
    for image in pixels:
        data = io.BytesIO()
        Image.fromarray(image).save(data, "PNG")
        images.append(data.getvalue())
    mlflow.set_tracking_uri(mlflow_server.uri)
    model = mlflow.pyfunc.load_model("models:/embedder-test@best")
    embeddings = np.array(model.predict(pd.DataFrame({"image": images}))["embedding"].tolist())
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    inputs = torch.from_numpy((pixels / 255.0 - mean) / std).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        expected = backbone(inputs).numpy()
    assert embeddings.shape == (3, 48)
    assert np.abs(embeddings - expected).max() < 5e-5  # the pixels were normalised in float64 here

    page = client.get_logged_model(best.source.removeprefix("models:/"))
    assert page.params == {"steps": "40", "lr": "0.001"}
    assert {metric.key: metric.value for metric in page.metrics} == {"eval/knn20_top1": 0.75}
    described = mlflow.models.get_model_info("models:/embedder-test@best")
    assert described.signature.inputs.input_names() == ["image"]
    example = mlflow.pyfunc.load_model("models:/embedder-test@best").input_example
    assert len(model.predict(example)["embedding"][0]) == 48
    for wrong, said in (
        ({"image": [images[0], b"no image"]}, r"image 1 cannot be used \(not_an_image"),
        ({"picture": images}, r"missing inputs \['image'\]"),
    ):
        with pytest.raises(mlflow.exceptions.MlflowException, match=said):
            model.predict(pd.DataFrame(wrong))


def loaded(folder: Path, channels: int, mean: list[float]) -> Any:
    """The model as MLflow loads it, without a server."""
    from types import SimpleNamespace

    from mlflow.models import model as mlflow_model

    from pipeline.track.embedder import _set_model

    _set_model()
    model = mlflow_model.__mlflow_model__
    config = {"image_size": 28, "mean": mean, "std": [0.2] * channels}
    model.load_context(SimpleNamespace(artifacts={"weights": str(folder)}, model_config=config))
    return model


@pytest.mark.long
@pytest.mark.parametrize("channels", [1, 6])
def test_a_model_decodes_to_its_own_channels(tmp_path: Path, channels: int) -> None:
    import pandas as pd
    import torch
    from PIL import Image

    from pipeline.errors import PipelineError
    from pipeline.model.vit import BackboneSpec
    from pipeline.model.weights import save_backbone
    from pipeline.views.crops import resize_centre_crop

    spec = BackboneSpec(
        image_size=28,
        patch_size=14,
        width=48,
        depth=1,
        heads=3,
        in_channels=channels,
        layer_scale=1.0,  # with the usual 1e-5 features hardly depend on the pixels
    )
    torch.manual_seed(0)
    backbone = spec.build().eval()
    save_backbone(backbone, spec, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28, channels), dtype=np.uint8)
    images = []
    for image in pixels:
        data = io.BytesIO()
        if channels == 1:
            Image.fromarray(image[..., 0]).save(data, "PNG")
        else:
            np.save(data, image)
        images.append(data.getvalue())
    model = loaded(tmp_path, channels, [0.4] * channels)
    embeddings = np.array(
        model.predict(None, pd.DataFrame({"image": images}))["embedding"].tolist()
    )
    with torch.inference_mode():
        crops = np.stack([resize_centre_crop(image, 28) for image in pixels])
        x = torch.from_numpy((crops / 255.0 - 0.4) / 0.2).permute(0, 3, 1, 2).float()
        expected = backbone(x).numpy()
    assert np.abs(embeddings - expected).max() < 1e-5
    with pytest.raises(PipelineError, match=f"has {channels} channels.* 3 means"):
        loaded(tmp_path, channels, [0.5, 0.5, 0.5])


def imported(name: str, seen: dict[str, set[str]], whole: bool = False) -> None:
    """Fills in what loading a module of ours loads, with the packages of others in each.

    Args:
        name: `pipeline.…`, of a module or of what one has.
        seen: packages by module.
        whole: what its functions import, too.
    """
    path = Path(__file__).parents[2] / name.replace(".", "/")
    file = next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)
    if file is None or name in seen:
        return
    seen[name] = set()
    waiting: list[ast.AST] = [ast.parse(file.read_text())]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or whole:
            waiting += ast.iter_child_nodes(node)
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for one in names:
            parts = one.split(".")
            if parts[0] == "pipeline":
                for count in range(1, len(parts) + 1):  # packages are loaded before what is in them
                    imported(".".join(parts[:count]), seen)
            elif parts[0] not in sys.stdlib_module_names:
                seen[name].add(parts[0])


def test_every_package_that_the_model_code_loads_is_required() -> None:
    seen: dict[str, set[str]] = {}
    imported("pipeline.track.embedder", seen, whole=True)
    assert "simplejpeg" in seen["pipeline.images.jpeg"] and "pipeline.model.vit" in seen
    known = {name: {one.lower() for one in of} for name, of in packages_distributions().items()}
    for module, packages in seen.items():
        for package in packages:
            assert known[package] & set(PACKAGES), f"{module} imports {package}"


def test_a_registered_model_has_one_name() -> None:
    from pipeline.config.load import load
    from pipeline.errors import ConfigError

    assert load(["track.register=photos"]).track.register == "photos"
    assert load(["track.model_name=photos"]).track.model_name == "photos"
    with pytest.raises(ConfigError, match=r"track: track\.register=a and track\.model_name=b"):
        load(["track.register=a", "track.model_name=b"])
