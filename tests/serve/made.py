"""A small set of coloured shapes with labels, its shard, its vectors, and the model of these."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageDraw

from pipeline.embed.embedders import embedder_of, open_embedder
from pipeline.images.value_range import FULL
from pipeline.model.pair import BackboneSpec
from pipeline.model.weights import save_backbone
from pipeline.shards.columns import image_id
from pipeline.shards.shards import open_shards
from tests import data
from tests.search.tables import write_table

# Names of classes and files come from strangers.
EVIL = "<img src=x onerror=alert(1)>"
CLASSES = ("disc", "square", EVIL)
SIDE, PATCH = 56, 14


@dataclass(frozen=True)
class Made:
    """Paths, and what is planted."""

    model: str
    vectors: str
    shard: str
    images: dict[str, bytes]  # encoded, by id
    ids: list[str]  # in the order of the rows
    sources: list[str]
    labels: list[int]


def encoded(label: int, seed: int, side: int = 96) -> bytes:
    """A shape of its class in colours of its own, as PNG."""
    draw = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(draw.integers(0, 256, 3).tolist()))
    brush, colour = ImageDraw.Draw(image), tuple(draw.integers(0, 256, 3).tolist())
    box = (side // 5, side // 5, side - side // 4, side - side // 4)
    if label == 0:
        brush.ellipse(box, fill=colour)
    elif label == 1:
        brush.rectangle(box, fill=colour)
    else:
        brush.line(box, fill=colour, width=side // 8)
    return data.encoded(image)


def save_model(folder: Path, seed: int = 0) -> str:
    """Weights of a tiny ViT with registers."""
    torch.manual_seed(seed)
    spec = BackboneSpec(
        image_size=SIDE, patch_size=PATCH, width=64, depth=2, heads=2, registers=2, layer_scale=1.0
    )
    backbone = spec.build()
    with torch.no_grad():
        for weight in backbone.parameters():
            if weight.ndim > 1:  # as drawn, the output hardly depends on the image
                weight.mul_(4)
    save_backbone(backbone, spec, folder)
    return str(folder)


def make(folder: Path, rows: int = 60) -> Made:
    """Writes shard, model and vectors."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [encoded(i % 3, i) for i in range(rows)]
    order = sorted(range(rows), key=lambda i: image_id(images[i]))
    labels = [i % 3 for i in order]
    sources = [f"{EVIL}/{i:03}.png" for i in order]
    images = [images[i] for i in order]
    ids = [image_id(one) for one in images]
    shard = folder / "shard.parquet"
    write_shard(shard, images, sources, labels)
    model = save_model(folder / "weights")
    embedder = open_embedder(embedder_of(model))
    pixels = [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in images]
    vectors = embedder.outputs([embedder.prepare(one) for one in pixels])["cls"]
    facts = facts_of(embedder.spec, vectors.shape[1], str(shard))
    write_vectors(folder / "vectors", vectors, ids, sources, labels, facts)
    return Made(
        model, str(folder / "vectors"), str(shard), dict(zip(ids, images, strict=True)), ids,
        sources, labels,
    )  # fmt: skip


def write_shard(
    path: Path,
    images: list[bytes],
    sources: list[str],
    labels: list[int],
    ids: list[str] | None = None,
    rows_per_group: int = 16,
) -> None:
    """One shard of ours."""
    columns = {"source": sources, "width": [96] * len(images), "height": [96] * len(images)}
    columns |= {"image_id": ids} if ids else {}
    data.written(data.own_table(images, labels, CLASSES, **columns), path, rows_per_group)


def facts_of(spec: Any, dim: int, shard: str) -> dict[str, Any]:
    """What a table of vectors says of itself."""
    return {
        "version": 1,
        "key": "made for a test",
        "model": spec.name,
        "digest": spec.digest,
        "image_size": spec.image_size,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "value_range": FULL,
        "class_names": list(CLASSES),
        "outputs": ["cls"],
        "dim": dim,
        "blocks": 0,
        "grid": [SIDE // PATCH, SIDE // PATCH],
        "channels": 3,
        "dtype": "float32",
        "shards": {
            "uri": shard,
            "digest": open_shards(shard).digest,
            "image_column": "image",
            "label_column": "label",
            "labels": True,
        },
    }


def write_vectors(
    folder: Path,
    vectors: np.ndarray[Any, Any],
    ids: list[str],
    sources: list[str],
    labels: list[int],
    facts: dict[str, Any],
) -> None:
    """The folder that `embed` leaves, of one part."""
    rows = {"image_id": pa.array(ids, pa.string()), "source": pa.array(sources, pa.string())}
    table = pa.table(rows | {"label": pa.array(labels, pa.int64())})
    write_table(folder, facts, table, vectors)
