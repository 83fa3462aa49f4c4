"""Evaluation and pictures for other channels than RGB, against planted truth."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.evaluate import teacher
from pipeline.evaluate.pictures import CELL, GAP, crops_sheet, neighbours_grid, pca_grid
from pipeline.evaluate.teacher import EvaluationSpec, Evaluator, read_images
from pipeline.model.vit import BackboneSpec
from pipeline.shards.shards import ShardSet
from pipeline.views import photometric as ph
from pipeline.views.batch import Batch
from pipeline.views.crops import resize_centre_crop
from tests.data import encoded, stored

STRIDE = CELL + GAP


def shards(folder: Path, images: int, seed: int, channels: int) -> tuple[ShardSet, np.ndarray]:
    """Class = which third of the last channel is bright; the rest is noise. One file is broken."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, images)
    pixels = rng.integers(0, 40, (images, 18, 20, channels)).astype(np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[6 * label : 6 * label + 6, :, -1] += 160
    images = []
    for image in pixels:
        stream = io.BytesIO()
        np.save(stream, image)
        images.append(encoded(image[..., 0]) if channels == 1 else stream.getvalue())
    images[2] = b"broken"
    shards = stored({"image": images, "label": labels}, folder / "part.parquet", 16)
    return shards, np.delete(pixels, 2, 0)


def spec_for(tmp_path: Path, channels: int) -> tuple[EvaluationSpec, np.ndarray]:
    reference, _ = shards(tmp_path / "reference", 50, 0, channels)
    queries, pixels = shards(tmp_path / "queries", 30, 1, channels)
    spec = EvaluationSpec(
        sample=reference,
        reference=reference,
        queries=queries,
        image_size=16,
        k=5,
        temperature=0.07,
        mean=(0.4,) * channels,
        std=(0.2,) * channels,
        batch_size=16,
        seed=0,
        max_pixels=1000,
        channels=channels,
    )
    return spec, pixels


@pytest.mark.parametrize("channels", [1, 6])
def test_the_evaluator_sees_every_channel(channels, tmp_path):
    spec, pixels = spec_for(tmp_path, channels)
    assert spec.queries is not None
    images = np.concatenate([part.images for part in read_images(spec.queries, spec, None)])
    np.testing.assert_array_equal(images, np.stack([resize_centre_crop(x, 16) for x in pixels]))
    torch.manual_seed(0)
    backbone = BackboneSpec(
        image_size=16, patch_size=8, width=24, depth=1, heads=2, in_channels=channels
    ).build()
    evaluator = Evaluator(spec)
    features = evaluator.features(backbone, spec.queries, None).features
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        expected = backbone.eval()((x - 0.4) / 0.2)
    torch.testing.assert_close(features, expected, atol=2e-5, rtol=0)
    result = evaluator.run(backbone)
    assert 0 <= result.metrics["eval/knn5_top1"] <= 1
    assert {"patch_pca", "neighbours"} == set(result.pictures)
    assert all(p.ndim == 3 and p.shape[2] == 3 for p in result.pictures.values())


def test_memory_of_the_cache_counts_the_channels(tmp_path, monkeypatch):
    spec, _ = spec_for(tmp_path, 6)
    assert spec.queries is not None
    size = spec.queries.rows * 6 * 16**2
    for limit, kept in ((size, 1), (size - 1, 0)):
        monkeypatch.setattr(teacher, "CACHE_BYTES", limit)
        evaluator = Evaluator(spec)
        list(evaluator.parts(spec.queries, None))
        assert len(evaluator._kept) == kept


# What is shown of flat channels of 30, 60, 90, ...
SHOWN = {1: (30, 30, 30), 2: (30, 30, 30), 3: (30, 60, 90), 4: (30, 60, 90), 6: (30, 60, 90)}
LEVELS = np.arange(30, 200, 30).astype(np.uint8)


def centre(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    return picture[row * STRIDE + CELL // 2, column * STRIDE + CELL // 2].astype(int)


@pytest.mark.parametrize("channels", SHOWN)
def test_pictures_show_up_to_three_channels(channels):
    flat = np.broadcast_to(LEVELS[:channels], (4, 28, 28, channels))
    batch = Batch.from_chunk(
        {
            "image_ids": np.zeros((4, 16), np.uint8),
            "global_crops": np.stack([flat, flat], 1),
            "local_crops": np.stack([flat, flat], 1)[:, :, :14, :14],
            "photometric": np.zeros((4, 4, ph.PARAMS), np.float32),
            "masks": np.zeros((4, 2, 16), bool),
            "labels": np.zeros(4, np.int64),
            "valid": np.ones(4, bool),
        }
    )
    spec = ph.PhotometricSpec(mean=(0.3,) * channels, std=(0.2,) * channels)
    sheet = crops_sheet(batch, spec, (4, 4))
    torch.manual_seed(0)
    backbone = BackboneSpec(
        image_size=28, patch_size=14, width=24, depth=1, heads=2, in_channels=channels
    ).build()
    pca = pca_grid(backbone, flat, spec.mean, spec.std)
    near = neighbours_grid(flat, np.stack([flat] * 3, 1), np.ones((4, 3), bool))
    for picture in (sheet, pca, near):
        assert picture.dtype == np.uint8 and picture.shape == (4 * STRIDE - GAP,) * 2 + (3,)
    for row in range(4):
        for column in range(4):
            assert abs(centre(sheet, row, column) - SHOWN[channels]).max() <= 1
            assert abs(centre(near, row, column) - SHOWN[channels]).max() <= 1
    for row, column in ((0, 0), (0, 2), (1, 0), (1, 2)):  # pictures stand left of their maps
        assert abs(centre(pca, row, column) - SHOWN[channels]).max() <= 1
