"""What is known of the rows of one file, and the steps that say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.rows.tables import REASONS, InputFile, ids_of
from pipeline.curate.steps.steps import Step

CODE = {reason: code for code, reason in enumerate(REASONS)}
KEPT = CODE["kept"]
Bytes16 = np.ndarray[Any, np.dtype[np.uint8]]
Objects = np.ndarray[Any, np.dtype[np.object_]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Known:
    """Steps that say something about the images; None where one was left out.

    Attributes:
        prints: fingerprints.
        marks: of quality rules.
        equal: which images equal which.
        matches: with each earlier curation that images are added to, the latest first.
        leaks: of evaluation sets.
        groups: of copies.
        leaking: groups that go as a whole, where leaks take their groups with them.
        retrieved: what seed sets asked for.
        balanced: the balanced sample.
    """

    prints: Step
    marks: Step | None = None
    equal: Step | None = None
    matches: tuple[Step, ...] = ()
    leaks: Step | None = None
    groups: Step | None = None
    leaking: Step | None = None
    retrieved: Step | None = None
    balanced: Step | None = None


@dataclass
class FileRows:
    """What is known of the rows of one file; ids as bytes, None where there is none."""

    file: InputFile
    ids: Bytes16
    code: np.ndarray[Any, np.dtype[np.int8]]
    rule: Objects
    keeper: Objects
    query: Objects
    component: Objects
    part: Objects
    similarity: np.ndarray[Any, np.dtype[np.float64]]
    score: np.ndarray[Any, np.dtype[np.float64]]
    cluster: np.ndarray[Any, np.dtype[np.int64]]
    hits: np.ndarray[Any, np.dtype[np.int32]]

    @classmethod
    def of(cls, file: InputFile, ids: Bytes16) -> FileRows:
        """Rows of which nothing is known: all are kept."""
        n = len(ids)
        return cls(
            file,
            ids,
            code=np.zeros(n, np.int8),
            rule=np.full(n, "", object),
            keeper=np.full(n, None, object),
            query=np.full(n, None, object),
            component=np.full(n, None, object),
            part=np.full(n, "", object),
            similarity=np.full(n, np.nan),
            score=np.full(n, np.nan),
            cluster=np.full(n, -1, np.int64),
            hits=np.zeros(n, np.int32),
        )

    def places(self, table: pa.Table, name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Where the rows of a step's table are in this file."""
        places = table.column("row").to_numpy() - self.file.first
        if len(places) and (
            places[0] < 0 or places[-1] >= len(self.ids) or (np.diff(places) <= 0).any()
        ):
            raise RuntimeError(f"{name}/{self.file.name} has rows that are not of this file")
        return np.asarray(places, np.int64)

    def remove(
        self, places: Ints, reason: str, **facts: Any
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Gives rows that are still kept a reason, and what is known of them.

        Args:
            places: of the rows.
            reason: of REASONS.
            facts: values of other columns by name, one for all places or an array [places].

        Returns:
            Which of the places were kept until now: rows that are gone stay as they are.
        """
        fresh: np.ndarray[Any, np.dtype[np.bool_]] = self.code[places] == KEPT
        self.code[places[fresh]] = CODE[reason]
        for name, values in facts.items():
            here = values[fresh] if isinstance(values, np.ndarray) else values
            getattr(self, name)[places[fresh]] = here
        return fresh


def words(table: pa.Table, name: str) -> Objects:
    """A column of strings, one object each."""
    return np.array(table[name].to_pylist(), object)


def id_objects(table: pa.Table, name: str) -> Objects:
    """A column of ids as bytes, one object each."""
    return objects(ids_of(table[name]))


def objects(ids: Bytes16) -> Objects:
    """Ids as bytes, one object each."""
    as_bytes = np.full(len(ids), None, object)
    as_bytes[:] = [value.tobytes() for value in ids]
    return as_bytes
