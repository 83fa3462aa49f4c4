"""Images to vectors: one file of unit vectors for each input file, on GPUs where there are any.

A worker keeps its model from task to task, decodes a row group with all its CPUs and embeds it in
batches while the rest is decoded. A finished file is not embedded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.curate.images import descriptor
from pipeline.curate.images.fingerprint import Decoding, groups_at
from pipeline.curate.rows.exact import Halves, unit_half
from pipeline.curate.rows.read_rows import own_rows
from pipeline.curate.rows.tables import (
    InputFile,
    Inputs,
    Vectors,
    id_array,
    list_array,
    vector_schema,
)
from pipeline.curate.steps.steps import Account, Output, Resources, Step, Steps
from pipeline.embed.embedders import DESCRIPTOR, Embedder, EmbedderSpec, open_embedder
from pipeline.embed.forward import Images
from pipeline.images.bad_image import MAX_PIXELS, BadImage
from pipeline.shards.row_group import RowGroup

VERSION = 2
DECODED = 1024  # images of a row group that are decoded ahead, at most: groups of 10,000 exist


@dataclass(frozen=True)
class Embedded:
    """Images as vectors: what made them, and where they are."""

    spec: EmbedderSpec
    vectors: Vectors


def embed(
    steps: Steps,
    name: str,
    inputs: Inputs,
    spec: EmbedderSpec,
    prints: Step,
    decoding: Decoding,
    distinct: Step | None = None,
) -> Embedded:
    """Vectors of all images, or of one of each group of equal ones.

    The descriptor is read from the fingerprints, which hold all rows; who reads them leaves out the
    others by the same `distinct`.

    Args:
        steps: of the curation.
        name: of the step.
        inputs: all images.
        spec: the embedder.
        prints: fingerprints of the same inputs.
        decoding: of the images; the channels are those that the embedder takes.
        distinct: of `equal_images`, without marks, so that no threshold changes what is embedded:
            only rows that are their own keeper; None: all that can be decoded.
    """
    names = tuple(inputs.by_name)
    if spec.kind == DESCRIPTOR:
        column, dim = "descriptor", descriptor.DIM
        vectors = Vectors(prints.folder, names, dim, prints.key, column, views=True)
        return Embedded(spec, vectors)
    embedded = steps.run(
        name,
        embed_file,
        inputs.by_name,
        task_resources(),
        VERSION,
        spec=spec,
        max_pixels=decoding.max_pixels,
        distinct=distinct,
    )
    dim = int(embedded.accounts[0]["dim"]) if embedded.accounts else 0
    return Embedded(spec, Vectors(embedded.folder, names, dim, embedded.key))


def task_resources() -> Resources:
    """Of a task that embeds: a GPU and its share of the CPUs, which decode for it, or one CPU."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # Of the nodes with GPUs alone: a task must fit on one of them, whatever others have.
    shares = [n.get("CPU", 0.0) // n["GPU"] for n in nodes if n.get("GPU", 0.0) >= 1]
    return Resources(float(max(1.0, min(shares))), 1.0) if shares else Resources()


def embed_file(
    out: Output,
    file: InputFile,
    spec: EmbedderSpec,
    max_pixels: int = MAX_PIXELS,
    distinct: Step | None = None,
) -> Account:
    """Task: the vectors of one file, by row; rows that cannot be decoded are left out."""
    embedder = open_embedder(spec, out.gpu, out.threads)
    decoding = Decoding(embedder.channels, max_pixels)
    is_distinct = np.ones(file.rows, bool)
    if distinct:
        is_distinct[:] = False
        is_distinct[own_rows(distinct.folder, file.name) - file.first] = True

    def prepared(group: RowGroup, row: int) -> Images | None:
        try:
            pixels = decoding.pixels(group.checked(row), file.columns.value_range)
            return embedder.prepare(pixels)
        except BadImage:
            return None

    rows = 0
    schema = vector_schema(embedder.dim)
    with out.writer(schema) as (writer, size), ThreadPoolExecutor(out.threads) as pool:
        for group, chosen, first in groups_at(file, np.flatnonzero(is_distinct)):
            kept: list[int] = []
            waiting: list[Images] = []
            vectors = []
            for at in range(0, len(chosen), DECODED):
                part = chosen[at : at + DECODED].tolist()
                for place, image in zip(
                    part, pool.map(prepared, [group] * len(part), part), strict=True
                ):
                    if image is None:
                        continue
                    kept.append(place)
                    waiting.append(image)
                    if len(waiting) == spec.batch_size:
                        vectors.append(unit_vectors(embedder, waiting))
                        waiting = []
            vectors.append(unit_vectors(embedder, waiting))
            writer.write_table(_table(file.first + first, kept, group.image_ids, vectors, schema))
            rows += len(kept)
    return {"rows": rows, "bytes": size(), "dim": embedder.dim}


def unit_vectors(embedder: Embedder, images: Sequence[Images]) -> Halves:
    """Prepared images to CLS vectors of unit length in half precision, [n, D]."""
    return unit_half(embedder.outputs(images)["cls"])


def _table(
    first: int,
    places: Sequence[int],
    ids: np.ndarray,
    vectors: Sequence[np.ndarray],
    schema: pa.Schema,
) -> pa.Table:
    columns = {
        "row": first + np.asarray(places, np.int64),
        "image_id": id_array(ids[np.asarray(places, np.int64)]),
        "vector": list_array(np.concatenate(vectors)),
    }
    return pa.table(columns, schema)
