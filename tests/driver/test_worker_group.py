"""What Ray Train gives the training workers: variables before CUDA starts, and patience."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load
from pipeline.driver.worker_group import run_config, torch_config
from pipeline.plan.layout import Machine
from pipeline.plan.plan import Plan, SetFacts, resolve

NAMES = ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCHINDUCTOR_COMPILE_THREADS"]
NAMES += ["TORCHINDUCTOR_CACHE_DIR"]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def plan_of(*overrides: str, cpus: int = 64, gpus: int = 8) -> Plan:
    config = load(["optim.steps=1", *overrides])
    machine = Machine(cpus=cpus, gpus=gpus, bfloat16=True)
    return resolve(config, SetFacts(100_000, ""), machine=machine)


def variables(plan: Plan, folder: Path) -> dict[str, str]:
    found: dict[str, str] = run_config(plan, folder / "start").worker_runtime_env.get(
        "env_vars", {}
    )
    return found


def test_workers_on_gpus(tmp_path: Path) -> None:
    plan = plan_of()
    assert variables(plan, tmp_path) == {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_COMPILE_THREADS": str(plan.threads),
    }
    assert 1 < plan.threads <= 8  # 64 CPUs for 8 workers
    assert torch_config(plan).backend == "nccl"
    assert torch_config(plan).timeout_s == 1800


def test_workers_that_compile_nothing_or_have_no_gpu(tmp_path: Path) -> None:
    assert set(variables(plan_of("train.compile=false"), tmp_path)) == {"PYTORCH_ALLOC_CONF"}
    assert variables(plan_of(gpus=0), tmp_path) == {}
    assert torch_config(plan_of(gpus=0)).backend == "gloo"
    assert torch_config(plan_of("resources.gpus_per_worker=0.5")).backend == "gloo"


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_set_goes_to_the_workers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator has two names: with either ours stays away."""
    monkeypatch.setenv(name, "1")
    found = variables(plan_of(), tmp_path)
    assert found[name] == "1"
    assert len({"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & found.keys()) == 1


def test_many_cpus_for_one_worker(tmp_path: Path) -> None:
    found = variables(plan_of("train.workers=1", cpus=256, gpus=1), tmp_path)
    assert found["TORCHINDUCTOR_COMPILE_THREADS"] == "32"


def test_they_arrive_in_a_worker(ray_cluster: None, tmp_path: Path) -> None:
    """A worker of Ray Train on a CPU, with the environment of one on a GPU."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    def told() -> dict[str, str]:
        """What the worker finds, and what torch made of it."""
        import os

        import torch

        settings = str(torch._C._accelerator_getAllocatorSettings())  # type: ignore[attr-defined]
        return {"torch": settings} | {k: os.environ[k] for k in names if k in os.environ}

    names = list(NAMES)
    result = TorchTrainer(
        told,
        scaling_config=ScalingConfig(num_workers=1),
        torch_config=torch_config(plan_of(gpus=0)),
        run_config=run_config(plan_of(), tmp_path / "start"),
    ).fit()
    expected = {"torch": "expandable_segments:True"} | variables(plan_of(), tmp_path)
    assert result.return_value == expected
