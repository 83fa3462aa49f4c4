"""Further columns of parquet files: whether the values of one file fit the type of all files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError

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
