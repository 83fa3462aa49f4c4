"""A local MLflow server for people who did not set one up: loopback, sqlite, shared by all jobs.

It is started in the background (its start takes 10 to 50 s), outlives the job, and is found again
by the next one through `server.json` beside the database.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from pipeline.errors import PipelineError
from pipeline.track.state import FolderLock, atomic_write

log = logging.getLogger("pipeline.track")

HOST = "127.0.0.1"
FIRST_PORT = 5000
# A group of its own, so that Ctrl-C and the job's end do not reach the server; and a parent that
# ends at once, since `ray job stop` signals all that is below the job.
LAUNCHER = """
import subprocess, sys
none = subprocess.DEVNULL
server = subprocess.Popen(
    sys.argv[1:], stdin=none, stdout=sys.stderr, stderr=sys.stderr, start_new_session=True
)
print(server.pid)
"""


@dataclass(frozen=True)
class Running:
    """The contents of server.json; `created` tells our process from a later one with its pid."""

    pid: int
    created: float
    port: int
    uri: str


def healthy(uri: str, timeout: float = 2.0) -> bool:
    """Whether an MLflow server answers at this address."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{uri}/health", timeout=timeout) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def running(folder: Path) -> Running | None:
    """The server of this folder if its process lives, whether or not it answers yet."""
    import psutil

    try:
        server = Running(**json.loads((folder / "server.json").read_text()))
        process = psutil.Process(server.pid)
        ours = abs(process.create_time() - server.created) < 1.0
        return server if ours and process.status() != psutil.STATUS_ZOMBIE else None
    except (OSError, ValueError, TypeError, psutil.Error):
        return None


def _log_file(path: Path) -> IO[bytes]:
    """The server's log, emptied, never through a link: that may lead to a file of someone's.

    Raises:
        PipelineError: it cannot be written.
    """
    how = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.fdopen(os.open(path, how, 0o666), "wb")
    except OSError as error:
        raise PipelineError(
            f"{path} cannot be written: {error.strerror}",
            "take that file, folder or link away, or set run.folder to another folder",
        ) from error


def start(folder: Path, first_port: int = FIRST_PORT) -> Running:
    """Starts the server of this folder unless it runs, and returns without waiting for it."""
    import psutil

    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder, ".server.lock")
    lock.acquire(wait=True)
    try:
        if known := running(folder):
            return known
        port = _free_port(first_port)
        command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
        command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--workers", "1"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        command += ["--uvicorn-opts", "--log-level warning"]
        with _log_file(folder / "server.log") as output:
            launched = subprocess.run(
                [sys.executable, "-I", "-S", "-c", LAUNCHER, *command],
                cwd=folder,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                check=True,
            )
        pid = int(launched.stdout)
        created = psutil.Process(pid).create_time()
        server = Running(pid, created, port, f"http://{HOST}:{port}")
        atomic_write(folder / "server.json", json.dumps(asdict(server)).encode())
        log.info("tracking    starting MLflow at %s (data in %s)", server.uri, folder)
        return server
    finally:
        lock.release()


def stop(folder: Path, timeout: float = 10.0) -> bool:
    """Ends the server of this folder; False if none ran."""
    import psutil

    server = running(folder.absolute())
    if server is None:
        return False
    psutil.Process(server.pid).terminate()
    deadline = time.monotonic() + timeout
    while not (gone := running(folder.absolute()) is None) and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # what it left in its group
        os.killpg(server.pid, signal.SIGTERM if gone else signal.SIGKILL)
    (folder / "server.json").unlink(missing_ok=True)
    return True


def _free_port(first: int) -> int:
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise PipelineError(f"no free port from {first} to {first + 99} for MLflow", "set track.uri")


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.lstrip("_").startswith("MLFLOW_")}
    # Job execution, which nothing here uses, adds 6 processes and 1.8 GB.
    kept["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    kept["MLFLOW_DISABLE_TELEMETRY"] = "true"
    return kept


# ---- SQLite databases of MLflow: whether the installed MLflow made them.


_REVISION = re.compile(r"^(down_)?revision[^=]*= *[\"'](\w+)[\"']", re.MULTILINE)


def mismatch(path: Path) -> str:
    """What is wrong with a database and what to do; empty where nothing is, or it is not there.

    MLflow itself notices after a start of many seconds, in a log.
    """
    try:
        version = _version(path)
    except sqlite3.DatabaseError:
        return f"{path} is no SQLite database: give another file"
    newest, known = _revisions()
    if not version or not newest or version == newest:
        return ""
    if version in known:
        return (
            f"the database {path} is of an older MLflow: make a copy of it, then run "
            f"`mlflow db upgrade sqlite:///{path}`"
        )
    return (
        f"the database {path} is of a newer MLflow than the installed one: install that, or "
        "give another database"
    )


def _version(path: Path) -> str:
    """The migration that a database has seen last; empty where it has none or is busy.

    Raises:
        sqlite3.DatabaseError: it is none.
    """
    if not path.is_file():
        return ""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as opened:
            rows = opened.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.OperationalError:
        return ""
    return str(rows[0][0]) if rows else ""


@cache
def _revisions() -> tuple[str, frozenset[str]]:
    """The newest migration of the installed MLflow, and all that it knows."""
    spec = find_spec("mlflow")
    if spec is None or not spec.submodule_search_locations:
        return "", frozenset()
    folder = Path(spec.submodule_search_locations[0]) / "store" / "db_migrations" / "versions"
    revisions: set[str] = set()
    parents: set[str] = set()
    for script in folder.glob("*.py"):
        for down, name in _REVISION.findall(script.read_text(encoding="utf-8")):
            (parents if down else revisions).add(name)
    newest = revisions - parents
    return (newest.pop() if len(newest) == 1 else ""), frozenset(revisions)


def artifact_folder(uri: str) -> str | None:
    """Where the files of new experiments in a database go: beside it, not where the job runs."""
    if not uri.startswith("sqlite") or os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT"):
        return None
    return str(path_of(uri).parent / "mlartifacts")


def path_of(uri: str) -> Path:
    """The file of `sqlite:///FILE?…`."""
    return Path(uri.partition(":///")[2].partition("?")[0])
