"""A wire to the MLflow server that can be cut."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.mlflow_server import TestServer, free_port

# Before anything imports mlflow: what the client reads at call time.
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "60"  # a loaded machine needs more than our 5


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
