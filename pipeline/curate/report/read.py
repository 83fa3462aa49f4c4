"""Reads the tables of a curation for its report: file by file, by columns, a few rows of each kept.

A sample of m is the m rows with the smallest hash of (seed, image id), so it does not depend on the
order of files or rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.curate.rows.tables import ids_of, read_table
from pipeline.errors import DataError, one_line
from pipeline.storage.places import list_files, resolve_uri
from pipeline.uri import Place, join, public
from pipeline.views.draws import uniforms

NAMES = (
    "fingerprint",
    "quality",
    "exact",
    "edges",
    "looks",
    "components",
    "leaks",
    "retrieved",
    "balanced",
    "decisions",
)
NUMBER = "number of the group"  # a column while samples are sorted
STREAM = 7_001  # keeps these hashes apart from others of the same seed

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Shown:
    """An image that the report shows, as its decision and its fingerprint say it.

    Attributes:
        source: which input, and the top folder in it.
        path: path or URL that it came from.
        thumbnail: JPEG, or b"".
        error: why it cannot be decoded, or "".
        encoded_bytes: of the file.
    """

    row: int
    image_id: str
    reason: str = ""
    rule: str = ""
    score: float | None = None
    similarity: float | None = None
    source: str = ""
    path: str = ""
    width: int = 0
    height: int = 0
    encoded_bytes: int = 0
    error: str = ""
    thumbnail: bytes = field(default=b"", repr=False)


class Samples:
    """The first `size` different rows of each group, of tables that come one after another.

    What is kept does not depend on the order of tables or rows, because `order` ends with columns
    that tell rows apart, and it fits in memory whatever the tables hold.
    """

    def __init__(self, size: int, by: Sequence[str], order: Sequence[str]) -> None:
        """Takes columns: what makes a group, and what comes first in it (a number at first)."""
        self.size, self.by, self.order = size, list(by), list(order)
        self._kept: pa.Table | None = None

    def add(self, table: pa.Table) -> None:
        """Keeps what is among the first of its group; each table has the same columns."""
        known = 0
        if self._kept is not None:
            known, table = len(self._kept), pa.concat_tables([self._kept, table])
        if len(table) > known:
            groups, values = self._groups(table), table[self.order[0]].to_numpy()
            # Only what is not after the last of a full group can get into it: most rows stop here.
            last = np.full(int(groups.max()) + 1, -np.inf)
            np.maximum.at(last, groups[:known], values[:known])
            last[np.bincount(groups[:known], minlength=len(last)) < self.size] = np.inf
            near = np.flatnonzero(values <= last[groups])
            self._kept = self._first(table.take(near), groups[near])

    def _groups(self, table: pa.Table) -> Ints:
        """The number of each row's group, from 0."""
        groups = np.zeros(len(table), np.int64)
        for name in self.by:
            coded = table[name].combine_chunks().dictionary_encode()
            groups = groups * len(coded.dictionary) + coded.indices.to_numpy()
        return groups

    def _first(self, table: pa.Table, groups: Ints) -> pa.Table:
        """The first of each group in order; a row that came twice counts once."""
        keys = [NUMBER, *self.order]
        numbered = table.append_column(NUMBER, pa.array(groups))
        numbered = numbered.take(pc.sort_indices(numbered, [(key, "ascending") for key in keys]))
        equal = np.ones(max(0, len(numbered) - 1), bool)  # to the row before
        starts = np.ones(len(numbered), bool)
        for key in keys:
            column = numbered[key].combine_chunks()
            equal &= pc.equal(column[1:], column[:-1]).to_numpy(zero_copy_only=False)
            if key == NUMBER:
                starts[1:] = ~equal
        different = np.flatnonzero(np.concatenate([[True], ~equal])[: len(numbered)])
        places = np.arange(len(different))  # in the table, then from the start of their group
        places -= np.maximum.accumulate(np.where(starts[different], places, 0))
        return numbered.take(different[places < self.size]).drop_columns([NUMBER])

    def rows(self) -> list[dict[str, Any]]:
        """What was kept, group by group, the first of each first."""
        return [] if self._kept is None else self._kept.to_pylist()

    def groups(self) -> dict[Any, list[dict[str, Any]]]:
        """The same by group, sorted: the value of its column, or a tuple where it has several."""
        groups: dict[Any, list[dict[str, Any]]] = {}
        for row in self.rows():
            key = tuple(row[name] for name in self.by)
            groups.setdefault(key if len(key) > 1 else key[0], []).append(row)
        return dict(sorted(groups.items()))


def draws(ids: Bytes, seed: int) -> Floats:
    """A number in [0, 1) for each id [n, 16]: the hash that samples are taken by."""
    return uniforms(seed, 0, ids, 1, STREAM)[:, 0] if len(ids) else np.zeros(0)


def value_draws(values: Floats, seed: int) -> Floats:
    """A number in [0, 1) for each value, by its bits.

    Pairs have no id, but their similarities are exact, so they are the same for any order of work.
    """
    ids = np.zeros((len(values), 2), "<u8")
    ids[:, 0] = np.ascontiguousarray(values, np.float64).view("<u8")
    return draws(ids.view(np.uint8), seed)


def ids(column: pa.ChunkedArray) -> Bytes:
    """A column of ids, as bytes or in hexadecimal, as uint8 [rows, 16]."""
    if pa.types.is_string(column.type):
        return np.frombuffer(bytes.fromhex("".join(column.to_pylist())), np.uint8).reshape(-1, 16)
    return ids_of(column)


