"""The MLflow server of the tests: one for the session, which a test may kill and start again."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from pipeline.track import server


def answering(folder: Path, timeout: float = 120.0) -> str:
    """The address of the server of a folder, once it answers.

    Raises:
        AssertionError: it ended or is silent; with what it said.
    """
    deadline = time.monotonic() + timeout
    while found := server.running(folder.absolute()):
        if server.healthy(found.uri):
            return found.uri
        if time.monotonic() > deadline:
            break
        time.sleep(0.3)
    log = folder / "server.log"
    raise AssertionError(log.read_text() if log.exists() else f"no server in {folder}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
        """On the same port and data."""
        self.info = server.start(self.folder, self.info.port)
        assert self.uri

    def runs(self, experiment: str, name: str) -> dict[str, Any]:
        """The MLflow runs of a run of ours, by stage; each exists once."""
        folder = self.client.get_experiment_by_name(experiment)
        runs = self.client.search_runs([folder.experiment_id], f"tags.`pipeline.name` = '{name}'")
        assert len({run.data.tags["stage"] for run in runs}) == len(runs)
        return {run.data.tags["stage"]: run for run in runs}

    def points(self, run_id: str, name: str) -> list[tuple[int, float]]:
        return sorted((m.step, m.value) for m in self.client.get_metric_history(run_id, name))
