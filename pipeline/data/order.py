"""The order in which training reads rows: a pure function of seed, pass and the shards' row counts.

A pass is one permutation of the set, cut into global batches; what does not fill the last batch is
left out. Row groups are permuted first, then rows inside windows of consecutive positions, so a
task reads a few row groups and still mixes them. The position of a row says which step, which
worker and which place it has, so what a checkpoint must remember of the data is one number.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """The work of one read task: positions `start` to `stop` of one window of one pass."""

    pass_index: int
    window: int
    window_start: int
    window_stop: int
    start: int
    stop: int
    groups: Ints  # row groups that the window touches, in the order of this pass
    group_starts: Ints  # position in the pass of each group's first row


@dataclass(frozen=True)
class ReadingOrder:
    """Which rows make up which step.

    Attributes:
        group_rows: rows of each row group of the shard set, [G].
        seed: of the run.
        global_batch: images in a step, over all workers.
        window: positions that are shuffled together; a multiple or a divisor of the global batch.
        piece: positions that one read task handles; at most the window, a multiple of the chunk.
    """

    group_rows: Ints
    seed: int
    global_batch: int
    window: int
    piece: int

    @property
    def steps_per_pass(self) -> int:
        """Steps in a pass; the remainder of the rows is not used in this pass."""
        return int(self.group_rows.sum()) // self.global_batch

    def pieces(self, first_step: int, last_step: int) -> list[Piece]:
        """Read tasks for steps `first_step` (in) to `last_step` (out), in order."""
        found: list[Piece] = []
        step = first_step
        while step < last_step:
            pass_index, begin = divmod(step, self.steps_per_pass)
            end = min(self.steps_per_pass, begin + last_step - step)
            found += self._pass_pieces(
                pass_index, begin * self.global_batch, end * self.global_batch
            )
            step += end - begin
        return found

    def _pass_pieces(self, pass_index: int, first: int, last: int) -> list[Piece]:
        order = keyed(self.seed, pass_index, "groups").permutation(len(self.group_rows))
        starts = np.concatenate([[0], np.cumsum(self.group_rows[order])])
        used = self.steps_per_pass * self.global_batch
        found = []
        for window in range(first // self.window, -(-last // self.window)):
            low, high = window * self.window, min((window + 1) * self.window, used)
            a = int(np.searchsorted(starts, low, side="right")) - 1
            b = int(np.searchsorted(starts, high, side="left"))
            for start in range(low, high, self.piece):
                stop = min(start + self.piece, high)
                if stop > first and start < last:
                    found.append(
                        Piece(
                            pass_index=pass_index,
                            window=window,
                            window_start=low,
                            window_stop=high,
                            start=max(start, first),
                            stop=min(stop, last),
                            groups=order[a:b],
                            group_starts=starts[a:b],
                        )
                    )
        return found

    def rows(self, piece: Piece) -> tuple[Ints, Ints]:
        """The piece's rows in order: row group of each, and its place in that group."""
        size = piece.window_stop - piece.window_start
        shuffle = keyed(self.seed, piece.pass_index, "window", piece.window).permutation(size)
        part = shuffle[piece.start - piece.window_start : piece.stop - piece.window_start]
        positions = piece.window_start + part
        at = np.searchsorted(piece.group_starts, positions, side="right") - 1
        return piece.groups[at], positions - piece.group_starts[at]


def keyed(*key: int | str) -> np.random.Generator:
    """A generator that depends on the key alone (Philox, counter based)."""
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
