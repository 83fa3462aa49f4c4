"""The moving average of the teacher's logits, which softmax centring subtracts. K prototypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.loss.collectives import all_sum
from pipeline.loss.target import Weights, mean_of, prototypes_of, weights_of


class Centre:
    """Moving average of the teacher's mean logits, applied one step late as in the reference.

    The mean of step i enters the average when step i + 1 asks for it, so the mean in between is
    part of the state.
    """

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        self.momentum = momentum
        self.value = torch.zeros(prototypes)
        self.pending: Tensor | None = None

    @torch.no_grad()
    def use(self) -> Tensor:
        """Take in the pending mean and return the centre `[K]` of this step."""
        if self.pending is not None:
            self.value = self.value.lerp(self.pending.to(self.value.device), 1 - self.momentum)
            self.pending = None
        return self.value

    @torch.no_grad()
    def see(self, logits: Sequence[Tensor], weights: Weights | None = None) -> None:
        """Keep this step's mean: the mean over micro batches and workers of each one's mean.

        The iBOT centre of the reference is such a mean of means. A part without rows that count
        does not count.

        Args:
            logits: `[N, K]` of each micro batch.
            weights: of each micro batch: `[N]`, 1 for a row that counts and 0 for another, or None.

        Raises:
            PipelineError: logits that are no list of `[N, K]` with the K of the centre.
        """
        prototypes = prototypes_of(logits, 1.0)
        if prototypes != len(self.value):
            raise PipelineError(
                f"logits of {prototypes} prototypes for a centre of {len(self.value)}",
                f"use Centre({prototypes})",
            )
        total = torch.zeros(prototypes + 1, device=logits[0].device)
        for x, weight in zip(logits, weights_of(logits, weights), strict=True):
            total += mean_of(x, weight)
        total = all_sum(total)
        self.value = self.value.to(total.device)
        # Nobody had a row: the pending mean is the centre itself, which changes nothing.
        self.pending = torch.where(total[-1] > 0, total[:-1] / total[-1].clamp(min=1), self.value)

    def state_dict(self) -> dict[str, Tensor]:
        """The centre, and the pending mean where there is one."""
        state = {"value": self.value}
        return state if self.pending is None else state | {"pending": self.pending}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`."""
        self.value = state["value"].clone()
        pending = state.get("pending")
        self.pending = None if pending is None else pending.clone()
