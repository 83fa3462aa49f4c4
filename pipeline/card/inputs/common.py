"""The images that all tables of a set have, so that models are scored on the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.embed.ids import id_bytes
from pipeline.embed.vectors import VectorSet
from pipeline.errors import DataError
from pipeline.storage.places import make_folder, resolve_uri
from pipeline.storage.transfer import atomic_path
from pipeline.uri import public


def common(tables: Sequence[VectorSet]) -> tuple[list[VectorSet], int]:
    """Tables of one set with the images that all of them have, and how many were left out.

    What one model cannot embed, for its channels or its size, is left out of all. Tables stay as
    they are where they hold the same images.

    Raises:
        DataError: no image is in all of them.
    """
    ids = [id_bytes(one.columns("image_id")["image_id"]) for one in tables]
    if all(np.array_equal(ids[0], other) for other in ids[1:]):
        return list(tables), 0
    shared = ids[0]
    for other in ids[1:]:
        shared = shared[np.isin(shared, other)]
    if not len(shared):
        raise DataError(
            f"no image of {public(tables[0].uri)} could be embedded by all models",
            "evaluate models that take such images, each kind by itself",
        )
    every = len(np.unique(np.concatenate(ids)))
    kept = pa.array(shared.astype("U32"), pa.string())
    return [_only(one, kept) for one in tables], every - len(np.unique(shared))


def _only(vectors: VectorSet, ids: pa.Array) -> VectorSet:
    """A copy of a table, beside it, with these images alone."""
    fs, folder = resolve_uri(vectors.uri)
    make_folder(fs, f"{folder}/common")
    parts = []
    for name, _ in vectors.parts:
        table = pq.read_table(f"{folder}/{name}", filesystem=fs)
        kept = table.filter(pc.is_in(table["image_id"], value_set=ids))
        with atomic_path(fs, f"{folder}/common/{name}") as temporary:
            pq.write_table(kept, temporary)
        parts.append((name, len(kept)))
    parts = [(name, rows) for name, rows in parts if rows]
    return replace(vectors, uri=f"{vectors.uri}/common", parts=tuple(parts))
