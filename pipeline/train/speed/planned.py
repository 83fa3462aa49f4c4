"""What the plan said of a worker's memory, held against its device at the start, and against what
was taken at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from pipeline.train.speed.cost import GIB, Memory

log = logging.getLogger("pipeline.train")

TOLERANCE = 0.3  # between the plan and what was taken, before it is worth a word,
SMALL = 0.25 * GIB  # and of bytes: Python and Ray take some on a CPU
HEADROOM = 0.95  # of a GPU: freed blocks do not always fit what is wanted next


class MemoryWatch:
    """Follows the memory of this process from before its networks are built."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = _status().get("RssAnon", 0.0)
        self.planned: Memory | None = None
        self.beside = 0.0

    def plan(self, planned: Memory, checkpoint: int, share: float, lighter: str) -> None:
        """Takes what the plan says, and warns where the GPU has not so much.

        Args:
            planned: of this worker.
            checkpoint: bytes of the copy on the host that one is written from.
            share: of a GPU, that the worker has.
            lighter: what to do about it.
        """
        self.planned = planned
        if self.device.type != "cuda":
            self.beside = checkpoint
            return  # of a machine's memory the driver knows more: doctor/fits.py
        there = share * torch.cuda.get_device_properties(self.device).total_memory
        if sentence := too_little(planned, there, lighter):
            log.warning("%s", sentence)

    def taken(self) -> float:
        """The most that the run has taken so far, bytes, comparable to `Memory.allocated`; 0 where
        the system does not say.
        """
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device))
        status = _status()
        if not {"RssAnon", "VmHWM"} <= status.keys():
            return 0.0
        # what is shared with others, such as images in the object store, is not the network's
        shared = status.get("RssFile", 0.0) + status.get("RssShmem", 0.0)
        return max(0.0, status["VmHWM"] - shared - self.before)

    def close(self) -> None:
        """At the end: says where plan and run are far apart."""
        if self.planned is None or not (taken := self.taken()):
            return
        if sentence := difference(self.planned.allocated + self.beside, taken):
            log.warning("%s", sentence)


def too_little(planned: Memory, there: float, lighter: str) -> str:
    """A sentence where a device has fewer bytes than the plan takes; else ""."""
    if planned.total <= HEADROOM * there:
        return ""
    return (
        f"the plan takes about {planned.total / GIB:.1f} GiB of a GPU ({planned.line()}), and a "
        f"worker has {there / GIB:.1f} GiB: {lighter}"
    )


def difference(said: float, taken: float) -> str:
    """A sentence where bytes of plan and run are far apart; else ""."""
    if abs(taken - said) <= max(TOLERANCE * said, SMALL):
        return ""
    return (
        f"memory      the plan said {said / GIB:.2f} GiB for a worker, and it took "
        f"{taken / GIB:.2f} GiB at most"
    )


def _status() -> Mapping[str, float]:
    """Bytes of this process by kind, where Linux says them."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.startswith(("Rss", "VmHWM")))
    return {name: 1024.0 * int(value.split()[0]) for name, value in pairs}
