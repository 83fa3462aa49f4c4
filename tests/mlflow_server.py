"""Waiting for the local MLflow server; jobs never do."""

from __future__ import annotations

import time
from pathlib import Path

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
