"""What ranks are told to do, where the processes of a Ray can import it."""

from __future__ import annotations

from pipeline.errors import DataError


def broken(given: str, rank: int, ranks: int, device: str) -> int:
    """Fails on the last rank."""
    if rank == ranks - 1:
        raise DataError(f"{given} {rank} of {ranks} on {device}", "mend it")
    return rank
