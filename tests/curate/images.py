"""Small sets of images as a hub stores them, for tests of curation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

from pipeline.curate.rows.tables import POOL, Inputs
from pipeline.curate.steps.steps import Step
from pipeline.shards.shards import open_shards


def scene(seed: int, height: int = 96, width: int = 120) -> np.ndarray[Any, Any]:
    """uint8 [H, W, 3]: soft coloured blobs, unlike those of every other seed."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (12, 15, 3), np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(1)))


def shard(path: Path, images: Sequence[bytes], group: int = 4, groups: Sequence[int] = ()) -> Path:
    """A file of row groups of `group` images, or of `groups` images each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": image, "path": f"{path.stem}/{i}.img"} for i, image in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind)})
    with pq.ParquetWriter(path, table.schema) as writer:
        for size in groups or [len(rows)]:
            writer.write_table(table.slice(0, size), row_group_size=size if groups else group)
            table = table.slice(size)
    return path


def inputs_of(folder: Path, *sets: tuple[str, str]) -> Inputs:
    """All shards of a folder as a pool, or some by (name, kind), each `name.parquet`."""
    if not sets:
        return Inputs.of([("pool", POOL, open_shards(str(folder)))])
    return Inputs.of([(n, k, open_shards(str(folder / f"{n}.parquet"))) for n, k in sets])


def result(folder: Path | str, key: str = "key", accounts: Sequence[Any] = ()) -> Step:
    """A finished step."""
    return Step("step", key, str(folder), tuple(accounts))
