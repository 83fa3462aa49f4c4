"""One unit of decoded images to one part of the table, on disk whole or not at all.

A part holds the bad images of its unit in its metadata, so that nothing of a unit is lost where a
job is killed between two files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.embed.embedders import Embedder
from pipeline.embed.units import Decoded, Unit
from pipeline.embed.vectors import PART_KEY, Facts, list_column, part_name, schema_of
from pipeline.errors import DataError, StorageError
from pipeline.shards.columns import METADATA_KEY
from pipeline.shards.shard_set import open_parquet
from pipeline.storage.places import resolve_uri
from pipeline.storage.transfer import atomic_path

Outputs = dict[str, Any]


def outputs_of(embedder: Embedder, decoded: Decoded, facts: Facts) -> Outputs:
    """The vectors of a unit. Batches are cut from its front, so that they never hold images of
    another one and do not depend on what else is embedded.
    """
    return embedder.outputs(decoded.images, facts["outputs"], facts["blocks"])


def write_part(folder: str, decoded: Decoded, outputs: Outputs, facts: Facts) -> None:
    """Writes the part of a unit. The bytes depend on what is written and on pyarrow alone.

    Raises:
        StorageError: the storage failed for good, or refused.
    """
    schema = schema_of(facts)
    about = {"number": decoded.unit.number, "rows": decoded.unit.rows, "bad": decoded.bad}
    metadata = {**(schema.metadata or {}), PART_KEY: json.dumps(about, ensure_ascii=False).encode()}
    labels = pa.array(decoded.labels, pa.int64(), mask=decoded.labels < 0)
    table = pa.table(
        {
            "image_id": pa.array(decoded.ids, pa.string()),
            "source": pa.array(decoded.sources, pa.string()),
            "label": labels,
            "row": pa.array(decoded.places + decoded.unit.first, pa.int64()),
            **{n: list_column(outputs[n], schema.field(n).type) for n in facts["outputs"]},
        },
        schema.with_metadata(metadata),
    )
    fs, path = resolve_uri(folder)
    # Numbers of a network do not compress: zstd took 6 % off and as long as embedding small images.
    texts = {name: "zstd" for name in ("image_id", "source", "label", "row")}
    plain = {f"{name}.list.element": "none" for name in facts["outputs"]}
    with atomic_path(fs, f"{path}/{part_name(decoded.unit.number)}") as temporary:
        pq.write_table(
            table,
            temporary,
            compression={**texts, **plain},
            use_dictionary=["source"],
            write_statistics=["image_id", "label", "row"],
            row_group_size=max(1, len(table)),
            write_page_checksum=True,  # any bits are numbers: nothing else tells damaged ones
            filesystem=pafs.LocalFileSystem(),
        )


@dataclass(frozen=True)
class Part:
    """A part on disk: vectors in it, and rows of the bad image table."""

    rows: int
    bad: Sequence[dict[str, str]] = ()


def finished_part(folder: str, unit: Unit, key: str) -> Part | None:
    """The part of a unit; None where it is not there, or of another key."""
    fs, path = resolve_uri(folder)
    try:
        with open_parquet(fs, f"{path}/{part_name(unit.number)}") as parquet:
            metadata = parquet.schema_arrow.metadata or {}
            rows = int(parquet.metadata.num_rows)
    except StorageError:
        raise
    except (DataError, FileNotFoundError):  # no part, or a file of somebody else
        return None
    try:
        facts, about = (json.loads(metadata[name]) for name in (METADATA_KEY, PART_KEY))
        same = facts["key"] == key and about["number"] == unit.number
        whole = rows + len(about["bad"]) == about["rows"] == unit.rows
    except (KeyError, TypeError, ValueError):
        return None
    return Part(rows, list(about["bad"])) if same and whole else None
