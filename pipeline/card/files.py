"""A card on disk: `card.json`, and in parquet what each image adds to each score.

A folder holds `card.json`, which people can read, and `images.parquet` with a row for each image:
its id, and a column for each score of each contender. Scores of other images (a part that was held
out, a set with masks) have files of their own, `images-2.parquet` and so on. `card.json` is written
last: where it is, the rest is whole.

Shapes: n images, m terms of an image.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.card.card import VERSION, Card
from pipeline.card.json_form import card_of, content_of, readable
from pipeline.embed.ids import id_bytes
from pipeline.errors import DataError
from pipeline.evaluate.score import STATISTICS, Score
from pipeline.storage.places import delete_file, exists, list_files, resolve_uri
from pipeline.storage.transfer import (
    atomic_path,
    open_patiently,
    read_json,
    write_bytes_atomic,
)
from pipeline.uri import Place, join, public

CARD = "card.json"
KIND = "evaluation card"
METADATA = b"raydino.card"
ROWS = 16_384  # of a row group at most
GROUP_BYTES = 64 * 2**20  # of a row group's terms; rows of confusions are long
EVALUATE = "evaluate"  # folder of a run that its card is in

Ids = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Column:
    """Where a column of terms belongs.

    Attributes:
        contender: its place on the card.
        score: its name.
        ones: whether a second term, 1 for each image, is left out.
    """

    contender: int
    score: str
    ones: bool


def write_card(card: Card, place: Place) -> None:
    """Writes a card into a folder, over the one that is there.

    Raises:
        StorageError: the storage failed, or refused.
    """
    fs, folder = resolve_uri(str(place))
    delete_file(fs, f"{folder}/{CARD}")
    for info in list_files(fs, folder, recursive=False):
        if info.base_name.startswith("images") and info.extension == "parquet":
            delete_file(fs, info.path)
    names = _column_names(card)
    files = []
    for number, (digest, columns) in enumerate(_by_images(card).items(), 1):
        file = "images.parquet" if number == 1 else f"images-{number}.parquet"
        _write_terms(card, columns, names, fs, f"{folder}/{file}")
        first = columns[0]
        files.append({"file": file, "images": len(_score(card, first).ids), "digest": digest})
    content = {"kind": KIND, "version": VERSION, **content_of(card), "files": files}
    write_bytes_atomic(f"{readable(content)}\n".encode(), fs, f"{folder}/{CARD}")


def read_card(place: Place, terms: bool = True) -> Card:
    """Reads a card.

    Args:
        place: its folder, its `card.json`, or a run folder that holds it in `evaluate/`.
        terms: also what each image adds; without, scores are None and nothing can be compared.

    Raises:
        DataError: there is no card, or one that is not whole or of a later version.
        StorageError: the storage failed, or refused.
    """
    fs, folder = _folder(place)
    shown = public(place)
    content = read_json(fs, f"{folder}/{CARD}")
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise DataError(
            f"{shown}/{CARD} is not an evaluation card",
            "name the folder that jobs/evaluate.py wrote",
        )
    if content.get("version") != VERSION:
        raise DataError(
            f"the evaluation card in {shown} has version {content.get('version')}, this code reads "
            f"version {VERSION}",
            "evaluate again, or read it with the version that wrote it",
        )
    try:
        card = card_of(content)
        scores = _read_terms(content, fs, folder, shown) if terms else {}
    except (KeyError, TypeError, ValueError, IndexError, pa.ArrowException) as error:
        raise DataError(
            f"the evaluation card in {shown} is damaged ({type(error).__name__}: {error})"[:300],
            "evaluate again",
        ) from error
    contenders = []
    for number, one in enumerate(card.contenders):
        results = {
            name: replace(result, score=scores.get((number, name)))
            for name, result in one.results.items()
        }
        contenders.append(replace(one, results=results))
    return replace(card, contenders=tuple(contenders))


def card_folder(place: Place) -> Place:
    """The folder that holds the card of a place, as `read_card` takes it.

    Raises:
        DataError: there is none.
    """
    candidates = [place, join(place, EVALUATE)]
    if str(place).endswith(f"/{CARD}"):
        candidates = [str(place).removesuffix(f"/{CARD}")]
    for candidate in candidates:
        fs, path = resolve_uri(str(candidate))
        if exists(fs, f"{path}/{CARD}"):
            return candidate
    raise DataError(
        f"no evaluation card in {public(place)}",
        "evaluate first: python jobs/evaluate.py model=runs/photos data=photos/",
    )


def _folder(place: Place) -> tuple[pafs.FileSystem, str]:
    return resolve_uri(str(card_folder(place)))


def _score(card: Card, column: _Column) -> Score:
    score = card.contenders[column.contender].results[column.score].score
    assert score is not None
    return score


def _by_images(card: Card) -> dict[str, list[_Column]]:
    """Columns by the digest of their images; those of the score that decides come first."""
    columns: dict[str, list[_Column]] = {}
    decides = (one.results.get(card.score) for one in card.contenders)
    for digest in (one.score.images for one in decides if one and one.score):
        columns.setdefault(digest, [])
    for number, one in enumerate(card.contenders):
        for name, result in one.results.items():
            if result.score is not None:
                terms = result.score.terms
                ones = terms.shape[1] == 2 and bool((terms[:, 1] == 1).all())
                columns.setdefault(result.score.images, []).append(_Column(number, name, ones))
    return columns


def _column_names(card: Card) -> list[str]:
    """What the columns of each contender begin with: `model`, `model2`, `step0` …"""
    seen: Counter[str] = Counter()
    names = []
    for one in card.contenders:
        seen[one.role] += 1
        names.append(one.role if seen[one.role] == 1 else f"{one.role}{seen[one.role]}")
    return names


def _write_terms(
    card: Card, columns: Sequence[_Column], names: Sequence[str], fs: pafs.FileSystem, path: str
) -> None:
    ids = _score(card, columns[0]).ids
    kept, schema_fields, about = [], [pa.field("image_id", pa.string(), nullable=False)], {}
    for column in columns:
        score = _score(card, column)
        terms = score.terms[:, :1] if column.ones else score.terms
        kind = pa.float32() if _is_exact(terms) else pa.float64()
        name = f"{names[column.contender]}.{column.score}"
        kept.append(terms)
        schema_fields.append(
            pa.field(name, kind if terms.shape[1] == 1 else pa.list_(kind, terms.shape[1]))
        )
        about[name] = [column.contender, column.score, column.ones, score.statistic]
    facts = json.dumps({"made": card.made, "columns": about}, ensure_ascii=False)
    schema = pa.schema(schema_fields, {METADATA: facts.encode()})
    width = 8 * sum(terms.shape[1] for terms in kept)
    rows = max(1, min(ROWS, GROUP_BYTES // max(1, width)))
    with (
        atomic_path(fs, path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_statistics=False) as writer,
    ):
        for start in range(0, len(ids), rows):
            part = slice(start, start + rows)
            arrays = [pa.array(_hex(ids[part]), pa.string())]
            for terms, field in zip(kept, schema_fields[1:], strict=True):
                arrays.append(_arrow(terms[part], field.type))
            writer.write_table(pa.table(arrays, schema=schema), row_group_size=rows)


def _is_exact(terms: npt.NDArray[np.float64]) -> bool:
    """Whether float32 holds all values, as it does hits and counts."""
    blocks = (terms[at : at + ROWS] for at in range(0, len(terms), ROWS))
    return all(bool((block.astype(np.float32) == block).all()) for block in blocks)


def _hex(ids: Ids) -> list[str]:
    text = np.ascontiguousarray(ids).tobytes().hex()
    return [text[at : at + 32] for at in range(0, len(text), 32)]


def _arrow(terms: npt.NDArray[np.float64], kind: pa.DataType) -> pa.Array:
    is_list = pa.types.is_fixed_size_list(kind)
    number = kind.value_type if is_list else kind
    values = pa.array(np.ascontiguousarray(terms).reshape(-1).astype(number.to_pandas_dtype()))
    return pa.FixedSizeListArray.from_arrays(values, type=kind) if is_list else values


def _read_terms(
    content: Mapping[str, Any], fs: pafs.FileSystem, folder: str, shown: str
) -> dict[tuple[int, str], Score]:
    scores = {}
    for entry in content["files"]:
        try:
            with open_patiently(fs, f"{folder}/{entry['file']}") as file:
                table = pq.read_table(file)
        except FileNotFoundError:
            raise DataError(
                f"the evaluation card in {shown} lacks its file {entry['file']}", "evaluate again"
            ) from None
        facts = json.loads(table.schema.metadata[METADATA])
        ids = np.frombuffer(
            bytes.fromhex(id_bytes(table.column("image_id")).tobytes().decode("ascii")), np.uint8
        ).reshape(-1, 16)
        if facts["made"] != content["made"] or len(ids) != entry["images"]:
            raise DataError(
                f"{entry['file']} in {shown} is of another evaluation than its {CARD}",
                "evaluate again",
            )
        for name, (contender, score, ones, statistic) in facts["columns"].items():
            if statistic not in STATISTICS:
                raise ValueError(f"no statistic {statistic}")
            terms = _terms(table.column(name).combine_chunks(), ones)
            scores[contender, score] = Score(score, terms, ids, statistic)
    return scores


def _terms(column: pa.Array, ones: bool) -> npt.NDArray[np.float64]:
    width = column.type.list_size if pa.types.is_fixed_size_list(column.type) else 1
    values = column.flatten() if width > 1 else column
    terms = values.to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, width)
    return np.concatenate([terms, np.ones_like(terms)], 1) if ones else terms
