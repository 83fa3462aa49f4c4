"""Where MLflow is: a server that somebody runs, the local one, or none."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from pipeline.errors import PipelineError
from pipeline.track import server
from pipeline.uri import public

log = logging.getLogger("pipeline.track")

JOURNAL_ONLY = "none"
LOCAL = "local"


class Endpoint(Protocol):
    """Where MLflow is. `id` names it in the run folder; `uri` is None while it is not ready."""

    @property
    def id(self) -> str:
        """The name under which the run folder keeps what this server knows."""

    def uri(self) -> str | None:
        """The address to send to now, or None."""


@dataclass(frozen=True)
class Remote:
    """A server that somebody runs."""

    id: str

    def uri(self) -> str | None:
        """The address as it was given."""
        return self.id


class LocalServer:
    """The server of a folder, started when it is asked for and not there, a few times at most."""

    def __init__(self, folder: Path, starts: int = 3) -> None:
        self.folder = folder.absolute()
        self.id = f"local:{self.folder}"
        self._starts = starts

    def uri(self) -> str | None:
        """The address once the server answers; starts it if it does not run."""
        found = server.running(self.folder)
        if found is None:
            if self._starts > 0:
                self._starts -= 1
                server.start(self.folder)
            elif self._starts == 0:
                self._starts = -1
                log.warning("MLflow does not start; see %s", self.folder / "server.log")
            return None
        return found.uri if server.healthy(found.uri) else None


def hide_credentials() -> None:
    """Takes user and password out of MLFLOW_TRACKING_URI into the variables that MLflow's client
    has for them: the address is written into the run folder and shown in links.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if public(uri) == uri:
        return
    given = urlsplit(uri)
    os.environ["MLFLOW_TRACKING_URI"] = public(uri)
    for name, value in (("USERNAME", given.username), ("PASSWORD", given.password)):
        os.environ.setdefault(f"MLFLOW_TRACKING_{name}", unquote(value or ""))


def find_endpoint(uri: str, folder: Path, nodes: int = 1) -> Endpoint | None:
    """Where to send: `uri`, else MLFLOW_TRACKING_URI, else the local server; None for the journal.

    Args:
        uri: an address, "local", or "none" (the journal only).
        folder: where the local server keeps its data.
        nodes: nodes of the Ray cluster; with several of them loopback would be the wrong machine.

    Raises:
        PipelineError: the address is not one of a server.
    """
    hide_credentials()
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri == JOURNAL_ONLY:
        return None
    if uri == LOCAL:
        return LocalServer(folder)
    if uri:
        if public(uri) != uri:
            raise PipelineError(
                f"MLflow address {uri} has a password in it",
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead",
            )
        if not uri.startswith(("http://", "https://", "databricks")):
            raise PipelineError(
                f"MLflow address {uri!r} is not a server",
                "start one and give its address: track.uri=http://HOST:5000 (see docs/tracking.md)",
            )
        return Remote(uri.rstrip("/"))
    if nodes > 1:
        log.warning(
            "this Ray cluster has %d nodes, so MLflow must be reachable from all of them: set "
            "MLFLOW_TRACKING_URI=http://HOST:5000; until then metrics stay in the run folder",
            nodes,
        )
        return None
    return LocalServer(folder)


def links(uri: str, experiment: str, experiment_id: str, run_id: str) -> list[str]:
    """The lines that a job prints: server, this run, charts of the experiment.

    The query part opens MLflow's page for model training; without it a new browser shows the one
    for language models.
    """
    if not (uri and experiment_id and run_id):
        return [f"tracking   {uri or 'MLflow is starting'}  experiment {experiment}"]
    kind, page = "workflowType=machine_learning", f"{uri}/#/experiments/{experiment_id}/runs"
    return [
        f"tracking   {uri}  experiment {experiment}",
        f"run        {page}/{run_id}?{kind}",
        f"charts     {page}?{kind}&compareRunsMode=CHART",
    ]
