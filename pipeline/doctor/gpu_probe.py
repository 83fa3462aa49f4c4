"""What a GPU node is tried with, as a process of its own: one that hangs can be ended.

    python -m pipeline.doctor.gpu_probe kernel cuda
    python -m pipeline.doctor.gpu_probe reduce nccl cuda:0 RANK WORLD tcp://HOST:PORT SECONDS

The last line of its output that starts with `RESULT` is JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from datetime import timedelta
from typing import Any

MARK = "RESULT "
NUMBERS = 2**24  # of an all-reduce: 64 MiB, above which NCCL's rate hardly grows
REPEATS = 5


def kernel(device: str) -> dict[str, Any]:
    """Compiles a small function, runs it and compares; which GPUs reach each other's memory.

    Returns:
        `gpus` that torch can use, `apart`: pairs of them without peer to peer, `seconds` that the
        compilation took, and `error`, empty where it went well.
    """
    with tempfile.TemporaryDirectory(prefix="kernel") as folder:
        # what an earlier run compiled must not hide that nothing can be compiled now
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        import torch

        def function(x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(2 * x, dim=-1).square().sum(-1)

        gpus = torch.cuda.device_count() if device == "cuda" else 0
        reach = torch.cuda.can_device_access_peer
        apart = sum(not reach(a, b) for a in range(gpus) for b in range(a + 1, gpus))
        begun, error = time.monotonic(), ""
        try:
            numbers = torch.linspace(-1, 1, 4096, device=device).view(64, 64)
            torch.testing.assert_close(torch.compile(function)(numbers), function(numbers))
        except Exception as raised:  # whatever it is, it is what the doctor looks for
            error = f"{type(raised).__name__}: {str(raised).strip().splitlines()[0][:200]}"
        seconds = time.monotonic() - begun
    return {"gpus": gpus, "apart": apart, "seconds": seconds, "error": error}


def reduce(
    backend: str, device: str, rank: int, world: int, address: str, limit_s: float
) -> dict[str, Any]:
    """Adds 64 MiB of numbers up over all ranks, and checks the sum.

    Returns:
        `gb_per_s`: bytes that each rank sends, and receives, a second: 2 (n - 1) / n of the data.
    """
    import torch
    import torch.distributed as dist

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, address, timedelta(seconds=limit_s), rank=rank, world_size=world
    )
    expected = world * (world + 1) / 2
    best = float("inf")
    for _ in range(REPEATS):
        numbers = torch.full((NUMBERS,), rank + 1.0, device=device)
        # no `dist.barrier()`: where it comes first, NCCL guesses a rank's GPU from its number
        ready = torch.zeros(1, device=device)
        dist.all_reduce(ready)
        ready.item()
        begun = time.monotonic()
        dist.all_reduce(numbers)
        if not bool((numbers == expected).all()):  # which waits for the device
            raise SystemExit("the all-reduce gave another sum")
        best = min(best, time.monotonic() - begun)
    dist.destroy_process_group()
    return {"gb_per_s": 2 * (world - 1) / world * 4 * NUMBERS / best / 1e9}


def main(arguments: list[str]) -> None:
    """Runs what the arguments say and prints its result."""
    if arguments[0] == "kernel":
        result = kernel(arguments[1])
    else:
        backend, device, rank, world, address, limit_s = arguments[1:]
        result = reduce(backend, device, int(rank), int(world), address, float(limit_s))
    sys.stdout.write(f"{MARK}{json.dumps(result)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
