"""Pools of vectors with planted copies, their tables, and steps that run without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.cell_items import ImageSet
from pipeline.curate.rows import tables
from pipeline.curate.rows.exact import unit_half
from pipeline.curate.steps.steps import Step
from pipeline.shards.shards import ShardColumns, ShardFile

Array = np.ndarray[Any, Any]
MIRROR = np.tile((-1.0) ** np.arange(12), 12)[1:]  # odd horizontal frequencies change their sign


def visiting(full: Array, crops: Array) -> tuple[Array, Array]:
    """Mirrored vector, crops, mirrored crops: [n, 19, 143], and which are of crops."""
    sign = MIRROR.astype(np.float16)
    items = [(full * sign)[:, None], crops, crops * sign]
    return np.concatenate(items, 1), np.array([False] + [True] * 18)


def all_views(full: Array, crops: Array) -> tuple[Array, Array]:
    """The same with the vector itself first: [n, 20, 143]."""
    items, crop = visiting(full, crops)
    return np.concatenate([full[:, None], items], 1), np.append(False, crop)


def planted(
    n: int, dim: int = 384, copies: float = 0.15, lowest: float = 0.62, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Vectors of long-tailed concepts, a share of which are copies of others.

    Returns:
        Half precision [n, dim]; the row that each is a copy of, or -1; exact similarity to it.
    """
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, dim + 1) ** -0.25

    def noise(rows: int) -> Array:
        x = rng.standard_normal((rows, dim)) * spectrum
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    copied = int(n * copies)
    own = n - copied
    concepts = max(20, own // 300)
    size = 1 / np.arange(1, concepts + 1) ** 0.8
    concept = rng.choice(concepts, own, p=size / size.sum())
    x = np.empty((n, dim), np.float32)
    coarse, fine = noise(max(10, concepts // 30)), noise(concepts)
    above = rng.integers(0, len(coarse), concepts)
    for a in range(0, own, 50_000):
        c = concept[a : min(own, a + 50_000)]
        x[a : a + len(c)] = (
            0.1**0.5 * coarse[above[c]] + 0.2**0.5 * fine[c] + 0.7**0.5 * noise(len(c))
        )
    x[:own] /= np.linalg.norm(x[:own], axis=1, keepdims=True)
    sizes = [] if copied < 3000 else [300, 120]
    while sum(sizes) < copied:
        sizes.append(int(rng.geometric(0.35)))
    of = np.repeat(rng.permutation(own)[: len(sizes)], sizes)[:copied]
    expected = lowest + (0.995 - lowest) * rng.beta(1.6, 1.0, copied)
    for a in range(0, copied, 50_000):
        x0, s = x[of[a : a + 50_000]].astype(float), expected[a : a + 50_000, None]
        other = noise(len(x0))
        other -= (other * x0).sum(1, keepdims=True) * x0
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        x[own + a : own + a + len(x0)] = s * x0 + np.sqrt(1 - s * s) * other
    order = rng.permutation(n)
    place = np.argsort(order)
    source = np.concatenate([np.full(own, -1), place[of]])[order]
    half = np.concatenate([unit_half(x[order[a : a + 50_000]]) for a in range(0, n, 50_000)])
    similarity = np.ones(n)
    has = source >= 0
    similarity[has] = np.einsum(
        "nd,nd->n", half[has].astype(float), half[source[has]].astype(float)
    )
    return half, source, similarity


def ids_for(n: int, seed: int = 0) -> Array:
    """Random image ids."""
    return np.random.default_rng([seed, 99]).integers(0, 256, (n, 16)).astype(np.uint8)


@dataclass
class Pool:
    """Tables of a pool on disk."""

    root: Path
    inputs: tables.Inputs
    vectors: tables.Vectors
    prints: Step
    ids: Array

    def images(self, exact: Step | None = None) -> ImageSet:
        """As they are compared."""
        return ImageSet(self.inputs, self.vectors, exact, visiting if self.vectors.views else None)


def write_pool(
    root: Path,
    vectors: Array,
    ids: Array,
    files: Sequence[int],
    crops: Array | None = None,
    kinds: Sequence[str] = (),
    areas: Array | None = None,
    densities: Array | None = None,
) -> Pool:
    """Writes embedding and fingerprint tables; `files` are the rows of each."""
    n, dim = vectors.shape
    assert sum(files) == n
    areas = np.full(n, 100) if areas is None else areas
    densities = np.ones(n) if densities is None else densities
    embedded, first, columns = [], 0, ShardColumns("", "image", "label")
    for index, rows in enumerate(files):
        kind = kinds[index] if kinds else tables.POOL
        file = tables.InputFile(index, "set", kind, first, ShardFile("", rows, (), 0), columns)
        part = slice(first, first + rows)
        row = np.arange(first, first + rows)
        image_id = tables.id_array(ids[part])
        facts = {
            "row": row,
            "image_id": image_id,
            "bytes": (areas[part] * densities[part]).astype(np.int64),
            "width": areas[part].astype(np.int32),
            "height": np.ones(rows, np.int32),
        }
        if crops is None:
            own = {"row": row, "image_id": image_id, "vector": tables.list_array(vectors[part])}
            tables.write_table(pa.table(own), str(root / "embedded"), file.name)
        else:
            facts["descriptor"] = tables.list_array(vectors[part])
            facts["views"] = tables.list_array(crops[part].reshape(rows, -1))
        tables.write_table(pa.table(facts), str(root / "fingerprint"), file.name)
        embedded.append(file)
        first += rows
    views = crops is not None
    folder = root / ("fingerprint" if views else "embedded")
    column = "descriptor" if views else "vector"
    names = tuple(file.name for file in embedded)
    return Pool(
        root,
        tables.Inputs(tuple(embedded), "digest"),
        tables.Vectors(str(folder), names, dim, "key", column, views),
        Step("fingerprint", "facts", str(root / "fingerprint")),
        ids,
    )


def read_all(folder: str, inputs: tables.Inputs) -> pa.Table:
    """The tables of all input files."""
    return pa.concat_tables([tables.read_table(folder, file.name) for file in inputs.files])
