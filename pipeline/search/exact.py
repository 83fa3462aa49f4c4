"""The nearest vectors by cosine, exactly, block by block: any number of rows in bounded memory.

Products in single precision find the rows that can be among the nearest. Products in double
precision, each summed in one fixed order, decide. So a similarity depends on its two vectors alone,
not on blocks, threads or the number of queries, and rows that are equal keep the order of the set.
Vectors stay as they are and are divided by their lengths last: cosines of an untrained network
differ by less than what rounding unit vectors to single precision would change.

Shapes: N rows of the set, R rows of a block, Q queries, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.errors import DataError

PRODUCTS = 2**22  # at once: 16 MiB of single precision, which stays near the caches
EXACT_VALUES = 2**21  # of the vectors whose products are made in doubles at once
LARGEST = 1e15  # of a value: sums of their squares stay finite in single precision
MANY = 8  # times k: with more candidates than that, a block's own k-th best is looked for first

Floats = np.ndarray[Any, np.dtype[np.float32]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


def usable(vectors: np.ndarray[Any, Any], what: str = "the vectors", first: int = 0) -> Floats:
    """[n, D] of any float as float32, once it is sure that all can be compared.

    Args:
        vectors: [n, D].
        what: they are, for the error.
        first: number of the first row, for the error.

    Raises:
        DataError: a value is no finite number, or so large that products of it would not be.
    """
    with np.errstate(over="ignore"):  # doubles that are too large become infinite, and are refused
        narrow = np.ascontiguousarray(vectors, np.float32)
    wrong = np.flatnonzero(~(np.abs(narrow) <= LARGEST).all(axis=1))
    if len(wrong):
        raise DataError(
            f"{what} hold values that are no finite numbers, {len(wrong):,} rows of "
            f"{len(narrow):,}; the first is row {first + int(wrong[0]):,}",
            "embed these images again, in float32 if the model ran in half precision",
        )
    return narrow


def lengths(vectors: Floats) -> Doubles:
    """Euclidean lengths of rows, float64 [n]; infinite for a zero vector, so that all its cosines
    are 0.
    """
    squares = dots(vectors, vectors)
    return np.where(squares > 0, np.sqrt(squares), np.inf)


def unit(vectors: Floats) -> Floats:
    """[n, D] scaled to unit length and rounded to float32; a zero vector stays zero."""
    return np.asarray(vectors / lengths(vectors)[:, None], np.float32)


def dots(a: Floats, b: Floats) -> Doubles:
    """Dot products of rows with rows, [n, D] and [n, D] to [n], each summed in the same order."""
    products = np.empty(len(a))
    step = max(1, EXACT_VALUES // max(1, a.shape[1]))
    for begin in range(0, len(a), step):
        part = slice(begin, begin + step)
        wide = a[part].astype(np.float64)
        wide *= b[part]
        products[part] = wide.sum(axis=1)  # along the contiguous axis: pairwise, row by row
    return products


def slack(dim: int) -> float:
    """More than a cosine in single precision can be wrong, in any order of its sum."""
    return 1.1 * (dim + 6) * 2.0**-24


class Nearest:
    """The k nearest rows of each query among the blocks that were seen.

    Attributes:
        similarity: float64 [Q, k], best first; -inf where there were fewer rows.
        rows: int64 [Q, k]; -1 where there were fewer rows.
    """

    def __init__(self, queries: Floats, k: int) -> None:
        self.k, self._queries, self._lengths = k, queries, lengths(queries)
        self._units = unit(queries)
        self.similarity = np.full((len(queries), k), -np.inf)
        self.rows = np.full((len(queries), k), -1, np.int64)

    def see(self, block: Floats, first: int, known: Doubles | None = None) -> None:
        """Looks at rows first, first + 1, … of the set, as many as there are.

        Args:
            block: [R, D].
            first: number of its first row.
            known: their `lengths`, where they are at hand.
        """
        if not len(block) or not self.k:
            return
        known = lengths(block) if known is None else known
        rows = max(1, min(len(block), PRODUCTS // max(1, min(len(self._units), 1024))))
        for begin in range(0, len(block), rows):
            part = slice(begin, begin + rows)
            step = max(1, PRODUCTS // len(block[part]))
            for start in range(0, len(self._units), step):
                self._see(slice(start, start + step), block[part], known[part], first + begin)

    def _see(self, which: slice, block: Floats, known: Doubles, first: int) -> None:
        k, margin = self.k, slack(block.shape[1])
        fast = self._units[which] @ block.T
        fast *= (1 / known).astype(np.float32)
        candidates = fast >= (self.similarity[which, -1] - margin)[:, None]
        if len(block) > k and np.count_nonzero(candidates) > MANY * k * len(fast):
            # k rows of the block are at most one margin worse than their fast products say
            place = len(block) - k
            highest = np.partition(fast, place, axis=1)[:, place]
            candidates &= fast >= (highest - 2 * margin)[:, None]
        query, row = np.nonzero(candidates)
        if not len(query):
            return
        queries, query_lengths = self._queries[which], self._lengths[which]
        step = max(1, EXACT_VALUES // block.shape[1])
        exact = np.empty(len(query))
        for begin in range(0, len(query), step):
            part = slice(begin, begin + step)
            exact[part] = dots(queries[query[part]], block[row[part]])
        exact /= query_lengths[query] * known[row]
        self._merge(which, query, exact, row + first)

    def _merge(self, which: slice, query: Ints, similarity: Doubles, row: Ints) -> None:
        """Puts candidates among the best: by similarity, then by the lowest row."""
        known, known_rows = self.similarity[which], self.rows[which]
        seen = known_rows >= 0
        query = np.concatenate([np.nonzero(seen)[0], query])
        similarity = np.concatenate([known[seen], similarity])
        row = np.concatenate([known_rows[seen], row])
        order = np.lexsort((row, -similarity, query))
        query, similarity, row = query[order], similarity[order], row[order]
        counts = np.bincount(query, minlength=len(known))
        place = np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)
        best = place < self.k
        known[query[best], place[best]] = similarity[best]
        known_rows[query[best], place[best]] = row[best]
