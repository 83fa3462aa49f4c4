"""Names for where images come from, so that counts can be told apart: input set and top folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.rows.tables import InputFile, read_table
from pipeline.curate.steps.steps import Account

FEW = 50  # folders that are told apart in a set; with more of them nobody would read the table


@dataclass(frozen=True)
class Sources:
    """How images of a set are named.

    Attributes:
        set: name of the input set.
        root: folders above all of its images, as parts of their paths.
        folders: names right below the root, where they are few; else none.
    """

    set: str
    root: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    def names(self, paths: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.object_]]:
        """`set/folder` of each path, or `set`."""
        known = set(self.folders)
        depth = len(self.root)
        plain = pc.dictionary_encode(_folders(paths)).combine_chunks()
        if isinstance(plain, pa.ChunkedArray):
            plain = plain.unify_dictionaries().combine_chunks()
        if not len(plain):
            return np.zeros(0, object)
        named = []
        for folder in plain.dictionary.to_pylist():
            below = folder.split("/")[depth : depth + 1]
            fits = below and below[0] in known
            named.append(f"{self.set}/{below[0]}" if fits else self.set)
        by_row: np.ndarray[Any, np.dtype[np.object_]] = np.array(named, object)[
            plain.indices.to_numpy(zero_copy_only=False)
        ]
        return by_row


def list_folders(folder: str, file: InputFile, fingerprint: str) -> Account:
    """Task: what folders the images of one file are in, `root` and up to FEW `folders` below."""
    del folder
    paths = read_table(fingerprint, file.name, ["source"]).column("source")
    distinct = sorted(set(pc.unique(_folders(paths)).to_pylist()))
    root, below = _below([tuple(name.split("/")) if name else () for name in distinct])
    return {
        "rows": len(paths),
        "set": file.set,
        "root": list(root),
        "folders": sorted(below)[: FEW + 1],
        "empty": not distinct,
    }


def sources_of(accounts: Sequence[Account]) -> dict[str, Sources]:
    """By set, from the accounts of `list_folders`."""
    sources = {}
    for name in dict.fromkeys(account["set"] for account in accounts):
        mine = [a for a in accounts if a["set"] == name and not a["empty"]]
        root, below = _below([tuple(a["root"]) for a in mine])
        for account in mine:
            if tuple(account["root"]) == root:
                below |= set(account["folders"])
        few = tuple(sorted(below)) if 1 < len(below) <= FEW else ()
        sources[name] = Sources(name, root, few)
    return sources


def _below(folders: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], set[str]]:
    """The common root of folders, and the names right below it."""
    if not folders:
        return (), set()
    low, high = min(folders), max(folders)
    depth = 0
    while depth < min(len(low), len(high)) and low[depth] == high[depth]:
        depth += 1
    return low[:depth], {folder[depth] for folder in folders if len(folder) > depth}


def _folders(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """The folder of each path; "" where it has none."""
    return pc.replace_substring_regex(pc.fill_null(paths, ""), r"(?s)/?[^/]*\z", "")
