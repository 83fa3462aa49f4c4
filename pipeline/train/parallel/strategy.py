"""How the workers of a group hold one student together."""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel


def data_parallel(student: torch.nn.Module, device: torch.device, workers: int) -> torch.nn.Module:
    """The student as its workers call it: in DDP where there are several."""
    if workers == 1:
        return student
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(student, device_ids=ids, gradient_as_bucket_view=True)
