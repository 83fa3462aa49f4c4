"""The logged model against the backbone it was made from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.track import TrackSettings, open_pipeline


@pytest.mark.slow
def test_the_logged_model_embeds_as_the_backbone_does(tmp_path: Path, mlflow_server: Any) -> None:
    import mlflow
    import pandas as pd
    import torch
    from PIL import Image

    from pipeline.model.pair import BackboneSpec
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
            tracker.model(folder, "embedder-test", score=score, note=f"k-NN {score}")
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
    found = np.array(model.predict(pd.DataFrame({"image": images}))["embedding"].tolist())
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    inputs = torch.from_numpy((pixels / 255.0 - mean) / std).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        expected = backbone(inputs).numpy()
    assert found.shape == (3, 48)
    assert np.abs(found - expected).max() < 1e-5
