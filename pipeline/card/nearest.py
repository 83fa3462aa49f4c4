"""The nearest neighbours among tables of vectors of any size: blocks over tasks, merged here.

A task compares a block of the reference with a block of the queries and keeps the k best. Sums are
exact (`evaluate/neighbours/exact.py`) and of equals the lowest row comes first. So the result is
the same to the last bit for any number of blocks, in any order, on CPUs and GPUs.

Memory of a task: 256 MiB for the vectors of each block, as much again for their exact form, and
512 MiB of work; 1.5 GiB in all. The driver holds ids and labels of both sets, and 20 k bytes a
query: 200 MB for 50,000 queries and k = 200.

Shapes: N rows of the reference, Q queries, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.embed.ids import Ids, id_bytes
from pipeline.embed.pool import as_ours
from pipeline.embed.vectors import VectorSet
from pipeline.errors import DataError
from pipeline.heartbeat import doing
from pipeline.uri import public

if TYPE_CHECKING:
    from pipeline.evaluate.neighbours.exact import Frame
    from pipeline.evaluate.neighbours.nearest import Neighbours

BLOCK_VALUES = 1 << 26  # of the vectors of a block: 256 MiB
FEWEST_PRODUCTS = 1 << 34  # values of vectors that are compared: a second or two of a core
SIMILARITIES = {"cpu": 1 << 25, "cuda": 1 << 28}  # at once: 128 MiB and 1 GiB
AHEAD = 2  # tasks that wait for each that runs
MEAN_ROWS = 1 << 16  # of which sums are added: always these, so that the mean has always its bits

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Block:
    """What one task compares.

    Attributes:
        rows: of the reference.
        queries: of the queries.
    """

    rows: slice
    queries: slice


@dataclass(frozen=True)
class Asked:
    """What all tasks are given.

    Attributes:
        reference: whose labelled rows are compared.
        queries: the reference where there is one set.
        voters: numbers of the labelled rows, int64 [V].
        voter_ids: uint8 [V, 16], their images.
        query_ids: uint8 [Q, 16].
        output: the column of vectors.
        frame: what they are relative to.
        k: rows to keep.
        device: where products are made.
    """

    reference: VectorSet
    queries: VectorSet
    voters: Array
    voter_ids: Array
    query_ids: Array
    output: str
    frame: Frame
    k: int
    device: str


def neighbours(
    reference: VectorSet,
    queries: VectorSet | None,
    k: int,
    output: str = "cls",
    gpu: bool = False,
    centre: bool = False,
) -> Neighbours:
    """The k nearest labelled rows of the reference by cosine, of each query.

    No query has a row with its own id, so one set is asked by leaving each image out. Rows of the
    reference without a label are passed over; a zero vector has cosine 0 to all.

    Args:
        reference: finished vectors.
        queries: finished vectors of the same model; None: the reference itself.
        k: cut to the number of labelled rows.
        output: the column to compare.
        gpu: whether tasks ask for a GPU each.
        centre: take the reference's mean off first, as raw pixels need, whose cosines are all high.

    Returns:
        similarities float32 [Q, k] and rows int64 [Q, k], numbers in the whole reference.

    Raises:
        DataError: no labelled row, k below 1, or vectors that cannot be compared.
    """
    asked_set = reference if queries is None else queries
    _check(reference, asked_set, output, k)
    labels, ids = _labels_and_ids(reference)
    voters = np.flatnonzero(labels >= 0)
    if not len(voters):
        raise DataError(
            f"none of the {reference.rows:,} images of {public(reference.uri)} has a label",
            "k-NN needs a labelled reference",
        )
    asked = Asked(
        reference,
        asked_set,
        voters,
        ids[voters],
        ids if queries is None else _labels_and_ids(queries)[1],
        output,
        frame := _frame(reference, output, centre),
        min(k, len(voters)),
        "cuda" if gpu else "cpu",
    )
    blocks = _blocks(reference.rows, asked_set.rows, len(frame.middle), _devices(gpu))
    with doing(f"neighbours of {asked_set.rows:,} images, {len(blocks)} blocks"):
        return _merged(asked, _each(block_best, asked, blocks))


def _check(reference: VectorSet, queries: VectorSet, output: str, k: int) -> None:
    if k < 1:
        raise DataError(f"cannot look for the {k} nearest images", "ask for 1 or more")
    models = [(x.facts["digest"], x.facts["image_size"]) for x in (reference, queries)]
    if models[0] != models[1]:
        raise DataError(
            f"{public(reference.uri)} is of {reference.facts['model']} at {models[0][1]} pixels, "
            f"{public(queries.uri)} is of {queries.facts['model']} at {models[1][1]} pixels",
            "embed both sets with the same model and embed.image_size",
        )
    for vectors in (reference, queries):
        if not vectors.rows:
            raise DataError(f"{public(vectors.uri)} holds no {output} vectors")


def _labels_and_ids(vectors: VectorSet) -> tuple[Array, Array]:
    table = vectors.columns("image_id", "label")
    labels = np.array(table["label"].fill_null(-1).to_numpy(), np.int64)
    return labels, Ids(id_bytes(table["image_id"])).digests()


def _frame(reference: VectorSet, output: str, centre: bool) -> Frame:
    from pipeline.evaluate.neighbours.exact import MIDDLE_ROWS, Frame

    origin = None
    if centre:
        sums = [
            block.reshape(len(block), -1).astype(np.float64).sum(0)
            for block, _ in reference.blocks(MEAN_ROWS, output)
        ]
        origin = np.sum(sums, 0) / reference.rows
    first = reference.read(output, slice(0, MIDDLE_ROWS))
    return Frame.of(first.reshape(len(first), -1), origin)


def _devices(gpu: bool) -> int:
    """How many tasks can run at once."""
    import ray

    resources = ray.cluster_resources()
    return max(1, int(resources.get("GPU" if gpu else "CPU", 1)))


def _blocks(rows: int, queries: int, dim: int, devices: int) -> list[Block]:
    """Blocks that fit into memory, and so many that all devices have some where that pays."""
    largest = max(1, BLOCK_VALUES // dim)
    row_blocks = -(-rows // largest)
    useful = min(devices, rows * queries * dim // FEWEST_PRODUCTS)
    query_blocks = max(-(-queries // largest), -(-useful // row_blocks))
    return [
        Block(of_rows, of_queries)
        for of_queries in _cut(queries, query_blocks)
        for of_rows in _cut(rows, row_blocks)
    ]


def _cut(count: int, parts: int) -> list[slice]:
    ends = [count * i // max(1, parts) for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(ends) if a < b]


def _each(
    function: Callable[[Asked, Block], tuple[Array, Array, Array]],
    asked: Asked,
    blocks: Sequence[Block],
) -> Iterator[tuple[Block, tuple[Array, Array, Array]]]:
    """The result of each block from a Ray task, in the order in which they end."""
    import ray
    from ray.exceptions import RayTaskError

    gpu = asked.device == "cuda"
    remote = ray.remote(function).options(num_cpus=1, num_gpus=int(gpu))
    shared, waiting = ray.put(asked), list(blocks)[::-1]
    running: dict[Any, Block] = {}
    try:
        while waiting or running:
            while waiting and len(running) < (1 + AHEAD) * _devices(gpu):
                block = waiting.pop()
                running[remote.remote(shared, block)] = block
            (ended,), _ = ray.wait(list(running), num_returns=1)
            yield running.pop(ended), ray.get(ended)
    except RayTaskError as error:
        raise as_ours(error, "the search for nearest images") from error
    finally:
        for task in running:
            ray.cancel(task)


def block_best(asked: Asked, block: Block) -> tuple[Array, Array, Array]:
    """In a task: the best rows of a block of the reference, for a block of queries.

    Returns:
        `exact.ranking` float64 [q, k] and rows int64 [q, k], best first, -inf where there are no
        more, and `exact.Placed.own` of the queries [q].
    """
    import torch

    from pipeline.evaluate.neighbours.exact import best
    from pipeline.evaluate.neighbours.nearest import SameImages

    device = torch.device(asked.device)
    placed = _placed(asked, asked.queries, block.queries)
    own, count = placed.own.numpy(), len(placed)
    first, end = np.searchsorted(asked.voters, (block.rows.start, block.rows.stop))
    if first == end:
        return np.zeros((count, 0)), np.zeros((count, 0), np.int64), own
    voters = asked.voters[first:end]
    same = SameImages.of(asked.voter_ids[first:end], asked.query_ids[block.queries])
    known = _placed(asked, asked.reference, block.rows, voters - block.rows.start).to(device)
    k = min(asked.k, len(known))
    step = max(1, SIMILARITIES[asked.device] // len(known))
    ranked, rows = np.empty((count, k)), np.empty((count, k), np.int64)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        query, row = same.within(part.start, part.stop)
        apart = (query.to(device), row.to(device))
        values, places = best(placed[part].to(device), known, k, apart)
        ranked[part], rows[part] = values.cpu().numpy(), voters[places.cpu().numpy()]
    return ranked, rows, own


def _placed(asked: Asked, vectors: VectorSet, rows: slice, chosen: Array | None = None) -> Any:
    values = vectors.read(asked.output, rows)
    values = values.reshape(len(values), -1)
    return asked.frame.placed(values if chosen is None else values[chosen], rows.start)


def _merged(
    asked: Asked,
    results: Iterator[tuple[Block, tuple[Array, Array, Array]]],
) -> Neighbours:
    """The best of all blocks, by value and then by row, in whatever order they end."""
    import torch

    from pipeline.evaluate.neighbours.exact import cosines, first_of
    from pipeline.evaluate.neighbours.nearest import Neighbours

    count, k = asked.queries.rows, asked.k
    ranked = torch.full((count, k), -torch.inf, dtype=torch.float64)
    rows = torch.full((count, k), asked.reference.rows, dtype=torch.int64)  # after all real ones
    own = torch.zeros(count, dtype=torch.float64)
    for block, result in results:
        values, places, own_values = (torch.from_numpy(np.array(x)) for x in result)
        at = block.queries
        places = places.masked_fill(values == -torch.inf, asked.reference.rows)
        ranked[at], rows[at] = first_of(
            torch.cat((ranked[at], values), 1), torch.cat((rows[at], places), 1), k
        )
        own[at] = own_values
    return Neighbours(cosines(ranked, own), rows.masked_fill(ranked == -torch.inf, -1))
