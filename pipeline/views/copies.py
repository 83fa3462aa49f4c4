"""Copies from the host to a device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on a device.

    CUDA copies more than 64 KiB out of ordinary memory while the host waits, and out of pinned
    memory while it goes on. torch keeps that memory until the copy is over.
    """
    target = torch.device(device)
    if target.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(target, non_blocking=True)
