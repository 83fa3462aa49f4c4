"""Images and sets of them for tests."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.pack.bad_files import PackReport
from pipeline.shards.columns import IMAGE_SHARD_SCHEMA, image_id, is_ours, shard_metadata
from pipeline.shards.shards import ShardSet, open_shards


def noise(seed: int, height: int = 24, width: int = 0) -> np.ndarray[Any, Any]:
    """uint8 [height, width or height, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width or height, 3), np.uint8)


def encoded(picture: Any, form: str = "PNG", **options: Any) -> bytes:
    """An array or a picture of Pillow's as a file."""
    stream = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(stream, form, **options)
    return stream.getvalue()


def own_table(
    images: Sequence[bytes],
    label: Sequence[int | None] | None = None,
    names: Sequence[str] = (),
    **columns: Any,
) -> pa.Table:
    """Images as pack writes them, in the order given; `columns` in place of made ones."""
    made = {
        "image_id": [image_id(image) for image in images],
        "image": list(images),
        "width": [1] * len(images),
        "height": [1] * len(images),
        "format": ["PNG"] * len(images),
        "source": [str(row) for row in range(len(images))],
        "label": label if label is not None else [None] * len(images),
    }
    schema = IMAGE_SHARD_SCHEMA.with_metadata(shard_metadata(names))
    return pa.table(made | columns, schema=schema)


def hub_table(
    images: Sequence[bytes | None],
    label: Sequence[Any] | None = None,
    names: Sequence[str] = (),
    **columns: Any,
) -> pa.Table:
    """Images as hubs store them, a struct of bytes and path, with names of classes where given."""
    rows = [x if x is None else {"bytes": x, "path": f"{n}.jpg"} for n, x in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = {} if label is None else {"label": pa.array(label)}
    table = pa.table({"image": pa.array(rows, kind)} | labels | columns)
    if names:
        about = {"info": {"features": {"label": {"_type": "ClassLabel", "names": list(names)}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    return table


def written(table: Any, path: Path, group: int) -> pa.Schema:
    """Writes a file of parquet with row groups of `group` rows; makes its folder.

    Args:
        table: an arrow table, or columns, or the images alone.
        path: of the file.
        group: rows of a row group.
    """
    if isinstance(table, list):
        table = {"image": pa.array(table, pa.binary())}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = table if isinstance(table, pa.Table) else pa.table(table)
    pq.write_table(whole, path, row_group_size=group)
    return whole.schema


def stored(table: Any, path: Path, group: int) -> ShardSet:
    """Writes it and opens the set of its folder; a shard of ours, which has no manifest, alone."""
    ours = is_ours(written(table, path, group))
    return open_shards(str(path if ours else path.parent))


def packed(
    source: Any, out: Path, shards: str = "", field: str = "data.source", **options: Any
) -> PackReport:
    """Packs into `out/shards`, its lists in `out`; options of `PackOptions`, and `progress`."""
    from pipeline.pack.pack import PackOptions, PackPlaces, pack

    progress = options.pop("progress", None)
    places = PackPlaces(bad_images=str(out / "bad.parquet"), scratch=str(out / "work"))
    shards = shards or str(out / "shards")
    return pack(
        str(source), shards, places, PackOptions(**options), field=field, on_progress=progress
    )
