"""Equal images, by bytes or by pixels: one row of each group is kept, before anything is joined.

Equal bytes decode to equal pixels, so one shuffle by the hash of the pixels brings both kinds
together. Only narrow rows travel (hash, id, row, bytes: 57 bytes each); a task holds a bucket of
hashes or a range of rows, never all of them.

Groups are made of all images that can be decoded. Quality rules measure pixels, so they pass or
fail a group as a whole: other limits change which groups there are, and no keeper.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.rows.first_of_each import first_of_each, id_words
from pipeline.curate.rows.read_rows import file_groups, own_rows
from pipeline.curate.rows.tables import AS_IS, EXACT, ID, ROW, InputFile, Inputs, ids_of
from pipeline.curate.steps.steps import Account, Output, Step, Steps, numbered

BUCKET_ROWS = 4_000_000  # of 57 bytes: with what sorting needs, half a gigabyte

# A row as it is told from equal ones. Smaller `later`, `tie` and ids are kept, and more bytes.
HASHES = pa.schema(
    [
        ("row", ROW),
        ("image_id", ID),
        ("bytes", pa.int64()),
        ("pixel_hash", ID),
        ("tie", pa.uint64()),
        ("later", pa.uint8()),
    ]
)
# A row that goes: with the row that is kept for it, and by what they are equal.
GONE = pa.schema([("row", ROW), ("keeper", ROW), ("method", pa.string())])


def equal_images(
    steps: Steps, inputs: Inputs, prints: Step, marks: Step | None = None, name: str = "exact"
) -> Step:
    """Writes `tables.EXACT` of every input file.

    Of equal images the one is kept that is in a set taken as it is, then the one with more bytes
    (equal pixels have equal areas), then the smaller image id. Rows of equal bytes differ in their
    source only: the smaller hash of set and source, so that the order of the files does not count.

    Args:
        steps: of the curation.
        inputs: all images.
        prints: fingerprints of them.
        marks: of quality rules; rows that are marked are left out. None: only rows that cannot be
            decoded are.
        name: of the last of the three steps; the others are the same for any marks.

    Returns:
        the last step. Accounts have rows, bytes, `copies_bytes` and `copies_pixels` (rows that are
        not kept).
    """
    buckets = max(1, -(-inputs.rows // BUCKET_ROWS))
    hashes = steps.run("exact_hashes", hash_pixels, inputs.by_name, prints=prints, buckets=buckets)
    # Marks come last: another rule reads the groups that are there.
    groups = steps.run("exact_groups", group_pixels, numbered(buckets), hashes=hashes)
    files = file_groups(inputs.files)
    return steps.run(name, write_files, files, prints=prints, marks=marks, groups=groups)


def kept_count(equal: Step) -> int:
    """Rows that are their own keeper, by the accounts of `equal_images`."""
    copies = equal.total("copies_bytes") + equal.total("copies_pixels")
    return int(equal.total("rows") - copies)


def passing(prints: Step, marks: Step | None, name: str, columns: Sequence[str]) -> pa.Table:
    """Columns of the fingerprints of a file, of the rows that can be decoded and pass quality."""
    table = prints.read(name, [*columns, "error"])
    keep = pc.equal(table["error"], "")
    if marks:
        keep = pc.and_(keep, pc.equal(marks.read(name, ["reason"])["reason"], ""))
    return table.filter(keep).select(list(columns))


def hash_pixels(out: Output, file: InputFile, prints: Step, buckets: int) -> None:
    """Task: sends the rows of a file to the buckets of their pixel hashes."""
    table = passing(prints, None, file.name, [*HASHES.names[:4], "source"])
    ties = b"".join(
        blake2b(f"{file.set}\0{source}".encode(), digest_size=8).digest()
        for source in table["source"].to_pylist()
    )
    tie = np.frombuffer(ties, ">u8").astype(np.uint64)
    later = np.full(len(table), file.kind != AS_IS, np.uint8)
    hashes = id_words(ids_of(table["pixel_hash"]))[0]
    narrow = pa.table([*table.columns[:4], tie, later], schema=HASHES)
    out.buckets(narrow, (hashes % np.uint64(buckets)).astype(np.int64))


def group_pixels(out: Output, bucket: int, hashes: Step) -> Account:
    """Task: the rows of a bucket that are not kept, by row."""
    table = hashes.bucket(bucket, HASHES)
    ids, pixels = ids_of(table["image_id"]), ids_of(table["pixel_hash"])
    row, size, tie, later = (table[n].to_numpy() for n in ("row", "bytes", "tie", "later"))
    gone, keeper = first_of_each(pixels, later, -size, ids, tie, row)
    method = np.where((ids[gone] == ids[keeper]).all(1), "bytes", "pixels").tolist()
    out.table(pa.table([row[gone], row[keeper], method], schema=GONE).sort_by("row"))
    return {"rows": len(table)}


def write_files(
    out: Output, files: tuple[InputFile, ...], prints: Step, marks: Step | None, groups: Step
) -> Account:
    """Task: the result of some consecutive files."""
    gone = groups.rows(files[0].first, files[-1].end, GONE).combine_chunks()
    counts = {"bytes": 0, "pixels": 0}
    for file in files:
        row = passing(prints, marks, file.name, ["row"])["row"].combine_chunks()
        at = pc.index_in(row, gone["row"].combine_chunks())  # null: it is not among them
        keeper = pc.coalesce(gone["keeper"].take(at), row)
        method = pc.fill_null(gone["method"].take(at), "")
        out.table(pa.table([row, keeper, method], schema=EXACT), file.name)
        for kind in counts:
            counts[kind] += pc.sum(pc.equal(method, kind)).as_py() or 0
    return {f"copies_{kind}": count for kind, count in counts.items()}


def list_kept(out: Output, file: InputFile, equal: Step) -> None:
    """Task: the rows of a file that are kept of their group, in a table of `row`."""
    out.table(pa.table({"row": own_rows(equal.folder, file.name)}))
