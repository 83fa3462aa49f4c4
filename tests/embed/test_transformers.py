"""What transformers makes of photos on disk and exported weights is what embed writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.embed.embedders import embedder_of
from pipeline.embed.run import Request, embed_set
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.pair import BackboneSpec
from pipeline.model.weights import save_huggingface
from pipeline.shards.shards import open_shards
from tests.curate.images import shard
from tests.embed.conftest import MEAN, STD


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("inline")
def test_a_thousand_photos(shared: Path, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    from PIL import Image, ImageOps

    paths = sorted((shared / "data" / "imagenet-samples").glob("*.JPEG"))
    assert len(paths) == 1000
    spec = BackboneSpec(image_size=112, patch_size=14, width=64, depth=4, heads=2, registers=4)
    torch.manual_seed(0)
    network = spec.build()
    with torch.no_grad():  # as large as that of trained networks
        for name, value in network.named_parameters():
            if "gamma" in name:
                value.fill_(0.5)
    folder = save_huggingface(network.eval(), spec, tmp_path / "hf", Preprocessing(112, MEAN, STD))
    shard(tmp_path / "in" / "a.parquet", [path.read_bytes() for path in paths], group=100)
    request = Request(embedder_of(str(folder)), open_shards(str(tmp_path / "in")))
    vectors = embed_set(request, str(tmp_path / "vectors")).vectors
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    theirs = []
    with torch.no_grad():
        for at in range(0, len(paths), 50):
            # one photo says that it lies on its side
            images = [
                ImageOps.exif_transpose(Image.open(path)).convert("RGB")
                for path in paths[at : at + 50]
            ]
            inputs = processor(images=images, return_tensors="pt")
            theirs.append(model(**inputs).last_hidden_state[:, 0])
    assert vectors.rows == 1000
    off = (torch.from_numpy(vectors.read()) - torch.cat(theirs)).abs().amax(1).numpy()
    assert np.median(off) < 1e-5 and off.max() < 1e-5, np.sort(off)[-20:]
