"""What is like each query: neighbours with their ids, in parquet and in lines for the console."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.embed.vectors import VectorSet
from pipeline.search.decisions import Decision, Decisions
from pipeline.search.exact import Floats, Ints
from pipeline.search.ivf import even_rows
from pipeline.search.queries import Query
from pipeline.search.rows import Rows, label_name
from pipeline.search.search import Search

NEIGHBOURS = pa.schema(
    [
        pa.field("query", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),  # from 1
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("similarity", pa.float32(), nullable=False),  # cosine
        pa.field("source", pa.string(), nullable=False),
        pa.field("label", pa.int64()),  # null where unknown
    ]
)
SAME_VECTOR = 1 - 1e-6  # cosine of vectors that differ by rounding at most


@dataclass(frozen=True)
class Neighbour:
    """An image of the set that is like a query."""

    rank: int
    row: int
    image_id: str
    similarity: float
    source: str
    label: str  # its name, or its number, or ""
    decision: Decision | None = None

    @property
    def same(self) -> bool:
        """Whether its vector is that of the query: the same pixels, or what the model sees so."""
        return self.similarity >= SAME_VECTOR


@dataclass(frozen=True)
class Answer:
    """The neighbours of a query, best first.

    Attributes:
        similarity: float32 [n]; those below `min_similarity` are left out.
        rows: int64 [n].
        best: the similarity of the nearest, also where it is left out.
    """

    query: Query
    similarity: Floats
    rows: Ints
    best: float


class Answers:
    """Answers queries, and looks up what a set says of rows."""

    def __init__(
        self, vectors: VectorSet, search: Search, decisions: Decisions | None = None
    ) -> None:
        self.vectors, self.search, self.decisions = vectors, search, decisions
        self.rows = Rows(vectors)
        self.class_names = tuple(vectors.facts.get("class_names") or ())

    def of(self, queries: Sequence[Query], k: int, least: float = -1.0) -> list[Answer]:
        """The k nearest of each query, itself left out where it is of the set.

        Args:
            queries: with vectors.
            k: neighbours of each; fewer where the set has fewer.
            least: similarity of neighbours, at least.
        """
        if not queries:
            return []
        # one more than asked for: a query of the set finds itself
        similarity, rows = self.search.find(np.stack([one.vector for one in queries]), k + 1)
        answers = []
        for query, values, places in zip(queries, similarity, rows, strict=True):
            others = places != query.row
            values, places = values[others][:k], places[others][:k]
            near = values >= least
            best = float(values[0]) if len(values) else float("nan")
            answers.append(Answer(query, values[near], places[near], best))
        return answers

    def evenly_picked(self, count: int) -> list[Query]:
        """Images at even steps through the set's ids, which are hashes: any images, and the same
        ones each time.
        """
        order = self.rows.order
        rows = order[even_rows(len(order), count)]
        vectors = self.search.vectors_at(rows)
        return [
            Query(self.rows.id_of(row), int(row), vector=vector)
            for row, vector in zip(rows, vectors, strict=True)
        ]

    def table(self, answers: Sequence[Answer]) -> pa.Table:
        """Answers as NEIGHBOURS, a row for each neighbour."""
        counts = [len(answer.rows) for answer in answers]
        rows = np.concatenate([np.zeros(0, np.int64), *(answer.rows for answer in answers)])
        labels = self.rows.labels[rows]
        names = np.repeat(np.array([one.query.name for one in answers], object), counts)
        columns = [
            pa.array(names.tolist(), pa.string()),
            pa.array(np.concatenate([[0], *(np.arange(1, n + 1) for n in counts)])[1:], pa.int32()),
            self.rows.ids_of(rows),
            pa.array(np.concatenate([[0], *(one.similarity for one in answers)])[1:], pa.float32()),
            self.rows.sources_of(rows),
            pa.array(labels, pa.int64(), mask=labels < 0),
        ]
        return pa.Table.from_arrays(columns, schema=NEIGHBOURS)

    def told(self, answers: Sequence[Answer]) -> list[tuple[Answer, list[Neighbour]]]:
        """Answers with all that is shown of their neighbours; decisions are read once for all."""
        ids = {self.rows.id_of(row) for answer in answers for row in answer.rows}
        decisions = self.decisions.read(ids) if self.decisions else {}
        return [(answer, self._neighbours(answer, decisions)) for answer in answers]

    def _neighbours(self, answer: Answer, decisions: Mapping[str, Decision]) -> list[Neighbour]:
        return [
            Neighbour(
                rank=rank,
                row=int(row),
                image_id=self.rows.id_of(row),
                similarity=float(similarity),
                source=self.rows.source_of(row),
                label=self.label_of(int(row)),
                decision=decisions.get(self.rows.id_of(row)),
            )
            for rank, (similarity, row) in enumerate(
                zip(answer.similarity, answer.rows, strict=True), 1
            )
        ]

    def label_of(self, row: int) -> str:
        """See `label_name`."""
        return label_name(int(self.rows.labels[row]), self.class_names)


def lines(neighbours: Sequence[Neighbour]) -> Iterator[str]:
    """A table for the console, head first; columns that are empty are left out."""
    columns = {
        "rank": [str(one.rank) for one in neighbours],
        "similarity": [
            f"{one.similarity:.4f}" + (" same vector" if one.same else "") for one in neighbours
        ],
        "image_id": [one.image_id for one in neighbours],
        "label": [one.label for one in neighbours],
        "decision": [one.decision.text if one.decision else "" for one in neighbours],
        "source": [one.source for one in neighbours],
    }
    columns = {name: values for name, values in columns.items() if any(values)}
    widths = [max(map(len, [name, *values])) for name, values in columns.items()]
    for row in (tuple(columns), *zip(*columns.values(), strict=True)):
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
