"""How a worker comes by a teacher of features: what the driver gives it, opened on its node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pipeline.images.value_range import ValueRange
from pipeline.model.encoders.frozen import FeatureTeacher


class Source(Protocol):
    """A model that was looked up by name; small, and pickled on its way to a worker
    (`pipeline.embed.teacher`).
    """

    @property
    def digest(self) -> str:
        """Changes with the weights."""
        ...

    @property
    def value_range(self) -> ValueRange:
        """Values of deep images that became 0 to 255 in its training."""
        ...

    @property
    def trained(self) -> bool:
        """Whether that range is known: of a run of ours."""
        ...

    def open(
        self, mean: Sequence[float], std: Sequence[float], device: str, threads: int
    ) -> FeatureTeacher:
        """Loads it, on the CPU.

        Args:
            mean: of each channel, as the student's views are normalised.
            std: likewise.
            device: `cuda` or `cpu`, where a network outside of torch computes.
            threads: of such a network.

        Raises:
            PipelineError: it is gone, has changed, or does not fit the student's images.
        """
        ...
