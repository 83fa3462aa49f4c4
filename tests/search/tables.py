"""A small set of images with vectors on disk, as `embed` leaves them, made here without Ray."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.embed.embedders import EmbedderSpec, open_embedder
from pipeline.embed.vectors import VectorSet, open_vectors, schema_of
from pipeline.images.decode import decode_image
from pipeline.shards.columns import image_id
from pipeline.shards.shards import open_shards
from tests.data import own_table, stored

CLASSES = ("cat", "dog")


def write_shard(path: Path, images: list[bytes], group: int = 5) -> None:
    """A shard of ours: images in the order of their ids; their labels go by their source."""
    order = sorted(range(len(images)), key=lambda n: image_id(images[n]))
    sources = [f"photos/{CLASSES[n % 2]}/{n}.png" for n in order]
    table = own_table([images[n] for n in order], [n % 2 for n in order], CLASSES, source=sources)
    stored(table, path, group)


def write_vectors(folder: Path, shard: Path, spec: EmbedderSpec, parts: int = 2) -> VectorSet:
    """Vectors of all images of a shard, in so many files."""
    images = open_shards(str(shard))
    table = pq.read_table(shard)
    embedder = open_embedder(spec)
    prepared = [
        embedder.prepare(decode_image(encoded, embedder.channels))
        for encoded in table["image"].to_pylist()
    ]
    facts: dict[str, Any] = {
        "version": 1,
        "key": f"{spec.digest}-{images.digest}",
        "model": spec.name,
        "kind": spec.kind,
        "digest": spec.digest,
        "dim": embedder.dim,
        "image_size": embedder.size,
        "channels": embedder.channels,
        "mean": list(embedder.mean),
        "std": list(embedder.std),
        "grid": list(embedder.grid),
        "outputs": ["cls"],
        "blocks": 4,
        "dtype": "float32",
        "value_range": "full",
        "class_names": list(images.class_names),
        "shards": {
            "uri": images.uri,
            "digest": images.digest,
            "image_column": images.image_column,
            "label_column": images.label_column,
            "labels": True,
        },
    }
    return write_table(folder, facts, table, embedder.outputs(prepared)["cls"], parts)


def write_table(
    folder: Path, facts: dict[str, Any], images: pa.Table, vectors: np.ndarray, parts: int = 1
) -> VectorSet:
    """A table of vectors with these facts."""
    folder.mkdir(parents=True, exist_ok=True)
    schema = schema_of(facts)
    table = pa.table(
        [
            images["image_id"].combine_chunks(),
            images["source"].combine_chunks(),
            images["label"].combine_chunks(),
            pa.array(range(len(images)), pa.int64()),
            pa.FixedSizeListArray.from_arrays(
                pa.array(np.ravel(vectors), pa.float32()), type=schema.field("cls").type
            ),
        ],
        schema=schema,
    )
    cuts = np.linspace(0, len(table), parts + 1).astype(int)
    names = []
    for number, (first, end) in enumerate(pairwise(cuts)):
        names.append([f"part-{number:05}.parquet", int(end - first)])
        pq.write_table(table.slice(first, end - first), folder / names[-1][0])
    (folder / "_vectors.json").write_text(json.dumps(facts | {"parts": names}))
    return open_vectors(str(folder))


def write_decisions(run: Path, decisions: list[dict[str, Any]]) -> None:
    """What a curation left in a run folder, as far as search reads it."""
    folder = run / "curate/steps/decisions"
    folder.mkdir(parents=True)
    schema = pa.schema(
        [
            ("image_id", pa.string()),
            ("kept", pa.bool_()),
            ("reason", pa.string()),
            ("keeper_id", pa.string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(decisions, schema), folder / "00000.parquet")
