"""What the search for copies leaves on storage, for the steps after it and for later runs.

`pairs` writes it. `components` makes groups of it, and `relative` has evaluation sets, new images
and single ones against the same buckets.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipeline.curate.copies.items import Shuffled
from pipeline.curate.steps.steps import Result
from pipeline.errors import DataError
from pipeline.storage.places import resolve_uri
from pipeline.storage.transfer import read_json, write_bytes_atomic
from pipeline.uri import Place, join, public

STORED = "copies.json"
ROOT = "{root}"  # stands in it for the folder of the steps, which may be moved


@dataclass(frozen=True)
class Copies:
    """What `find_pairs` left: enough to go on with, now or in a later run.

    Attributes:
        root: folder of the steps.
        rows: of the inputs.
        penalty: that the similarity of a crop is reduced by.
        cells: folder of the cells.
        buckets: how many there are.
        shuffled: the items in their buckets.
        copies: folder and tables of rows with equal vectors.
        edges: folder of `tables.EDGES`; empty where images were not compared with each other.
        edge_names: of its tables.
        lowest: similarity that all edges are above.
        portion_rows: rows of a portion, or None.
        keys: of the steps.
        steps: their results; empty where this was read from storage.
    """

    root: str
    rows: int
    penalty: float
    cells: str
    buckets: int
    shuffled: Shuffled
    copies: tuple[str, tuple[str, ...]]
    edges: str
    edge_names: tuple[str, ...]
    lowest: float
    portion_rows: int | None
    keys: dict[str, str]
    steps: tuple[Result, ...] = ()

    def save(self) -> None:
        """Writes what a later run needs, with places below the folder of the steps."""
        value = asdict(self)
        del value["steps"]
        fs, path = resolve_uri(str(join(self.root, STORED)))
        write_bytes_atomic(json.dumps(_moved(value, self.root, ROOT)).encode(), fs, path)

    @classmethod
    def open(cls, root: Place) -> Copies:
        """Reads it.

        Raises:
            DataError: there is none, or it was written by another version.
        """
        fs, path = resolve_uri(str(join(root, STORED)))
        value = read_json(fs, path)
        if value is None:
            raise DataError(
                f"{public(str(root))} holds no curation with copies: {STORED} is missing",
                "name the folder of a curation that is finished and had dedup.enabled=true",
            )
        if not isinstance(value, dict) or set(value) | {"steps"} != {
            field.name for field in fields(cls)
        }:
            raise DataError(
                f"{public(str(root))} was curated by another version: {STORED} has other fields",
                "curate it again",
            )
        value = _moved(value, ROOT, str(root))
        shuffled = value["shuffled"]
        names = tuple((name, tuple(shelves)) for name, shelves in shuffled["names"])
        crops = tuple(shuffled["crops"])
        value["shuffled"] = Shuffled(**{**shuffled, "names": names, "crops": crops})
        value["copies"] = (value["copies"][0], tuple(value["copies"][1]))
        value["edge_names"] = tuple(value["edge_names"])
        return cls(**value)


def _moved(value: Any, root: str, to: str) -> Any:
    """JSON-like, with the places below `root` below `to`."""
    if isinstance(value, dict):
        return {name: _moved(one, root, to) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_moved(one, root, to) for one in value]
    if isinstance(value, str) and value.startswith(root):
        return to + value[len(root) :]
    return value
