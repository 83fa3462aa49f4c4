"""Fixtures for all tests: the shared data where it is there, and one small Ray cluster."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

from pipeline.storage import places as storage
from pipeline.track import server
from tests import standins
from tests.mlflow_server import TestServer
from tests.s3 import S3, serving

os.environ.setdefault("OMP_NUM_THREADS", "1")
# No example fails for the time that it took. All else is as it was: Hypothesis has its own for CI.
settings.register_profile("no deadline", settings(), deadline=None)
settings.load_profile("no deadline")
TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"
JOB_FOLDERS = {"jobs", "cluster"}
# Each starts a Ray, a server or a browser, which takes ten seconds or more.
JOB_FIXTURES = {"ray_cluster", "mlflow_server", "guarded", "browser", "endpoint"}


@pytest.hookimpl(tryfirst=True)  # before pytest picks by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as `jobs` what starts a Ray, a job or a server, except the tests of the chain."""
    for item in items:
        if item.get_closest_marker("chain"):
            continue
        folder = item.path.relative_to(TESTS).parts[0]
        fixtures = set(getattr(item, "fixturenames", []))
        if folder in JOB_FOLDERS or fixtures & JOB_FIXTURES:
            item.add_marker(pytest.mark.jobs)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden values and real images; tests that need it skip elsewhere."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (golden values and real images), which is not here")
    return SHARED


@pytest.fixture(autouse=True)
def each_test_configures_its_own_log() -> Iterator[None]:
    """Puts the log back that a job configures, so that `caplog` hears each record once."""
    logger = logging.getLogger("pipeline")
    before = (
        logger.handlers[:],
        logger.level,
        logger.propagate,
        sys.excepthook,
        threading.excepthook,
    )
    yield
    logger.handlers[:], logger.level, logger.propagate = before[:3]
    sys.excepthook, threading.excepthook = before[3:]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """An S3 server on loopback, shared by the tests, each of which makes its own bucket."""
    with serving() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The server, with its keys in the environment; faults and key checks end with the test."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    storage._filesystem.cache_clear()  # clients keep the environment that they were made in
    s3_server.requests.clear()
    yield s3_server
    s3_server.check_keys = False
    s3_server.faults.clear()
    storage._filesystem.cache_clear()


@pytest.fixture
def tasks_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack and curation run their tasks in this process."""
    standins.tasks_here(monkeypatch)


@pytest.fixture(scope="session")
def started_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestServer]:
    """One MLflow server for the test session, on its way."""
    handle = TestServer(tmp_path_factory.mktemp("mlflow"))
    yield handle
    server.stop(handle.folder)


@pytest.fixture(scope="session", autouse=True)
def _start_early(request: pytest.FixtureRequest) -> None:
    """The server needs 15 s to start; the tests that do not need it run meanwhile."""
    if any("mlflow_server" in getattr(x, "fixturenames", []) for x in request.session.items):
        request.getfixturevalue("started_server")


@pytest.fixture
def mlflow_server(started_server: TestServer) -> TestServer:
    """The server, which answers."""
    assert started_server.uri
    return started_server


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster for the test session, on free ports, in a short temp dir, ended with it."""
    from pipeline.driver.cluster import _until_started, quiet_environment

    quiet_environment()
    import ray

    # Unix socket paths are limited to 107 bytes, so Ray's folder must be short.
    folder = tempfile.mkdtemp(prefix="rd", dir="/tmp" if Path("/tmp").is_dir() else None)
    start = partial(
        ray.init,
        num_cpus=2,
        object_store_memory=512 * 2**20,
        _temp_dir=folder,
        include_dashboard=False,
        logging_level="error",
        log_to_driver=bool(os.environ.get("PIPELINE_DEBUG")),
    )
    _until_started(start)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
