"""Fixtures for all tests: the shared data where it is there, and one small Ray cluster."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden values and real images; tests that need it skip elsewhere."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (golden values and real images), which is not here")
    return SHARED


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster for the test session, on free ports, in a short temp dir, ended with it."""
    from pipeline.cluster import quiet_environment

    quiet_environment()
    import ray

    # Unix socket paths are limited to 107 bytes, so Ray's folder must be short.
    folder = tempfile.mkdtemp(prefix="rd", dir="/tmp" if Path("/tmp").is_dir() else None)
    ray.init(
        num_cpus=2,
        object_store_memory=512 * 2**20,
        _temp_dir=folder,
        include_dashboard=False,
        logging_level="error",
        log_to_driver=bool(os.environ.get("PIPELINE_DEBUG")),
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
