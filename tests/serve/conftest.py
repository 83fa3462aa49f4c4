"""The set of shapes, and the application over it, in this process: without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from pipeline.embed.embedders import embedder_of, open_embedder
from pipeline.serve.app import Site, build_app
from pipeline.serve.deployment import facts_of
from pipeline.serve.intake import Limits, Pixels
from pipeline.serve.looks import drawn
from pipeline.serve.opening import checked, opened
from pipeline.serve.token import Gate
from tests.serve.browser import chromium
from tests.serve.made import Made, make

TOKEN = "a-token-of-the-tests"
PORT = 8123


class LocalModel:
    """The model in this process, one image at a time."""

    def __init__(self, model: str) -> None:
        self.embedder = open_embedder(embedder_of(model))
        self.facts = facts_of(self.embedder)
        self.prepare = self.embedder.prepare

    async def embed(self, image: np.ndarray[Any, Any], want: str) -> np.ndarray[Any, Any]:
        return self.embedder.outputs([image], (want,))[want][0]

    async def look(self, image: np.ndarray[Any, Any], what: str) -> np.ndarray[Any, Any]:
        return drawn(self.embedder, image, what)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def site(made: Made) -> Site:
    served = checked(made.model, made.vectors)
    assert served.vectors is not None
    return Site(
        gate=Gate(TOKEN, PORT),
        limits=Limits(max_bytes=200_000, max_pixels=1_000_000, max_k=50, timeout_s=5),
        queue=4,
        pixels=Pixels(),
        collection=opened(served.vectors),
        model=LocalModel(made.model),
    )


@pytest.fixture
def client(site: Site) -> Iterator[TestClient]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with TestClient(build_app(site), headers=headers, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")  # it holds this thread's event loop: one at a time
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started
