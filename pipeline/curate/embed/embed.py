"""Images to vectors: one file of unit vectors for each input file, on GPUs where there are any.

A worker keeps its model from task to task, decodes a row group with all its CPUs and embeds it in
batches while the rest is decoded. A finished file is not embedded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from pipeline.curate.images import descriptor
from pipeline.curate.images.fingerprint import fingerprint, groups_of
from pipeline.curate.rows.exact import Halves, unit_half
from pipeline.curate.rows.tables import (
    InputFile,
    Inputs,
    Vectors,
    id_array,
    list_array,
    read_table,
    table_writer,
    vector_schema,
)
from pipeline.curate.steps.steps import Account, Result, Task, run_step
from pipeline.embed.embedders import DESCRIPTOR, Embedder, EmbedderSpec, Images, open_embedder
from pipeline.images.bad_image import MAX_PIXELS, BadImage
from pipeline.images.decode import decode_image
from pipeline.shards.row_group import RowGroup
from pipeline.uri import Place

VERSION = 2
DECODED = 1024  # images of a row group that are decoded ahead, at most: groups of 10,000 exist


def embed(
    root: Place,
    step: str,
    inputs: Inputs,
    distinct: Result | None,
    spec: EmbedderSpec,
    *,
    fingerprints: Result | None = None,
    max_pixels: int = MAX_PIXELS,
    channels: int = 3,
) -> tuple[Vectors, Result]:
    """Vectors of all images, or of one of each group of equal ones.

    The descriptor is read from the fingerprints, which hold all rows; who reads them leaves out the
    rest by the same `distinct`. Without fingerprints they are made, under the name of the step.

    Args:
        root: folder of the curation.
        step: its name.
        inputs: all images.
        distinct: of `exact_copies.collapse`, without marks, so that no threshold changes what is
            embedded: only rows that are their own keeper; None: all that can be decoded.
        spec: the embedder.
        fingerprints: of the same inputs.
        max_pixels: larger images are refused.
        channels: of an image, where fingerprints are made.

    Returns:
        where the vectors are, and the step that made them.
    """
    names = tuple(file.name for file in inputs.files)
    if spec.kind == DESCRIPTOR:
        prints = fingerprints or fingerprint(
            root, inputs, max_pixels=max_pixels, channels=channels, step=step
        )
        column, dim = "descriptor", descriptor.DIM
        return Vectors(prints.folder, names, dim, prints.key, column, views=True), prints
    gpus, cpus = task_resources()
    exact = distinct.folder if distinct else ""
    tasks = [
        Task(file.name, (file, spec, exact, max_pixels, bool(gpus), int(cpus)))
        for file in inputs.files
    ]
    settings = [VERSION, inputs.digest, distinct.key if distinct else "", spec.settings, max_pixels]
    embedded = run_step(root, step, settings, tasks, embed_file, cpus=cpus, gpus=gpus)
    dim = int(embedded.accounts[0]["dim"]) if embedded.accounts else 0
    return Vectors(embedded.folder, names, dim, embedded.key), embedded


def task_resources() -> tuple[float, float]:
    """GPUs and CPUs of a task that embeds: a GPU and its share of the CPUs, which decode for it, or
    one CPU.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # Of the nodes with GPUs alone: a task must fit on one of them, whatever others have.
    shares = [n.get("CPU", 0.0) // n["GPU"] for n in nodes if n.get("GPU", 0.0) >= 1]
    return (1.0, float(max(1.0, min(shares)))) if shares else (0.0, 1.0)


def embed_file(
    folder: str,
    file: InputFile,
    spec: EmbedderSpec,
    exact: str = "",
    max_pixels: int = MAX_PIXELS,
    gpu: bool = False,
    threads: int = 1,
) -> Account:
    """Task: the vectors of one file, by row; rows that cannot be decoded are left out."""
    embedder = open_embedder(spec, gpu, threads)
    is_distinct = np.ones(file.rows, bool)
    if exact:
        table = read_table(exact, file.name, ["row", "keeper"])
        row, keeper = table.column("row").to_numpy(), table.column("keeper").to_numpy()
        is_distinct[:] = False
        is_distinct[row[row == keeper] - file.first] = True

    value_range = file.columns.value_range

    def prepared(group: RowGroup, row: int) -> Images | None:
        try:
            encoded = group.checked(row)
            pixels = decode_image(encoded, embedder.channels, max_pixels, value_range)
            return embedder.prepare(pixels)
        except BadImage:
            return None

    rows = first = 0
    schema = vector_schema(embedder.dim)
    starts = np.cumsum([0, *file.file.row_groups])
    groups = [g for g in range(len(starts) - 1) if is_distinct[starts[g] : starts[g + 1]].any()]
    with (
        table_writer(schema, folder, file.name) as (writer, size),
        ThreadPoolExecutor(threads) as pool,
    ):
        for number, (group, _) in zip(groups, groups_of(file, groups), strict=True):
            first = int(starts[number])
            chosen = np.flatnonzero(is_distinct[first : first + len(group)])
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
