"""The order in which training reads rows: a pure function of seed, pass and the shards' row counts.

A pass is one permutation of the set, cut into global batches; what does not fill the last batch is
left out. Row groups are permuted first, then rows inside windows of consecutive positions, so a
task reads a few row groups and still mixes them. The position of a row says which step, which
worker and which place it has, so what a checkpoint must remember of the data is one number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class WindowSlice:
    """The work of one read task: positions `start` to `stop` of one window of one pass.

    It holds all that is needed to find its rows, so it is small however large the set is.
    """

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
    """

    group_rows: Ints
    seed: int
    global_batch: int
    window: int
    _passes: dict[int, tuple[Ints, Ints]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property  # a sum over all row groups
    def steps_per_pass(self) -> int:
        """Steps in a pass; the remainder of the rows is not used in this pass."""
        return int(self.group_rows.sum()) // self.global_batch

    def slices(self, first_step: int, last_step: int) -> list[WindowSlice]:
        """Read tasks for steps `first_step` (in) to `last_step` (out), in order.

        Time and memory grow with the row groups of the set (one permutation a pass) and with the
        windows asked for.
        """
        slices: list[WindowSlice] = []
        step = first_step
        while step < last_step:
            pass_index, begin = divmod(step, self.steps_per_pass)
            end = min(self.steps_per_pass, begin + last_step - step)
            slices += self._pass_slices(
                pass_index, begin * self.global_batch, end * self.global_batch
            )
            step += end - begin
        return slices

    def _groups_of(self, pass_index: int) -> tuple[Ints, Ints]:
        """Row groups in the order of a pass, and the position of each one's first row."""
        if pass_index not in self._passes:
            order = keyed(self.seed, pass_index, "groups").permutation(len(self.group_rows))
            starts = np.concatenate([[0], np.cumsum(self.group_rows[order])])
            while len(self._passes) > 1:  # readers of a pass overlap with those of the next one
                self._passes.pop(min(self._passes))
            self._passes[pass_index] = order, starts
        return self._passes[pass_index]

    def _pass_slices(self, pass_index: int, first: int, last: int) -> list[WindowSlice]:
        order, starts = self._groups_of(pass_index)
        used = self.steps_per_pass * self.global_batch
        slices = []
        for window in range(first // self.window, -(-last // self.window)):
            low, high = window * self.window, min((window + 1) * self.window, used)
            a = int(np.searchsorted(starts, low, side="right")) - 1
            b = int(np.searchsorted(starts, high, side="left"))
            slices.append(
                WindowSlice(
                    pass_index=pass_index,
                    window=window,
                    window_start=low,
                    window_stop=high,
                    start=max(low, first),
                    stop=min(high, last),
                    # copies: a view would keep the arrays of the whole pass alive
                    groups=order[a:b].copy(),
                    group_starts=starts[a:b].copy(),
                )
            )
        return slices


def layout_of(group_rows: Ints) -> str:
    """16 hex digits of the row groups' lengths: another layout is another order."""
    rows = np.ascontiguousarray(group_rows, "<i8")
    return blake2b(rows.tobytes(), digest_size=8).hexdigest()


def slice_rows(part: WindowSlice, seed: int) -> tuple[Ints, Ints]:
    """The slice's rows in order: for each, which of the slice's groups, and its place in it."""
    shuffle = keyed(seed, part.pass_index, "window", part.window).permutation(
        part.window_stop - part.window_start
    )
    places = shuffle[part.start - part.window_start : part.stop - part.window_start]
    positions = part.window_start + places
    at = np.searchsorted(part.group_starts, positions, side="right") - 1
    return at, positions - part.group_starts[at]


def keyed(*key: int | str) -> np.random.Generator:
    """A generator that depends on the key alone (Philox, counter based)."""
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
