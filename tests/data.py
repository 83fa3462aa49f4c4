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


def scene(seed: int, side: int = 96) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A made photograph of spheres on a chequered floor, and how far away each pixel is.

    Rays of a pinhole camera of any height and tilt are cut with the floor and the spheres; colours
    are those of the things by the cosine of the light, and pale in the distance.

    Returns:
        uint8 [side, side, 3], and float32 [side, side] along the axis of the camera; 0 in the sky
        and beyond 30.
    """
    random = np.random.default_rng(seed)
    height, tilt = random.uniform(0.7, 2), random.uniform(0, 0.5)
    line = (np.arange(side) + 0.5) / side * 2 - 1
    down, right = np.meshgrid(line, line, indexing="ij")
    up, ahead = -down * np.cos(tilt) - 1.5 * np.sin(tilt), 1.5 * np.cos(tilt) - down * np.sin(tilt)
    rays = np.stack([right, up, ahead], -1)  # of which 1.5 is along the axis of the camera
    light = np.array([random.uniform(-1, 1), 1.5, -1])
    light /= np.linalg.norm(light)
    sky = 1000.0
    along = np.where(up < -height / sky, -height / np.minimum(up, -1e-9), sky)
    squares = np.floor(rays * along[..., None])[..., ::2].sum(-1, keepdims=True) % 2
    colour = 90 + 110 * squares * random.uniform(0.5, 1, 3)
    for _ in range(6):
        radius = random.uniform(0.2, 0.9)
        centre = np.array([random.uniform(-2, 2), radius - height, random.uniform(2, 8)])
        a, b, c = (rays**2).sum(-1), rays @ centre, centre @ centre - radius**2
        root = np.sqrt(np.maximum(b**2 - a * c, 0))
        near = np.where(root > 0, (b - root) / a, sky)
        normals = (rays * near[..., None] - centre) / radius
        shade = 0.25 + 0.75 * np.clip(normals @ light, 0, 1)[..., None]
        first = near < along
        colour = np.where(first[..., None], 255 * random.uniform(0.2, 1, 3) * shade, colour)
        along = np.where(first, near, along)
    depth = 1.5 * along
    clear = np.exp(-depth / 15)[..., None]
    pixels = clear * colour + (1 - clear) * [170, 190, 215] + random.normal(0, 3, colour.shape)
    known = np.where(depth < 30, depth, 0).astype(np.float32)
    return np.clip(pixels, 0, 255).astype(np.uint8), known
