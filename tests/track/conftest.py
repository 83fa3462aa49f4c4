"""A real MLflow server for the tests of this folder, and a wire to it that can be cut."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.track import server
from tests.mlflow_server import answering

# Before anything imports mlflow: what the client reads at call time.
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"


class TestServer:
    __test__ = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info = server.start(folder, free_port())
        self._client: Any = None

    @property
    def uri(self) -> str:
        return answering(self.folder)

    @property
    def client(self) -> Any:
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(self.uri)
        return self._client

    def kill(self) -> None:
        """SIGKILL to the server's own process group, as a crash or the memory killer does."""
        os.killpg(self.info.pid, signal.SIGKILL)

    def restart(self) -> None:
        self.info = server.start(self.folder, self.info.port)

    def points(self, run_id: str, name: str) -> list[tuple[int, float]]:
        return sorted((m.step, m.value) for m in self.client.get_metric_history(run_id, name))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def started_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestServer]:
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
    assert started_server.uri
    return started_server


class Wire:
    """A TCP proxy: `open` passes bytes, `cut` refuses, `lossy` passes requests, no answers."""

    def __init__(self, target: int) -> None:
        self.target, self.port, self.mode = target, free_port(), "cut"
        self.lost_answers = 0
        self._listener: socket.socket | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def set(self, mode: str) -> None:
        self.mode = mode
        if mode == "cut" and self._listener:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        elif mode != "cut" and self._listener is None:
            self._listener = socket.socket()
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind(("127.0.0.1", self.port))
            self._listener.listen(16)
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            for source, sink, answer in ((near, far, False), (far, near, True)):
                threading.Thread(
                    target=self._pass, args=(source, sink, answer), daemon=True
                ).start()

    def _pass(self, source: socket.socket, sink: socket.socket, answer: bool) -> None:
        try:
            while (data := source.recv(65536)) and self.mode != "cut":
                if answer and self.mode == "lossy":
                    self.lost_answers += 1
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def wire(mlflow_server: TestServer) -> Iterator[Wire]:
    line = Wire(mlflow_server.info.port)
    yield line
    line.set("cut")
