"""How Ray Train starts the group of training workers: records, retries, variables, patience."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.environment import worker_variables
from pipeline.plan.plan import Plan

# How long workers wait for one another before they give up, and start again from a checkpoint.
# Ray Train's default, half an hour: one compiles for minutes, or reads a checkpoint from a bucket.
GROUP_TIMEOUT_S = 1800


def run_config(plan: Plan, records: Path) -> Any:
    """Where Ray Train notes what it does, how often it tries again, and what workers find in their
    environment from their first instruction on: CUDA reads some of it once, when it starts.
    """
    from ray.train import FailureConfig, RunConfig

    variables = worker_variables(plan.device, plan.compile, plan.threads)
    return RunConfig(
        name=records.name,
        storage_path=str(records.parent),
        failure_config=FailureConfig(max_failures=plan.config.train.max_restarts),
        worker_runtime_env={"env_vars": variables} if variables else None,
    )


def torch_config(plan: Plan) -> Any:
    """How workers talk. NCCL has no two workers on one GPU: those that share one talk over gloo;
    beside an evaluator (`evaluate.gpu_share`) a worker is alone.
    """
    from ray.train.torch import TorchConfig

    alone = plan.device == "cuda" and plan.config.resources.gpus_per_worker == 1
    return TorchConfig(backend="nccl" if alone else "gloo", timeout_s=GROUP_TIMEOUT_S)
