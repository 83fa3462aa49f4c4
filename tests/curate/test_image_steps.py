"""The steps of images on Ray: what is finished is reused, and edges of sets go through."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.curate.embed.embed import embed
from pipeline.curate.images.equal_images import equal_images
from pipeline.curate.images.fingerprint import Decoding, fingerprint
from pipeline.curate.images.quality import Rules, quality
from pipeline.curate.rows.tables import Inputs, read_table
from pipeline.curate.steps.steps import Steps
from pipeline.curate.threshold.calibrate import Sampling, calibrate
from pipeline.embed.embedders import EmbedderSpec, embedder_of
from pipeline.model.vit import BackboneSpec
from pipeline.model.weights import save_backbone
from tests.curate.images import inputs_of, scene, shard
from tests.data import encoded


def all_steps(root, inputs, spec):
    steps, decoding = Steps(root), Decoding()
    prints = fingerprint(steps, inputs, decoding)
    marks = quality(steps, inputs, prints, Rules())
    equal = equal_images(steps, inputs, prints, marks)
    embedded = embed(steps, "embed", inputs, spec, prints, decoding, equal)
    sampling = Sampling(images=60)
    calibration = calibrate(steps, inputs, prints, equal, embedded, sampling, decoding)
    return calibration, embedded.vectors, equal, steps.done


@pytest.mark.slow
def test_on_ray_and_again(tmp_path, ray_cluster):
    torch.manual_seed(0)
    spec = BackboneSpec(image_size=28, width=64, depth=1, heads=1, registers=0)
    weights = save_backbone(spec.build(), spec, tmp_path / "weights")
    images = [encoded(scene(n, 40, 50), "JPEG") for n in range(70)]
    shard(tmp_path / "in" / "a.parquet", images[:40])
    shard(tmp_path / "in" / "b.parquet", [*images[40:], images[0], b""])
    inputs = inputs_of(tmp_path / "in")
    first = all_steps(tmp_path / "out", inputs, embedder_of(str(weights)))
    calibration, vectors, equal, _ = first
    assert (calibration.images, calibration.attacked) == (70, 60)
    assert vectors.dim == 64 and calibration.penalty == 0
    assert equal.total("copies_bytes") == 1 and equal.total("rows") == 71
    rows = [read_table(vectors.folder, n).column("row").to_numpy() for n in vectors.names]
    assert len(np.concatenate(rows)) == 70
    again = all_steps(tmp_path / "out", inputs, embedder_of(str(weights)))
    assert again[:2] == first[:2]
    assert [r.reused for r in again[3]] == [len(r.accounts) for r in again[3]]


@pytest.mark.slow
@pytest.mark.parametrize("images", [0, 1, 2, -3])
def test_edges(tmp_path, ray_cluster, images):
    """No, one, two images; -3: three that cannot be decoded. And no file at all."""
    content = [encoded(scene(n)) for n in range(images)] if images >= 0 else [b"x"] * 3
    shard(tmp_path / "in" / "a.parquet", content)
    for inputs in (inputs_of(tmp_path / "in"), Inputs((), "none")):
        root = tmp_path / f"out{inputs.rows}-{len(inputs.files)}"
        calibration, vectors, equal, _ = all_steps(root, inputs, EmbedderSpec())
        alive = max(0, images) if inputs.files else 0
        assert equal.total("rows") == alive and calibration.images == alive
        assert calibration.warning and len(vectors.names) == len(inputs.files)
