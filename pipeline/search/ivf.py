"""An index of lists (faiss `IndexIVFFlat`): a query looks at the lists whose centres are nearest.

The rules, all of which `_index.json` states with their outcome:

* lists: the largest power of two that is at most 4 √N; faiss' guide says 4 √N to 16 √N, and fewer
  lists are built sooner.
* training: 64 vectors a list (faiss warns below 39), at even steps through the set, so that a set
  ordered by class is seen as a whole.
* probes: doubled from 1 until recall@10 reaches 0.95. It is measured on 1,000 vectors of the set at
  even steps against their exact neighbours, themselves left out, which every index would find. A
  neighbour as similar as the tenth exact one counts: which of several equal rows comes is no error.
* at most a quarter of the lists: beyond that, exact search is as quick. Then it is said.

Similarities are cosines in doubles of the unit vectors that the index holds, in single precision:
those of exact search but for 1e-7.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError, PipelineError, one_line
from pipeline.heartbeat import now
from pipeline.search.exact import Doubles, Floats, Ints, Nearest, dots, lengths, unit
from pipeline.storage.places import delete_file, list_files, resolve_uri
from pipeline.storage.transfer import atomic_path, local_copy, read_mark, write_bytes_atomic
from pipeline.uri import is_uri, join, public

log = logging.getLogger("pipeline.search")

LISTS_PER_ROOT = 4
TRAINED_PER_LIST = 64
RECALL, RECALL_AT, RECALL_QUERIES = 0.95, 10, 1000
MOST_LISTS = 0.25  # share of the lists that a query may look at
SPARE = 8  # candidates beyond k: single precision may order them otherwise
CANDIDATE_VALUES = 2**25  # of the candidates' vectors of all queries at once: 128 MiB
ABANDONED_S = 600  # no other job writes a file that has not grown for so long
SEED = 1234  # of the k-means

Blocks = Callable[[], Iterator[tuple[int, Floats]]]


@dataclass(frozen=True)
class IndexFacts:
    """What `_index.json` says.

    Attributes:
        vectors: key of the vectors that it is of.
        file: name of faiss' file beside it.
        file_bytes: of that file.
        lists: nlist of faiss.
        probes: nprobe of faiss, that recall was measured with.
        recall: share of the 10 exact neighbours that it gives.
        queries: vectors that this was measured on.
        reached: whether the recall that was asked for is reached.
        trained_on: vectors of the k-means.
        train_s: seconds of the k-means.
        add_s: seconds in which all vectors were put into lists.
        measure_s: seconds in which recall was measured, exact search included.
        zeros: vectors without a direction.
    """

    vectors: str
    column: str
    rows: int
    dim: int
    file: str
    file_bytes: int
    lists: int
    probes: int
    recall: float
    queries: int
    reached: bool
    trained_on: int
    train_s: float
    add_s: float
    measure_s: float
    zeros: int
    faiss: str

    def text(self) -> str:
        """One sentence for the console and the page."""
        said = (
            f"{self.lists:,} lists, {self.probes:,} of them looked at; recall@{RECALL_AT} "
            f"{self.recall:.3f} on {self.queries:,} queries"
        )
        if not self.reached:
            said += (
                f", below {RECALL} even with a quarter of the lists: search.index=exact finds all"
            )
        return said


class IvfIndex:
    """An opened index; `find` may be called from several threads."""

    def __init__(self, index: Any, facts: IndexFacts) -> None:
        self._index, self.facts = index, facts

    def find(self, queries: Floats, k: int) -> tuple[Doubles, Ints]:
        """The nearest rows of vectors [Q, D]: float64 and int64 [Q, k], best first."""
        return probed(self._index, queries, min(k, self.facts.rows), self.facts.probes)


def probed(index: Any, queries: Floats, k: int, probes: int) -> tuple[Doubles, Ints]:
    """As `IvfIndex.find`, with so many lists, and more for a query whose lists hold less than k."""
    similarity, rows = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    step = max(1, CANDIDATE_VALUES // ((k + SPARE) * queries.shape[1]))
    for begin in range(0, len(queries), step):
        part = slice(begin, begin + step)
        similarity[part], rows[part] = _probed(index, queries[part], k, probes)
    short = np.flatnonzero((rows < 0).any(axis=1))
    if len(short) and probes < index.nlist:
        similarity[short], rows[short] = probed(index, queries[short], k, 2 * probes)
    return similarity, rows


def _probed(index: Any, queries: Floats, k: int, probes: int) -> tuple[Doubles, Ints]:
    """Row -1 and similarity -inf where the lists hold less than k."""
    import faiss

    candidates = min(int(index.ntotal), k + SPARE)
    parameters = faiss.SearchParametersIVF()
    parameters.nprobe = probes
    _, rows, vectors = index.search_and_reconstruct(unit(queries), candidates, params=parameters)
    vectors = vectors.reshape(-1, queries.shape[1])
    # as exact search does it, to the bit: recall compares the two
    flat = dots(np.repeat(queries, candidates, axis=0), vectors)
    flat /= np.repeat(lengths(queries), candidates) * lengths(vectors)
    flat = flat.reshape(rows.shape)
    flat[rows < 0] = -np.inf
    order = np.lexsort((rows, -flat), axis=1)[:, :k]
    return np.take_along_axis(flat, order, 1), np.take_along_axis(rows, order, 1)


def lists_for(rows: int) -> int:
    """The largest power of two that is at most 4 √rows."""
    return int(2 ** int(np.log2(max(1.0, LISTS_PER_ROOT * rows**0.5))))


def opened(place: str, column: str, key: str) -> IvfIndex | None:
    """The index in a folder of vectors, if it is there, whole and of these vectors; else why not is
    logged.
    """
    import faiss

    mark = read_mark(*resolve_uri(str(join(place, _name(column)))))
    if not mark:
        return None
    try:
        facts = IndexFacts(**mark)
    except TypeError:
        log.warning("index       %s is of another version; it is built again", _name(column))
        return None
    if facts.vectors != key:
        log.warning("index       is of other vectors than are there now; it is built again")
        return None
    file = join(place, facts.file)
    try:
        # What is on this disk is mapped: only lists that are looked at come into memory.
        flags = 0 if is_uri(file) else faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
        with local_copy(file) as path:
            if path.stat().st_size != facts.file_bytes:
                raise OSError(f"has {path.stat().st_size:,} bytes, expected {facts.file_bytes:,}")
            return IvfIndex(faiss.read_index(str(path), flags), facts)
    except (OSError, RuntimeError) as error:
        log.warning(
            "index       %s cannot be read (%s); it is built again", facts.file, one_line(error)
        )
        return None


def built(blocks: Blocks, shape: tuple[int, int], place: str, column: str, key: str) -> IvfIndex:
    """Builds an index, measures its recall, and stores it beside the vectors.

    Args:
        blocks: gives (first row, unit vectors [R, D]) through the whole set, each time.
        shape: N and D.
        place: folder of the vectors; "": it is not stored.
        column: of the vectors.
        key: of the vectors.

    Raises:
        DataError: fewer vectors than lists can be made of.
    """
    import faiss

    rows, dim = shape
    lists = lists_for(rows)
    if rows < 39 * lists:  # faiss: ClusteringParameters::min_points_per_centroid
        raise DataError(
            f"{rows:,} vectors are too few for an index of {lists:,} lists, which takes "
            f"{39 * lists:,}",
            "search.index=exact is quick for so few",
        )
    start = time.monotonic()
    now(f"search: {lists:,} lists for {rows:,} vectors")
    index: Any = faiss.index_factory(dim, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.spherical = SEED, True
    sample = picked(blocks, even_rows(rows, TRAINED_PER_LIST * lists))
    index.train(sample)
    trained = time.monotonic()
    zeros = 0
    for first, block in blocks():
        now(f"search: vector {first:,} of {rows:,} into its list")
        zeros += int((~block.any(axis=1)).sum())
        index.add(block)
    added = time.monotonic()
    probes, recall, queries = _probes(index, blocks, rows)
    facts = IndexFacts(
        vectors=key,
        column=column,
        rows=rows,
        dim=dim,
        file=f"_index_{column}_{key[:8]}.faiss",
        file_bytes=0,
        lists=lists,
        probes=probes,
        recall=recall,
        queries=queries,
        reached=recall >= RECALL,
        trained_on=len(sample),
        train_s=round(trained - start, 2),
        add_s=round(added - trained, 2),
        measure_s=round(time.monotonic() - added, 2),
        zeros=zeros,
        faiss=faiss.__version__,
    )
    return IvfIndex(index, _stored(index, facts, place) if place else facts)


def _probes(index: Any, blocks: Blocks, rows: int) -> tuple[int, float, int]:
    """Lists to look at, the recall with so many, and on how many queries it was measured."""
    asked = even_rows(rows, RECALL_QUERIES)
    queries = picked(blocks, asked)
    k = min(RECALL_AT, rows - 1)
    exact = Nearest(queries, k + 1)
    for first, block in blocks():
        now(f"search: exact neighbours for the recall, vector {first:,} of {rows:,}")
        exact.see(block, first)
    tenth = without(exact.similarity, exact.rows, asked)[0][:, -1]
    probes = 1
    while True:
        similarity, _ = without(*probed(index, queries, k + 1, probes), asked)
        recall = float((similarity >= tenth[:, None]).mean())
        if recall >= RECALL or 2 * probes > MOST_LISTS * index.nlist:
            return probes, recall, len(asked)
        probes *= 2


def without(similarity: Doubles, rows: Ints, own: Ints) -> tuple[Doubles, Ints]:
    """Neighbours [Q, k + 1] without each query's own row; without the last, where it is not there.

    It may be missing: rows that equal it come first, and there may be more than k of them.
    """
    itself = rows == own[:, None]
    itself[~itself.any(axis=1), -1] = True
    shape = (len(rows), rows.shape[1] - 1)
    return similarity[~itself].reshape(shape), rows[~itself].reshape(shape)


def even_rows(rows: int, count: int) -> Ints:
    """At most `count` row numbers at even steps through all of them."""
    count = min(rows, count)
    return np.arange(count, dtype=np.int64) * rows // max(1, count)


def picked(blocks: Blocks, rows: Ints) -> Floats:
    """The vectors at sorted row numbers."""
    parts = [
        block[
            rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + len(block))] - first
        ]
        for first, block in blocks()
    ]
    return np.ascontiguousarray(np.concatenate(parts))


def _name(column: str) -> str:
    return "_index.json" if column == "cls" else f"_index_{column}.json"


def _stored(index: Any, facts: IndexFacts, place: str) -> IndexFacts:
    """Writes faiss' file, then what is known of it. An index that cannot be stored is used as it
    is, and that is said.
    """
    import faiss

    fs, path = resolve_uri(str(join(place, facts.file)))
    try:
        with atomic_path(fs, path) as temporary:
            faiss.write_index(index, temporary)
            size = Path(temporary).stat().st_size
        facts = IndexFacts(**{**asdict(facts), "file_bytes": size})
        content = json.dumps(asdict(facts), indent=1).encode()
        write_bytes_atomic(content, *resolve_uri(str(join(place, _name(facts.column)))))
        folder = path.rpartition("/")[0]
        beginning = f"_index_{facts.column}_"
        for old in list_files(fs, folder, recursive=False):
            name = old.base_name
            # of vectors that were there before, or begun by a job that was killed
            before = name.startswith(beginning) and name.endswith(".faiss") and name != facts.file
            begun = name.startswith(f".{beginning}") and name.endswith(".tmp")
            if before or (begun and time.time() - old.mtime.timestamp() > ABANDONED_S):
                delete_file(fs, old.path)
    except (OSError, PipelineError, RuntimeError) as error:
        log.warning(
            "index       cannot be stored in %s, the next search builds it again: %s",
            public(place),
            one_line(error),
        )
    return facts
