"""What a curation decided of images, in a few words, where the vectors' run has one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.curate.report.read import parquet_names
from pipeline.curate.report.words import COLOURS, name_of
from pipeline.curate.rows.tables import read_table
from pipeline.errors import DataError
from pipeline.storage.places import absolute_uri, resolve_uri
from pipeline.storage.run_folder import fingerprint
from pipeline.storage.transfer import read_mark
from pipeline.uri import Place, join, parent, public


@dataclass(frozen=True)
class Decision:
    """Of one image: words to show, and the colour of CSS that the curation's report has for it."""

    text: str
    colour: str = ""


class Decisions:
    """The decisions of a curated run, read for the images that are asked for."""

    def __init__(self, folder: Place) -> None:
        self.folder = str(folder)

    @classmethod
    def of(cls, vectors: str, run: str = "", field: str = "search.decisions") -> Decisions | None:
        """Those of a run; without one, those of the run that the folder of vectors is in, if it was
        curated.

        Raises:
            DataError: the named run has no decisions.
        """
        place = absolute_uri(run) if run else parent(vectors)[0]
        decisions = cls(join(place, "curate", "steps", "decisions"))
        if parquet_names(decisions.folder):
            return decisions
        if run:
            raise DataError(
                f"{field}={public(run)}: there are no decisions of a curation",
                "name the folder of a run that was curated, or leave it empty",
            )
        return None

    @property
    def key(self) -> str:
        """Changes when the run is curated again: it is of the mark that curation writes last."""
        curate = parent(parent(self.folder)[0])[0]
        return fingerprint(read_mark(*resolve_uri(str(join(curate, "_done.json")))))

    def reasons(self) -> dict[str, str]:
        """`kept`, or the name of the reason why not, for every image of the run by its id."""
        names: dict[str, str] = {}
        for file in parquet_names(self.folder):
            table = read_table(self.folder, file, ["image_id", "kept", "reason"])
            for one in table.to_pylist():
                if one["kept"] or one["image_id"] not in names:
                    names[one["image_id"]] = name_of("kept" if one["kept"] else str(one["reason"]))
        return names

    def read(self, ids: Iterable[str]) -> dict[str, Decision]:
        """The decision on each image that has one, by its id."""
        distinct = sorted(set(ids))
        known: dict[str, Decision] = {}
        columns = ["image_id", "kept", "reason", "keeper_id"]
        for file in parquet_names(self.folder) if distinct else ():
            table = read_table(self.folder, file, columns, [("image_id", "in", distinct)])
            for one in table.to_pylist():
                # byte-identical files have one id: the one that is kept says more
                if one["kept"] or one["image_id"] not in known:
                    known[one["image_id"]] = _decision(one)
        return known


def _decision(one: dict[str, Any]) -> Decision:
    reason = "kept" if one["kept"] else str(one["reason"])
    text = f"copy of {one['keeper_id'][:12]}" if one["keeper_id"] else name_of(reason)
    return Decision(text, COLOURS.get(reason, ""))
