"""A backbone that went out as ONNX comes in again as an embedder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.embed.embedders import embedder_of, open_embedder
from pipeline.errors import DataError
from pipeline.evaluate.baselines import colour_vectors, pixel_vectors
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.onnx_out import save_onnx
from pipeline.model.vit import BackboneSpec

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.long
@pytest.mark.parametrize("channels", [3, 1])
def test_vectors_are_those_of_torch(tmp_path: Path, channels: int) -> None:
    torch.manual_seed(1)
    spec = BackboneSpec(
        image_size=28, width=48, depth=2, heads=3, layer_scale=1.0, in_channels=channels
    )
    network = spec.build().eval()
    mean, std = (0.4,) * channels, (0.3,) * channels
    pixels = Preprocessing(None, mean, std, (0.0, 4095.0))
    whole, half, small = save_onnx(network, tmp_path / "onnx", [28], pixels)
    images = list(np.random.default_rng(0).integers(0, 256, (5, 28, 28, channels), np.uint8))
    x = (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - 0.4) / 0.3
    with torch.no_grad():
        features = network.forward_features(x)
    cls, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"]
    assert cls is not None and patches is not None
    for file, allowed in ((whole, 1e-4), (half, 2e-2), (small, 0.5)):
        embedder = open_embedder(embedder_of(str(file.path), batch_size=2))
        assert (embedder.size, embedder.dim, embedder.patch_size) == (28, 48, 14)
        assert embedder.channels == channels and embedder.mean == pytest.approx(mean)
        assert embedder.spec.value_range == (0.0, 4095.0)
        assert embedder.spec.mean == pytest.approx(mean) and len(embedder.spec.std) == channels
        out = embedder.outputs(images, ("cls", "mean", "patches"))
        assert np.abs(out["cls"] - cls.numpy()).max() < allowed
        assert np.abs(out["mean"] - patches.mean(1).numpy()).max() < allowed
        assert np.abs(out["patches"] - patches.numpy()).max() < max(allowed, 5e-3)
    beside = embedder.outputs(images, ("colours", "cls", "pixels"))
    np.testing.assert_array_equal(beside["cls"], out["cls"])
    np.testing.assert_array_equal(beside["pixels"], pixel_vectors(np.stack(images)))
    np.testing.assert_array_equal(beside["colours"], colour_vectors(np.stack(images)))
    with pytest.raises(DataError, match="nothing of single blocks"):
        embedder.outputs(images, ("blocks",))
