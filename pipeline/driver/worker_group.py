"""How Ray Train starts a group of workers: records, retries, variables, patience."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.environment import worker_variables

# How long workers wait for one another before they give up, and start again from a checkpoint.
# Ray Train's default, half an hour: one compiles for minutes, or reads a checkpoint from a bucket.
GROUP_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Workers:
    """What each worker of a group has, and whether it compiles its networks."""

    device: str  # "cuda" or "cpu"
    gpus: float  # reserved for each
    threads: int
    compiles: bool


def run_config(workers: Workers, records: Path, max_restarts: int) -> Any:
    """Where Ray Train notes what it does, how often it tries again, and what workers find in their
    environment from their first instruction on: CUDA reads some of it once, when it starts.
    """
    from ray.train import FailureConfig, RunConfig

    variables = worker_variables(workers.device, workers.compiles, workers.threads)
    return RunConfig(
        name=records.name,
        storage_path=str(records.parent),
        failure_config=FailureConfig(max_failures=max_restarts),
        worker_runtime_env={"env_vars": variables} if variables else None,
    )


def torch_config(workers: Workers) -> Any:
    """How workers talk. NCCL has no two workers on one GPU: those that share one talk over gloo."""
    from ray.train.torch import TorchConfig

    alone = workers.device == "cuda" and workers.gpus == 1
    return TorchConfig(backend="nccl" if alone else "gloo", timeout_s=GROUP_TIMEOUT_S)
