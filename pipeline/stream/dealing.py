"""Which stream hands an image to which worker, and which stream reads a window.

Chunk c of a step belongs to worker c mod W. A stream serves a range of ranks and takes exactly the
chunks of these, in the order of the pass; dealt in turn to its workers they come where one stream
for all would bring them. So neither the streams nor their number say what an image is used for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.stream.order import Ints, WindowSlice


@dataclass(frozen=True)
class Dealing:
    """The streams of a group of workers.

    Attributes:
        batch: images of a step, of all workers together.
        chunk: images of one block; a step has the same number of chunks for each worker.
        bounds: rank of the first worker of each stream, and behind them the number of workers.
    """

    batch: int
    chunk: int
    bounds: tuple[int, ...]

    @property
    def streams(self) -> int:
        """How many there are."""
        return len(self.bounds) - 1

    def workers(self, stream: int) -> int:
        """Workers of a stream."""
        return self.bounds[stream + 1] - self.bounds[stream]

    def images(self, stream: int, steps: int) -> int:
        """Images of so many steps that a stream hands out."""
        return steps * self.batch // self.bounds[-1] * self.workers(stream)

    def stream_of(self, part: WindowSlice) -> Ints:
        """The stream of each position of a slice, [n]."""
        chunks = np.arange(part.start, part.stop) % self.batch // self.chunk
        return np.searchsorted(self.bounds, chunks % self.bounds[-1], side="right") - 1

    def takers(self, part: WindowSlice) -> list[int]:
        """The streams that have images in a slice, ascending."""
        return [int(stream) for stream in np.unique(self.stream_of(part))]

    def reader(self, part: WindowSlice) -> int:
        """The stream that reads a slice for all: one that takes of it, each in its turn."""
        takers = self.takers(part)
        return takers[(part.pass_index + part.window) % len(takers)]
