"""What training changes and a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pipeline.model.pair import Pair
from pipeline.train.objective import Objective


@dataclass
class Trainee:
    """Everything that a checkpoint holds, on its device."""

    pair: Pair
    objective: Objective
    optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Any]:
        """Nested dicts of tensors and numbers, for `torch.save`."""
        return {
            "student": self.pair.student.state_dict(),
            "teacher": self.pair.teacher.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, found: dict[str, Any]) -> None:
        """Puts a checkpoint's tensors in place."""
        self.pair.student.load_state_dict(found["student"])
        self.pair.teacher.load_state_dict(found["teacher"])
        self.objective.load_state_dict(found["objective"])
        self.optimizer.load_state_dict(found["optimizer"])
