"""Nearest neighbours among vectors by cosine: exactly by blocks, or by an index where there are
many.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from pipeline.embed.vectors import open_vectors
from pipeline.errors import ConfigError, DataError
from pipeline.search.exact import Doubles, Floats, Ints, Nearest, lengths, unit, usable
from pipeline.search.ivf import IndexFacts, IvfIndex, built, opened, picked
from pipeline.uri import public

log = logging.getLogger("pipeline.search")

EXACT_ROWS = 1_000_000  # `auto` takes an index above: exact search then takes over 0.1 s a query
MEMORY_GIB = 4.0
BLOCK_ROWS = 65_536
SINGLE_READS = 8  # rows that are read one by one; for more the whole set is read once
INSTALL = "from the clone: python -m pip install -c constraints.txt -e '.[search]'"

Array = np.ndarray[Any, Any]
Index = Literal["auto", "exact", "ivf"]


class Vectors(Protocol):
    """What is searched in, as far as it is asked for: `pipeline.embed.vectors.VectorSet` is one."""

    @property
    def rows(self) -> int: ...  # noqa: D102
    @property
    def dim(self) -> int: ...  # noqa: D102
    @property
    def key(self) -> str: ...  # noqa: D102
    @property
    def uri(self) -> str: ...  # noqa: D102
    def blocks(self, rows: int = ..., output: str = ...) -> Iterator[tuple[Array, Any]]: ...  # noqa: D102
    def read(self, output: str = ..., rows: slice | None = ...) -> Array: ...  # noqa: D102


class ArrayVectors:
    """Vectors in memory, [N, D] of any float; nothing is stored beside them."""

    key = uri = ""

    def __init__(self, vectors: Array) -> None:
        if vectors.ndim != 2:
            raise DataError(
                f"an array of shape {list(vectors.shape)} was given to search in, expected [N, D]",
                "give one row for each vector",
            )
        self._vectors = vectors
        self.rows, self.dim = vectors.shape

    def blocks(self, rows: int = BLOCK_ROWS, output: str = "cls") -> Iterator[tuple[Array, Any]]:
        """Slices of the array, whatever the output is called."""
        del output
        for begin in range(0, self.rows, rows):
            yield self._vectors[begin : begin + rows], None

    def read(self, output: str = "cls", rows: slice | None = None) -> Array:
        """A slice of the array, whatever the output is called."""
        del output
        return self._vectors[rows or slice(None)]


class Search:
    """Finds neighbours; may be called from several threads.

    Attributes:
        rows: vectors that are searched.
        dim: their width.
        column: cls or mean.
        index: what is known of the index; None: the search is exact.
        zeros: vectors without a direction, which are like nothing.
    """

    def __init__(
        self, vectors: Vectors, column: str, index: IvfIndex | None, in_memory: bool
    ) -> None:
        self.rows, self.dim = vectors.rows, vectors.dim
        self.column, self._vectors, self._ivf = column, vectors, index
        self._in_memory: Floats | None = None
        self._lengths: Doubles | None = None
        self.index: IndexFacts | None = index.facts if index else None
        self.zeros = index.facts.zeros if index else 0
        if index is None:
            # All are read once, so that what is no number is refused now and not at some query.
            table = np.empty((self.rows, self.dim), np.float32) if in_memory else None
            parts = []
            for first, block in usable_blocks(vectors, column):
                parts.append(lengths(block))
                if table is not None:
                    table[first : first + len(block)] = block
            self._in_memory, self._lengths = table, np.concatenate(parts)
            self.zeros = int(np.isinf(self._lengths).sum())

    def find(self, vectors: Array, k: int) -> tuple[Floats, Ints]:
        """The k nearest rows of each vector, best first; equal ones by the lowest row.

        Args:
            vectors: [n, D] of any length and float.
            k: at least 1; cut to the number of rows that there are.

        Returns:
            cosine similarities float32 [n, k], and row numbers int64 [n, k].

        Raises:
            DataError: another width, or a value that is not finite.
        """
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise DataError(
                f"queries have shape {vectors.shape}, expected [n, {self.dim}]",
                "embed them with the model that made the vectors",
            )
        if k < 1:
            raise DataError(f"k={k} neighbours were asked for, expected at least 1")
        queries, k = usable(vectors, "the queries"), min(k, self.rows)
        if self._ivf is not None:
            similarity, rows = self._ivf.find(queries, k)
            return similarity.astype(np.float32), rows
        best = Nearest(queries, k)
        if self._in_memory is not None:
            best.see(self._in_memory, 0, self._lengths)
        else:
            for first, block in usable_blocks(self._vectors, self.column):
                best.see(block, first)
        return best.similarity.astype(np.float32), best.rows

    def vectors_at(self, rows: Ints) -> Floats:
        """The vectors of row numbers, float32 [n, D]."""
        if self._in_memory is not None:
            return self._in_memory[rows]
        if len(rows) <= SINGLE_READS:
            parts = [self._vectors.read(self.column, slice(row, row + 1)) for row in rows]
            return usable(np.concatenate(parts))
        order = np.unique(rows)
        vectors = picked(lambda: usable_blocks(self._vectors, self.column), order)
        return vectors[np.searchsorted(order, rows)]


def open_search(
    vectors: str | Path | Vectors | Array,
    column: str = "cls",
    index: Index = "auto",
    memory_gib: float = MEMORY_GIB,
) -> Search:
    """Opens vectors for search; builds an index where one is wanted and none is there.

    Args:
        vectors: a folder of vectors, or a run that has them; `open_vectors` of one; or an array
            [N, D].
        column: of the vectors: cls or mean.
        index: exact; ivf; auto: ivf above a million vectors.
        memory_gib: up to which exact search keeps the vectors in memory (float32); above, each
            search reads them again.

    Raises:
        ConfigError: an index is asked for, and faiss is not installed.
        DataError: no vectors, or values that are not finite.
    """
    if isinstance(vectors, str | Path):
        vectors = open_vectors(str(vectors))
    elif isinstance(vectors, np.ndarray):
        vectors = ArrayVectors(vectors)
    if not vectors.rows:
        where = public(vectors.uri) or "the array"
        raise DataError(
            f"{where} holds no vectors: there is nothing to search in",
            "embed images first: jobs/embed.py model=… data.source=photos/",
        )
    if takes_index(vectors.rows, index):
        return Search(vectors, column, _index_of(vectors, column), in_memory=False)
    size = vectors.rows * vectors.dim * 4 / 2**30
    return Search(vectors, column, None, in_memory=size <= memory_gib)


def usable_blocks(vectors: Vectors, column: str) -> Iterator[tuple[int, Floats]]:
    """(first row, vectors [R, D]) through the whole set."""
    first = 0
    name = f"the vectors in {public(vectors.uri)}" if vectors.uri else "the vectors"
    for block, _ in vectors.blocks(BLOCK_ROWS, column):
        yield first, usable(block, name, first)
        first += len(block)


def takes_index(rows: int, index: Index) -> bool:
    """Whether so many vectors are searched by an index.

    Raises:
        ConfigError: one is asked for, and faiss is not installed.
    """
    if index == "exact" or (index == "auto" and rows <= EXACT_ROWS):
        return False
    if importlib.util.find_spec("faiss") is not None:
        return True
    if index == "ivf":
        raise ConfigError(
            "search.index=ivf needs faiss, which is not installed",
            f"{INSTALL}, or search.index=exact",
        )
    log.warning(
        "index       faiss is not installed, so each search goes through all %s vectors (%s)",
        f"{rows:,}",
        INSTALL,
    )
    return False


def _index_of(vectors: Vectors, column: str) -> IvfIndex:
    index = opened(vectors.uri, column, vectors.key) if vectors.uri else None
    if index is None:
        index = built(
            lambda: ((first, unit(block)) for first, block in usable_blocks(vectors, column)),
            (vectors.rows, vectors.dim),
            vectors.uri,
            column,
            vectors.key,
        )
        facts = index.facts
        seconds = facts.train_s + facts.add_s + facts.measure_s
        log.info("index       built in %.0f s: %s", seconds, facts.text())
    else:
        log.info("index       %s", index.facts.text())
    return index
