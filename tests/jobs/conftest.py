"""Jobs as a user starts them: as processes, on a recipe and images small enough for seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny import write_tiny

ROOT = Path(__file__).parents[2]
Job = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train/` with 80 images of two classes, a copy and a broken file, and `test/` with 20."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for label, name in enumerate(("red", "green")):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (24, 24, 3), np.uint8)
                pixels[..., 1 - label] //= 4
                Image.fromarray(pixels).save(place / f"{i:02d}.png")
    shutil.copy(folder / "train" / "red" / "00.png", folder / "train" / "red" / "copy.png")
    (folder / "train" / "red" / "broken.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe called tiny."""
    return write_tiny(
        tmp_path_factory.mktemp("recipes") / "tiny.yaml",
        data={"max_bad_fraction": 0.05},
        resources={"cpus": 2, "object_store_gb": 0.2},
    )


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """What a job finds: one thread, no cluster and no server but its own."""
    gone = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "PIPELINE_DEBUG", "PYTHONPATH"}
    return {k: v for k, v in os.environ.items() if k not in gone} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def without_ray(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Runs a job where importing Ray is an error: it can only pass if it needs none."""
    trap = tmp_path_factory.mktemp("trap")
    (trap / "ray").mkdir()
    (trap / "ray" / "__init__.py").write_text("raise RuntimeError('this job needs no Ray')\n")
    return runner(environment | {"PYTHONPATH": str(trap)})


@pytest.fixture(scope="session")
def alone(environment: dict[str, str]) -> Job:
    """Runs a job that starts and ends a Ray of its own."""
    return runner(environment)


@pytest.fixture(scope="session")
def cluster_environment(ray_cluster: None, environment: dict[str, str]) -> dict[str, str]:
    """As a job sees it that is submitted to the tests' cluster."""
    import ray

    # what starting the cluster has set (its token); `environment` may be older than that
    started = {k: v for k, v in os.environ.items() if k.startswith("RAY_")}
    return environment | started | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def runner(environment: dict[str, str]) -> Job:
    """Runs `jobs/<name>.py` with arguments, to its end."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, ROOT / "jobs" / f"{name}.py", *map(str, arguments)],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run
