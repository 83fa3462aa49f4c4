"""Which workers each stream of data serves, and where it runs: arithmetic, without Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple


class Stream(NamedTuple):
    """One Ray Data execution: the workers that it feeds, and the decoders that feed it."""

    first: int  # rank of its first worker
    last: int  # out
    node: str  # id of the node of most of its workers: it runs there, and so do its decoders
    decoders: int


def streams_for(
    nodes: Sequence[str], decoders: int, asked: int | Literal["auto"] = "auto"
) -> list[Stream]:
    """The streams of a group of workers.

    Each serves a range of ranks, and has at least one decoder. Decoders are shared out by workers.

    Args:
        nodes: for each rank the id of the node that it is on.
        decoders: of all streams together.
        asked: `resources.streams`; auto: one for each node.
    """
    workers = len(nodes)
    edges = [rank for rank in range(1, workers) if nodes[rank] != nodes[rank - 1]]
    count = len(set(nodes)) if asked == "auto" else asked
    count = max(1, min(count, workers, decoders))
    if count == len(edges) + 1:
        bounds = [0, *edges, workers]
    else:
        bounds = [i * workers // count for i in range(count + 1)]
    spare = decoders - count
    return [
        Stream(
            first,
            last,
            Counter(nodes[first:last]).most_common(1)[0][0],
            1 + spare * last // workers - spare * first // workers,
        )
        for first, last in pairwise(bounds)
    ]
