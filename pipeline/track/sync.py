"""Sends what the journal of a run folder still holds, after the job has ended."""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.track import journal
from pipeline.track.client import GivenUpError, explain
from pipeline.track.endpoint import Endpoint, LocalServer, find_endpoint
from pipeline.track.journal import Journal, read
from pipeline.track.sender import Sender
from pipeline.track.writer import Unsent, unsent


def sync(
    folder: Path,
    uri: str = "",
    server_folder: Path | None = None,
    again: bool = False,
    timeout: float = 600.0,
) -> Unsent:
    """Sends the rest of a journal, makes the runs if need be, and returns what was sent.

    Runs that were left open by a job that died are ended as KILLED.

    Args:
        folder: the run folder.
        uri: server; "" = MLFLOW_TRACKING_URI or the local one.
        server_folder: where the local server keeps its data; default: beside the run folder.
        again: from the beginning, e.g. for a server that was set up anew. Metrics do not double.
        timeout: seconds without progress after which it gives up.

    Raises:
        PipelineError: nothing there to send, no server, or a job is sending this folder now.
    """
    folder = folder.absolute()
    path = folder / journal.FILE_NAME
    if not path.exists():
        raise PipelineError(f"no {journal.FILE_NAME} in {folder}", "give the folder of a run")
    where = find_endpoint(uri, server_folder or folder.parent / "mlflow")
    if where is None:
        raise PipelineError("no server to send to", "set MLFLOW_TRACKING_URI=http://HOST:5000")
    _wait_ready(where, timeout)
    sender = Sender(folder, where)
    deadline = time.monotonic() + 15.0  # a job that has just given up may be in its last call
    while not sender.take_over(again):
        if time.monotonic() > deadline:
            hint = "wait for it, or end it, and try again"
            raise PipelineError(f"a job is sending {folder} already", hint)
        time.sleep(0.2)
    end_stale(path)
    waiting = unsent(path, sender.known.sent)
    try:
        sender.send_now()
    except Exception as error:
        left = unsent(path, sender.known.sent)
        raise PipelineError(
            f"{left} not sent: {explain(error)}", "run the same command again; nothing is lost"
        ) from error
    finally:
        sender.release()
    return waiting


def end_stale(path: Path) -> None:
    """Writes the end of the runs whose process died before it could."""
    opened: dict[str, bool] = {}
    for _, event in read(path):
        if "open" in event:
            opened[event["run"]] = True
        elif "end" in event:
            opened[event["run"]] = False
    lines = Journal(path)
    for run in reversed([run for run, still in opened.items() if still]):
        lines.append(run, end="KILLED")
    lines.close()


def _uri(where: Endpoint) -> str | None:
    try:
        return where.uri()
    except GivenUpError as error:
        raise PipelineError(str(error)) from None


def _wait_ready(where: Endpoint, timeout: float) -> None:
    deadline = time.monotonic() + min(timeout, 120.0)
    while _uri(where) is None:
        if time.monotonic() > deadline:
            hint = f"see {where.folder / 'server.log'}" if isinstance(where, LocalServer) else ""
            raise PipelineError("the local MLflow server does not answer", hint)
        time.sleep(0.3)
