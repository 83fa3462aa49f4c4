"""What an image shard is: columns, ids and metadata. The contract is in docs/data.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.images.value_range import FULL, ValueRange, from_json
from pipeline.shards.classes import canonical, label_kind

SCHEMA_VERSION = 1
MANIFEST = "_manifest.json"
METADATA_KEY = b"raydino"

IMAGE_SHARD_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),  # 32 hex digits, see `image_id`
        pa.field("image", pa.binary(), nullable=False),  # encoded bytes as they came
        pa.field("width", pa.int32(), nullable=False),  # pixels, after EXIF orientation
        pa.field("height", pa.int32(), nullable=False),
        pa.field("format", pa.string(), nullable=False),  # JPEG, PNG, ... as Pillow names it
        pa.field("source", pa.string(), nullable=False),  # path inside the packed source
        pa.field("label", pa.int64()),  # null where unknown
    ]
)

BAD_IMAGE_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("image_id", pa.string()),  # null where no bytes could be read
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


def image_id(encoded: bytes) -> str:
    """Name an image by its encoded bytes: blake2b with a 128-bit digest, as 32 hex digits."""
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def shard_metadata(
    class_names: Sequence[str], value_range: ValueRange = FULL
) -> dict[bytes, bytes]:
    """The file metadata of a shard that this project wrote."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "class_names": list(class_names),
        "value_range": value_range,
    }
    return {METADATA_KEY: json.dumps(content, ensure_ascii=False).encode()}


def class_names_of(schema: pa.Schema, label_column: str = "label") -> tuple[str, ...]:
    """Class names in a parquet schema: ours, or those a hub data set keeps; () where none are.

    Hub data sets describe their columns in the `huggingface` key: info.features.<column>.names.
    """
    metadata = schema.metadata or {}
    ours = _json(metadata.get(METADATA_KEY))
    if ours is not None:
        return _texts(ours.get("class_names"))
    node: Any = _json(metadata.get(b"huggingface"))
    for key in ("info", "features", label_column, "names"):
        node = node.get(key) if isinstance(node, dict) else None
    if isinstance(node, dict):  # some writers store {"0": "cat", "1": "dog"}
        numbers = [str(i) for i in range(len(node))]
        node = [node[i] for i in numbers] if set(node) == set(numbers) else None
    return _texts(node)


def _texts(names: Any) -> tuple[str, ...]:
    """A list of class names as written by anyone; () where it is none."""
    plain = isinstance(names, list) and all(isinstance(n, str | int | float) for n in names)
    return canonical(names) if plain else ()


def value_range_of(schema: pa.Schema) -> ValueRange | None:
    """The range of values in a parquet schema of ours; None where none is noted.

    Raises:
        DataError: what is noted there is no range.
    """
    return from_json((_json((schema.metadata or {}).get(METADATA_KEY)) or {}).get("value_range"))


def is_ours(schema: pa.Schema) -> bool:
    """Whether this project wrote the file, so that its ids can be trusted.

    Raises:
        DataError: the file has a schema version that this code does not know.
    """
    ours = _json((schema.metadata or {}).get(METADATA_KEY))
    if ours is None or "schema_version" not in ours:  # a table of vectors, that has no images
        return False
    if ours.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"the shard has schema version {ours.get('schema_version')}, this code reads "
            f"{SCHEMA_VERSION}",
            hint="pack the images again, or use the version that wrote them.",
        )
    # Anyone can write the mark; what has other columns is read as a file of others.
    return all(
        schema.names.count(field.name) == 1 and schema.field(field.name).type == field.type
        for field in IMAGE_SHARD_SCHEMA
    )


def _json(value: bytes | None) -> dict[str, Any] | None:
    try:
        content = json.loads(value) if value is not None else None
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def check_columns(schema: pa.Schema, name: str, image_column: str, label_column: str) -> None:
    """Refuse a file whose image or label column is missing or cannot be used.

    A missing label column is an error only if the user named one. An empty `label_column` says
    that labels are not looked at.

    Raises:
        DataError: what the file has, what was expected, and what to set.
    """
    columns = ", ".join(schema.names)
    for column in (image_column, label_column):
        if schema.names.count(column) > 1:
            raise DataError(
                f'{name} has {schema.names.count(column)} columns "{column}"',
                hint="give one of them another name, or take the file away.",
            )
    if image_column not in schema.names:
        guess = next((n for n in schema.names if is_image_type(schema.field(n).type)), "NAME")
        raise DataError(
            f'shard {name} has no column "{image_column}" (found: {columns}).',
            hint=f"Name it with data.image_column={guess}.",
        )
    kind = schema.field(image_column).type
    if not is_image_type(kind):
        raise DataError(
            f'column "{image_column}" of {name} holds {kind}, expected the encoded image: binary '
            "or struct<bytes: binary, path: string>.",
            hint="name the column of the image bytes with data.image_column=NAME.",
        )
    if label_column in schema.names:
        kind = schema.field(label_column).type
        if label_kind(kind) is None:
            raise DataError(
                f'column "{label_column}" of {name} holds {kind}, expected class names (text, '
                "categories, booleans) or class ids (whole numbers).",
                hint="name another column with data.label_column=NAME, or leave labels out with "
                "data.labels=none.",
            )
    elif label_column not in ("label", ""):
        raise DataError(
            f'shard {name} has no column "{label_column}" (found: {columns}).',
            hint="name the column of the labels with data.label_column=NAME, or leave labels out "
            "with data.labels=none.",
        )


def is_image_type(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold encoded images."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and is_image_type(kind.field("bytes").type)
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


# ---- Further columns of parquet files: whether the values of one file fit the type of all files.


Kept = Sequence[tuple[str, pa.Field]]  # name in the file, field in the shards


def check_fit(
    file: str, opened: Callable[[], pq.ParquetFile], kept: Kept, joined: pa.Schema
) -> None:
    """Refuses a file whose values the common type of a column cannot hold exactly.

    Only columns whose type differs from the common one are read.

    Args:
        file: for the sentence.
        opened: opens it.
        kept: its further columns.
        joined: the common types.

    Raises:
        DataError: names the column, the file, both types and a value.
    """
    differing = {
        name: (field, joined.field(field.name).type)
        for name, field in kept
        if field.type != joined.field(field.name).type and not pa.types.is_null(field.type)
    }
    if not differing:
        return
    with opened() as parquet:
        for batch in parquet.iter_batches(columns=list(differing)):
            for name, (field, kind) in differing.items():
                try:
                    batch.column(name).cast(kind)
                except pa.ArrowException as error:
                    raise DataError(
                        f'column "{name}" is {field.type} in {file} and {kind} together with the '
                        "other files, which cannot hold all its values: "
                        f"{str(error).splitlines()[0]}",
                        hint="give the column one type in all files, pack them apart, or leave the "
                        "column out.",
                    ) from error