class TableFiles:
    """The folders of tables that there are, and which rows each file holds."""

    def __init__(self, root: Place, folders: Mapping[str, str] | None = None) -> None:
        """Takes the given folders by name, or those of NAMES that are below the root."""
        places = folders or {name: str(join(root, name)) for name in NAMES}
        unknown = sorted(set(places) - set(NAMES))
        if unknown:
            raise DataError(
                f"no table is called {', '.join(unknown)}", f"tables are {', '.join(NAMES)}"
            )
        listed = {name: parquet_names(folder) for name, folder in places.items()}
        self.folders = {name: places[name] for name, files in listed.items() if files}
        self.files = {name: files for name, files in listed.items() if files}
        self.first: dict[str, int] = {}  # row of each file of decisions

    def __contains__(self, name: str) -> bool:
        return name in self.folders

    def read(self, name: str, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        """Each file of a table, by its name."""
        for file in self.files.get(name, ()):
            yield file, read_table(self.folders[name], file, columns)

    def counted(self, name: str) -> int:
        """Rows of a table."""
        return rows_in(self.folders[name], self.files[name]) if name in self else 0

    def by_file(self, rows: Iterable[int]) -> Iterator[tuple[str, list[int]]]:
        """Rows in the files of decisions that hold them; needs `first`, see `counts.py`."""
        names = sorted(self.first, key=lambda name: self.first[name])
        starts = [self.first[name] for name in names]
        for place, rows_there in groupby(sorted(set(rows)), lambda r: bisect_right(starts, r) - 1):
            if place >= 0:
                yield names[place], list(rows_there)

    def shown(self, rows: Iterable[int]) -> dict[int, Shown]:
        """What the report shows of rows: decisions, and fingerprints where they are."""
        images: dict[int, Shown] = {}
        columns = ["row", "image_id", "reason", "rule", "score", "similarity", "source"]
        for file, mine in self.by_file(rows):
            table = self._rows_of("decisions", file, columns, mine)
            prints = {one["row"]: one for one in self._prints(file, mine)}
            for one in table.to_pylist():
                said = {name: one[name] or "" for name in ("reason", "rule", "source")}
                images[one["row"]] = Shown(**one | said | _picture(prints.get(one["row"], {})))
        return images

    def _prints(self, file: str, rows: Sequence[int]) -> list[dict[str, Any]]:
        if file not in self.files.get("fingerprint", ()):
            return []
        columns = ["row", "source", "bytes", "width", "height", "error", "thumbnail"]
        prints: list[dict[str, Any]] = self._rows_of("fingerprint", file, columns, rows).to_pylist()
        return prints

    def _rows_of(
        self, name: str, file: str, columns: Sequence[str], rows: Sequence[int]
    ) -> pa.Table:
        table = read_table(self.folders[name], file, columns)
        return table.filter(pc.is_in(table["row"], pa.array(list(rows), pa.int64())))

    def column_of(self, name: str, rows: Iterable[int], column: str) -> dict[int, Any]:
        """One column of a table whose files are called as those of decisions, for a few rows."""
        values: dict[int, Any] = {}
        for file, mine in self.by_file(rows):
            if file in self.files.get(name, ()):
                table = self._rows_of(name, file, ["row", column], mine)
                values |= dict(
                    zip(table["row"].to_pylist(), table[column].to_pylist(), strict=True)
                )
        return values


def parquet_names(folder: str) -> tuple[str, ...]:
    """Names of the parquet files in a folder, sorted, without their ending."""
    fs, path = resolve_uri(folder)
    files = [info.base_name for info in list_files(fs, path, recursive=False)]
    kept = [name for name in files if name.endswith(".parquet") and name[0] not in "._"]
    return tuple(sorted(name.removesuffix(".parquet") for name in kept))


def rows_in(folder: str, files: Iterable[str]) -> int:
    """Rows of parquet files, by their ends.

    Raises:
        DataError: one is damaged or missing; names it.
    """
    total = 0
    for file in files:
        place = str(join(folder, f"{file}.parquet"))
        fs, path = resolve_uri(place)
        try:
            total += int(pq.read_metadata(path, filesystem=fs).num_rows)
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{public(place)} cannot be read: {one_line(error)}",
                "delete its folder and run again",
            ) from error
    return total


def pictures_of(folder: str, ids: Iterable[bytes]) -> dict[bytes, Shown]:
    """Images of another set by id, from a folder of its fingerprints."""
    chosen_ids = sorted(set(ids))
    pictures: dict[bytes, Shown] = {}
    columns = ["row", "image_id", "source", "bytes", "width", "height", "error", "thumbnail"]
    for file in parquet_names(folder) if chosen_ids else ():
        table = read_table(folder, file, ["image_id"])
        chosen = pc.is_in(table["image_id"], pa.array(chosen_ids, pa.binary(16)))
        if pc.any(chosen).as_py():
            for one in read_table(folder, file, columns).filter(chosen).to_pylist():
                name = one["image_id"]
                pictures.setdefault(
                    name, Shown(row=one["row"], image_id=name.hex(), **_picture(one))
                )
    return pictures


def _picture(one: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "path": one.get("source") or "",
        "width": one.get("width") or 0,
        "height": one.get("height") or 0,
        "encoded_bytes": one.get("bytes") or 0,
        "error": one.get("error") or "",
        "thumbnail": one.get("thumbnail") or b"",
    }
