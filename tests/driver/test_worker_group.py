"""What Ray Train gives the training workers: variables from their start on, and patience."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.driver.worker_group import Workers, run_config, torch_config

NAMES = ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCHINDUCTOR_COMPILE_THREADS"]
NAMES += ["TORCHINDUCTOR_CACHE_DIR"]
# Three times 30 MB, ten times over, by malloc as torch does: the page faults of all but the first.
TAKE_AND_GIVE_BACK = """
import resource, numpy
for turn in range(10):
    taken = [numpy.ones(30_000_000, numpy.uint8) for _ in range(3)]
    del taken
    first = first if turn else resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)


def variables(workers: Workers, folder: Path) -> dict[str, str]:
    found: dict[str, str] = run_config(workers, folder, 3).worker_runtime_env.get("env_vars", {})
    return found


GPU = Workers("cuda", 1.0, 8, compiles=True)
CPU = Workers("cpu", 0.0, 8, compiles=False)


def test_workers_on_gpus(tmp_path: Path) -> None:
    assert variables(GPU, tmp_path) == {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_COMPILE_THREADS": "8",
    }
    assert torch_config(GPU).backend == "nccl"
    assert torch_config(GPU).timeout_s == 1800
    assert run_config(GPU, tmp_path, 3).failure_config.max_failures == 3


def test_workers_that_compile_nothing_share_a_gpu_or_have_none(tmp_path: Path) -> None:
    assert set(variables(replace(GPU, compiles=False), tmp_path)) == {"PYTORCH_ALLOC_CONF"}
    assert set(variables(CPU, tmp_path)) == {"GLIBC_TUNABLES"}
    assert torch_config(CPU).backend == "gloo"
    assert torch_config(replace(GPU, gpus=0.5)).backend == "gloo"


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_set_goes_to_the_workers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator has two names: with either ours stays away."""
    monkeypatch.setenv(name, "1")
    found = variables(GPU, tmp_path)
    assert found[name] == "1"
    assert len({"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & found.keys()) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_memory_stays_with_a_worker_on_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faults(more: dict[str, str]) -> int:
        command = [sys.executable, "-c", TAKE_AND_GIVE_BACK]
        shown = subprocess.run(command, env=os.environ | more, check=True, stdout=subprocess.PIPE)
        return int(shown.stdout)

    assert faults(variables(CPU, tmp_path)) < 0.1 * faults({})
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    assert variables(CPU, tmp_path) == {"GLIBC_TUNABLES": "glibc.malloc.check=0"}


@pytest.mark.parametrize(("threads", "processes"), [(1, "1"), (32, "32"), (256, "32")])
def test_compile_processes(threads: int, processes: str, tmp_path: Path) -> None:
    """As many as the worker has CPUs, and no more than torch itself would start."""
    found = variables(replace(GPU, threads=threads), tmp_path)
    assert found["TORCHINDUCTOR_COMPILE_THREADS"] == processes


def test_they_arrive_in_a_worker(ray_cluster: None, tmp_path: Path) -> None:
    """A worker of Ray Train on a CPU, with the environment of one on a GPU."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    def told() -> dict[str, str]:
        """What the worker finds, and what torch made of it."""
        import torch

        settings = str(torch._C._accelerator_getAllocatorSettings())  # type: ignore[attr-defined]
        return {"torch": settings} | {k: os.environ[k] for k in names if k in os.environ}

    names = list(NAMES)
    result = TorchTrainer(
        told,
        scaling_config=ScalingConfig(num_workers=1),
        torch_config=torch_config(CPU),
        run_config=run_config(GPU, tmp_path / "start", 0),
    ).fit()
    expected = {"torch": "expandable_segments:True"} | variables(GPU, tmp_path)
    # a test that compiled before this Ray was started may have left its folder in there
    assert result.return_value is not None and expected.items() <= result.return_value.items()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in result.return_value
