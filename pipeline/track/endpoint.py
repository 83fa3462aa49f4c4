"""Where MLflow is: a server that somebody runs, the local one, or none."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from pipeline.errors import PipelineError
from pipeline.track import server
from pipeline.track.client import GivenUpError
from pipeline.track.pages.charts import KEY
from pipeline.uri import has_secret, public_address, split_user

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
        known = server.running(self.folder)
        if known is None:
            if said := server.mismatch(self.folder / "mlflow.db"):
                raise GivenUpError(said)
            if self._starts > 0:
                self._starts -= 1
                server.start(self.folder)
            elif self._starts == 0:
                self._starts = -1
                log.warning("MLflow does not start; see %s", self.folder / "server.log")
            return None
        return known.uri if server.healthy(known.uri) else None


@dataclass(frozen=True)
class Database:
    """A database or folder of MLflow on this machine, which needs no server."""

    id: str

    @classmethod
    def of(cls, field: str, uri: str) -> Database:
        """An SQLite file.

        Raises:
            PipelineError: it cannot be one.
        """
        name, _, query = uri.partition("?")
        path = name.partition(":///")[2]
        if not path or path.startswith(":memory:"):
            raise PipelineError(
                f"{field}={uri} names no file", f"write {field}=sqlite:////folder/mlflow.db"
            )
        place = Path(path).absolute()
        if not os.access(place if place.exists() else place.parent, os.W_OK):
            raise PipelineError(
                f"{field}={uri}: {place} cannot be written",
                "an SQLite database needs a folder that is there and that this user may write in",
            )
        return cls(f"sqlite:///{place}" + (f"?{query}" if query else ""))

    @classmethod
    def of_files(cls, field: str, uri: str) -> Database:
        """A folder of files, where MLflow still allows that.

        Raises:
            PipelineError: it does not.
        """
        path = unquote(urlsplit(uri).path) if uri.lower().startswith("file:") else uri
        if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
            raise PipelineError(
                f"{field}={uri} is not a server, and MLflow no longer writes into folders",
                f"give a database, {field}=sqlite:///{Path(path).absolute()}/mlflow.db, a server, "
                f"http://HOST:5000, or set MLFLOW_ALLOW_FILE_STORE=true",
            )
        return cls(f"file://{Path(path).absolute()}")

    def uri(self) -> str | None:
        """The address.

        Raises:
            GivenUpError: another version of MLflow made the database.
        """
        path = server.path_of(self.id)
        if self.id.startswith("sqlite") and (said := server.mismatch(path)):
            raise GivenUpError(said)
        return self.id


def hide_credentials() -> None:
    """Takes user and password out of MLFLOW_TRACKING_URI into the variables that MLflow's client
    has for them: the address is written into the run folder and shown in links.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri.lower().startswith(("http://", "https://")):
        return
    user, password, os.environ["MLFLOW_TRACKING_URI"] = split_user(uri)
    for name, value in (("USERNAME", user), ("PASSWORD", password)):
        if value:
            os.environ.setdefault(f"MLFLOW_TRACKING_{name}", value)


def find_endpoint(uri: str, folder: Path, nodes: int = 1) -> Endpoint | None:
    """Where to send: `uri`, else MLFLOW_TRACKING_URI, else the local server; None for the journal.

    Args:
        uri: an address, "local", or "none" (the journal only).
        folder: where the local server keeps its data.
        nodes: nodes of the Ray cluster; with several of them loopback would be the wrong machine.

    Raises:
        PipelineError: the address is not one of a server or of a database on this machine.
    """
    hide_credentials()
    field = "track.uri" if uri else "MLFLOW_TRACKING_URI"
    uri = (uri or os.environ.get("MLFLOW_TRACKING_URI", "")).strip()
    if uri == JOURNAL_ONLY:
        return None
    if uri == LOCAL:
        return LocalServer(folder)
    if uri:
        _refuse_secrets(field, uri)
        return _endpoint_of(field, uri)
    if nodes > 1:
        log.warning(
            "this Ray cluster has %d nodes, so MLflow must be reachable from all of them: set "
            "MLFLOW_TRACKING_URI=http://HOST:5000; until then metrics stay in the run folder",
            nodes,
        )
        return None
    return LocalServer(folder)


def _refuse_secrets(field: str, uri: str) -> None:
    if has_secret(uri) or ("@" in uri and "://" not in uri):
        shown = f"{field}={public_address(uri)}" if "://" in uri else field
        raise PipelineError(
            f"{shown} has what may be a password or a key in it",
            "give the address alone, http://HOST:5000, and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        )


def _endpoint_of(field: str, uri: str) -> Endpoint:
    scheme, colon, _ = uri.partition(":")
    kind = scheme.lower() if colon else ""
    if kind in ("http", "https"):
        return Remote(f"{kind}:{uri.partition(':')[2]}".rstrip("/"))
    if uri.startswith("databricks"):
        return Remote(uri)
    if kind.partition("+")[0] == "sqlite":
        return Database.of(field, uri)
    if re.fullmatch(r"[\w.-]+:\d+/?", uri):
        raise PipelineError(f"{field}={uri} is no address", f"did you mean http://{uri}?")
    if kind == "file" or "://" not in uri:
        return Database.of_files(field, uri)
    raise PipelineError(
        f"{field}={uri} is not a server",
        f"start one (`mlflow server`, which takes {kind}:// as --backend-store-uri) and give its "
        "address: track.uri=http://HOST:5000 (see docs/tracking.md)",
    )


def links(uri: str, experiment: str, experiment_id: str, run_id: str) -> list[str]:
    """The lines that a job prints: server, this run, charts of the experiment.

    The query part opens MLflow's page for model training; without it a new browser shows the one
    for language models. That of the charts arranges them as `pages.charts` says.
    """
    if uri.startswith(("sqlite", "file")):
        look = f"mlflow ui --backend-store-uri {uri}"
        return [f"tracking    {uri}  experiment {experiment}; to look at it: {look}"]
    if not (uri and experiment_id and run_id):
        return [f"tracking    {uri or 'MLflow is starting'}  experiment {experiment}"]
    kind, page = "workflowType=machine_learning", f"{uri}/#/experiments/{experiment_id}/runs"
    return [
        f"tracking    {uri}  experiment {experiment}",
        f"mlflow      {page}/{run_id}?{kind}",
        f"charts      {page}?{kind}&compareRunsMode=CHART&viewStateShareKey={KEY}",
    ]
