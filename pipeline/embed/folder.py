"""The folder of a table: which parts are there, what of them is taken away, and the table of
bad images, which is put together of what stands in the parts.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline.embed.parts import Part, finished_part
from pipeline.embed.units import Unit
from pipeline.embed.vectors import MARK, Facts, part_name
from pipeline.errors import DataError
from pipeline.shards.columns import BAD_IMAGE_SCHEMA
from pipeline.storage.places import delete_file, list_files, resolve_uri
from pipeline.storage.transfer import parquet_writer_atomic, read_mark
from pipeline.uri import Place, public

log = logging.getLogger("pipeline.embed")

THREADS = 16  # footers of remote files are a round trip each
READ = 1024  # parts whose bad images are in memory at once


@dataclass(frozen=True)
class Counts:
    """Vectors and bad images of a part."""

    rows: int
    bad: int


@dataclass
class Tally:
    """What all parts hold.

    Attributes:
        parts: name and rows of each, in order.
        reasons: bad images by reason.
        first: row of the bad image table; None where no image is bad.
    """

    parts: list[tuple[str, int]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] | None = None

    @property
    def rows(self) -> int:
        """Vectors."""
        return sum(rows for _, rows in self.parts)

    @property
    def bad(self) -> int:
        """Images that could not be decoded."""
        return self.reasons.total()


def check_folder(folder: str) -> set[str]:
    """The names in a folder that vectors are written to.

    Raises:
        DataError: it holds what is not ours.
    """
    fs, path = resolve_uri(folder)
    names = {info.base_name for info in list_files(fs, path, recursive=False)}
    if others := sorted(n for n in names if n.endswith(".parquet") and not _is_part(n)):
        raise DataError(
            f"{public(folder)} holds files that are no vectors of ours, such as {others[0]}",
            "give another folder: embed.vectors=…",
        )
    return names


def finished_parts(
    folder: str, units: Sequence[Unit], facts: Facts, level: int
) -> dict[int, Counts]:
    """Parts of this very table, by their numbers. Those of another one are taken away, and said.

    Raises:
        DataError: the folder holds what is not ours.
    """
    fs, path = resolve_uri(folder)
    names = check_folder(folder)
    finished = {}
    for part in _pieces([unit for unit in units if part_name(unit.number) in names]):
        for unit, known in zip(part, _read(folder, part, facts["key"]), strict=True):
            if known is not None:
                finished[unit.number] = Counts(known.rows, len(known.bad))
    mark = read_mark(fs, f"{path}/{MARK}")
    if mark and mark.get("key") != facts["key"]:
        delete_file(fs, f"{path}/{MARK}")
        log.log(level, "%s", _changed(public(folder), mark, facts))
    elif (stale := sum(map(_is_part, names)) - len(finished)) and not mark:
        log.log(level, "%s: %d parts of other settings are made anew", public(folder), stale)
    # After the mark: who opened the earlier table is told so, and never reads two models as one.
    _delete(folder, {n for n in names if _is_part(n)} - {part_name(n) for n in finished})
    return finished


def tallied(
    folder: str,
    units: Sequence[Unit],
    finished: Mapping[int, Counts],
    key: str,
    bad_table: Place | None,
) -> Tally:
    """Looks at all parts at the end, and writes the table of bad images.

    Args:
        folder: of the table.
        units: all of the set.
        finished: what is known already; of these, parts with bad images are read once more.
        key: of the table.
        bad_table: None: nowhere.

    Raises:
        DataError: a part is gone, or of another table.
    """
    tally = Tally()
    with ExitStack() as stack:
        writer = None
        if bad_table is not None:
            place = resolve_uri(str(bad_table))
            writer = stack.enter_context(parquet_writer_atomic(BAD_IMAGE_SCHEMA, *place))
        for piece in _pieces(units):
            known = {u.number: Part(finished[u.number].rows) for u in piece if u.number in finished}
            read = [u for u in piece if u.number not in known or finished[u.number].bad]
            parts = zip(read, _read(folder, read, key), strict=True)
            known |= {unit.number: part for unit, part in parts if part is not None}
            bad: list[dict[str, str]] = []
            for unit in piece:
                name = part_name(unit.number)
                if unit.number not in known:
                    raise DataError(
                        f"{public(folder)}/{name} is gone or was written by another job",
                        "let one job at a time write there, and run the same command again",
                    )
                tally.parts.append((name, known[unit.number].rows))
                bad += known[unit.number].bad
            tally.reasons.update(row["reason"] for row in bad)
            tally.first = tally.first or (bad[0] if bad else None)
            if writer is not None and bad:
                writer.write_table(pa.Table.from_pylist(bad, BAD_IMAGE_SCHEMA))
    return tally


def remove_vectors(folder: str) -> None:
    """Takes a table away, and nothing else that may be in its folder."""
    fs, path = resolve_uri(folder)
    delete_file(fs, f"{path}/{MARK}")
    sweep(folder, set())


def sweep(folder: str, names: set[str]) -> None:
    """Takes away parts of an earlier table that had more of them, and what a kill left behind."""
    fs, path = resolve_uri(folder)
    there = [info.base_name for info in list_files(fs, path, recursive=False)]
    left = {name for name in there if name.startswith(".part-") and name.endswith(".tmp")}
    _delete(folder, left | {name for name in there if _is_part(name) and name not in names})


def _pieces(units: Sequence[Unit]) -> list[Sequence[Unit]]:
    return [units[at : at + READ] for at in range(0, len(units), READ)]


def _read(folder: str, units: Sequence[Unit], key: str) -> list[Part | None]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda unit: finished_part(folder, unit, key), units))


def _delete(folder: str, names: Collection[str]) -> None:
    fs, path = resolve_uri(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda name: delete_file(fs, f"{path}/{name}"), names))


def _changed(folder: str, mark: Facts, facts: Facts) -> str:
    model = mark.get("digest") != facts["digest"]
    images = mark.get("shards", {}).get("digest") != facts["shards"]["digest"]
    if model:
        what = f"the model {mark.get('model')} of then is not the {facts['model']} of now"
    elif images:
        what = "the images are others by now"
    else:
        names = sorted(n for n in facts if facts[n] != mark.get(n) and n not in ("key", "shards"))
        what = f"other settings ({', '.join(names)})"
    return f"{folder} held vectors that do not fit: {what}; all are made anew"


def _is_part(name: str) -> bool:
    head, _, number = name.removesuffix(".parquet").partition("-")
    return name.endswith(".parquet") and head == "part" and number.isdigit()
