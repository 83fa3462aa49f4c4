"""Features that are read like a tensor, and count what is read."""

import torch


class Read:
    """Features of which only some rows are ever a tensor.

    Attributes:
        rows: how many rows each reading was of.
    """

    def __init__(self, features: torch.Tensor) -> None:
        self.features, self.shape, self.device = features, features.shape, features.device
        self.rows: list[int] = []

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(rows))
        return self.features[rows]
