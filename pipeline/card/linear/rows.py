"""Rows of a table of vectors as heads take them: read in parts, mixed, never all of a large table.

A table that fits into KEPT_BYTES is read once and kept. Of a larger one, several parts in a random
order are in memory at a time, with the next ones on their way, and their rows are mixed. So a table
that is sorted by class should be of packed shards, which are in an order of hashes.

Shapes: n rows, F numbers of an image's inputs, D width, b blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.embed.vectors import VectorSet

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.evaluate.classifiers.linear import Inputs
    from pipeline.evaluate.classifiers.standard import Standard

KEPT_BYTES = 2 << 30
WINDOW_BYTES = 512 << 20  # of rows that are mixed; as many are being read
READERS = 4  # parts that are read at once
STANDARD_ROWS = 16_384  # of which mean and deviation are taken

Rows = npt.NDArray[np.int64]
Batch = tuple["Tensor", "Tensor"]


@dataclass(frozen=True)
class Columns:
    """Which vectors of a table the heads take.

    Attributes:
        cls: `blocks`, or `cls` where there is only the last one.
        blocks: b.
        mean: whether there is the mean of the patches.
        dim: D.
    """

    cls: str
    blocks: int
    mean: bool
    dim: int

    @classmethod
    def of(cls, vectors: VectorSet) -> Columns:
        """All that a table has."""
        several = "blocks" in vectors.outputs
        return cls(
            "blocks" if several else "cls",
            int(vectors.facts["blocks"]) if several else 1,
            "mean" in vectors.outputs,
            vectors.dim,
        )

    @property
    def width(self) -> int:
        """F."""
        return self.dim * (self.blocks + self.mean)

    def inputs(self) -> tuple[Inputs, ...]:
        """The groups of heads."""
        from pipeline.evaluate.classifiers.linear import inputs_of

        return inputs_of(self.dim, self.blocks, self.mean)

    def read(self, vectors: VectorSet, rows: slice) -> npt.NDArray[np.float32]:
        """Vectors float32 [n, F], as `linear.inputs_of` says."""
        parts = [vectors.read(self.cls, rows).reshape(rows.stop - rows.start, -1)]
        if self.mean:
            parts.append(vectors.read("mean", rows))
        return np.concatenate(parts, 1)


@dataclass(frozen=True)
class Share:
    """The parts of a table that one rank reads.

    Attributes:
        vectors: the table.
        columns: of it.
        standard: what all numbers are relative to, on the device.
        rank: of `ranks`.
        ranks: that share the table.
        device: where batches go.
    """

    vectors: VectorSet
    columns: Columns
    standard: Standard
    rank: int = 0
    ranks: int = 1
    device: str = "cpu"

    def parts(self) -> list[slice]:
        """Rows of each part, every `ranks`-th."""
        return parts_of(self.vectors)[self.rank :: self.ranks]

    def read(self, part: slice, wanted: npt.NDArray[np.bool_]) -> tuple[Tensor, Rows]:
        """Wanted rows of a part, standardised float32 [n, F] on the device, and their numbers."""
        import torch

        rows = part.start + np.flatnonzero(wanted[part])
        if not len(rows):
            return torch.zeros(0, self.columns.width, device=self.device), rows
        vectors = torch.from_numpy(self.columns.read(self.vectors, part)).to(self.device)
        return self.standard.of_rows(vectors, torch.from_numpy(rows - part.start)), rows


def standard_of(vectors: VectorSet, columns: Columns, training: npt.NDArray[np.bool_]) -> Standard:
    """Mean and deviation of rows that train, of parts from all over the table: the same on every
    rank, without a word between them.
    """
    import torch

    from pipeline.evaluate.classifiers.standard import Standard

    every = parts_of(vectors)
    kept = [
        columns.read(vectors, part)[training[part]]
        for part in every[:: max(1, vectors.rows // STANDARD_ROWS)]
    ]
    if not any(map(len, kept)):  # what trains stands in few parts
        kept = [
            columns.read(vectors, part)[training[part]] for part in every if training[part].any()
        ]
    return Standard.of(torch.from_numpy(np.concatenate(kept)))


def parts_of(vectors: VectorSet) -> list[slice]:
    """The rows of each part of a table that has some."""
    ends = np.cumsum([0, *(rows for _, rows in vectors.parts)]).tolist()
    return [slice(a, b) for a, b in pairwise(ends) if a < b]


def trained_parts(vectors: VectorSet, training: npt.NDArray[np.bool_]) -> list[slice]:
    """Those that have rows which train; ranks share these, so that each has some."""
    return [part for part in parts_of(vectors) if training[part].any()]


# ---- Batches.


def batches(
    share: Share, labels: Rows, training: npt.NDArray[np.bool_], size: int, seed: int
) -> Iterator[Batch]:
    """Endless batches of rows that train, in another order in every epoch.

    Args:
        share: whose rows.
        labels: int64 [N], of all rows of the table.
        training: bool [N].
        size: of this rank's part of a batch.
        seed: of the order.
    """
    import torch

    known = torch.from_numpy(labels).to(share.device)
    # Fewer than a batch, of the window before.
    left = torch.zeros(0, share.columns.width, device=share.device), known[:0]
    for epoch, windows in enumerate(_epochs(share, training, seed)):
        mixing = np.random.default_rng([seed, share.rank, epoch, 1])
        for x, rows in windows:
            y = known[rows.to(known.device)]
            order = torch.from_numpy(mixing.permutation(len(x))).to(x.device)
            at = 0
            while len(left[0]) + len(x) - at >= size:
                part = order[at : at + size - len(left[0])]
                yield torch.cat((left[0], x[part])), torch.cat((left[1], y[part]))
                at += len(part)
                left = x[:0], y[:0]
            left = torch.cat((left[0], x[order[at:]])), torch.cat((left[1], y[order[at:]]))


def _epochs(
    share: Share, training: npt.NDArray[np.bool_], seed: int
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """The windows of each epoch: vectors on the device, and the rows that they are."""
    parts = trained_parts(share.vectors, training)[share.rank :: share.ranks]
    row_bytes = 4 * share.columns.width
    if sum(int(training[part].sum()) for part in parts) * row_bytes <= KEPT_BYTES:
        kept = _window(share, training, parts)
        while True:
            yield iter([kept])
    most = max(1, WINDOW_BYTES // row_bytes)
    for epoch in count():
        order = np.random.default_rng([seed, share.rank, epoch]).permutation(len(parts))
        yield _ahead(share, training, list(_grouped([parts[i] for i in order], most)))


def _grouped(parts: Sequence[slice], most: int) -> Iterator[list[slice]]:
    """Parts together as long as they have at most so many rows."""
    group: list[slice] = []
    for part in parts:
        if group and sum(p.stop - p.start for p in [*group, part]) > most:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _ahead(
    share: Share, training: npt.NDArray[np.bool_], groups: Sequence[list[slice]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows, each read while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(_window, share, training, groups[0])
        for group in groups[1:]:
            window, coming = coming.result(), pool.submit(_window, share, training, group)
            yield window
        yield coming.result()


def _window(
    share: Share, training: npt.NDArray[np.bool_], parts: Sequence[slice]
) -> tuple[Tensor, Tensor]:
    import torch

    with ThreadPoolExecutor(READERS) as pool:
        read = list(pool.map(lambda part: share.read(part, training), parts))
    vectors, rows = zip(*read, strict=True)
    return torch.cat(vectors), torch.from_numpy(np.concatenate(rows))
