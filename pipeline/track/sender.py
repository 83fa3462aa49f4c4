"""Sends the journal to MLflow: a thread beside the job, or `sync` when the job has ended.

The server may be slow or fail; training goes on, and the journal keeps what was not sent.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.track import journal
from pipeline.track.client import GivenUpError, NotReadyError, explain
from pipeline.track.endpoint import Endpoint, LocalServer, find_endpoint, links
from pipeline.track.mlflow_writer import Unsent, Writer, in_doubt, units, unsent
from pipeline.track.state import FolderLock, Known, State

log = logging.getLogger("pipeline.track")

INTERVAL_S = 1.0
LONGEST_WAIT_S = 60.0
LONGEST_WAIT_AT_CLOSE_S = 5.0
LONGEST_DOUBT_S = 300.0


class Sender(threading.Thread):
    """Sends the journal of one run folder, in order, from where the server acknowledged it.

    Several processes may have one for the same folder: whoever holds the folder's lock sends, the
    others wait for it. It is a daemon thread, so a process that dies never hangs on it; what was
    not sent is in the journal.

    Args:
        folder: the run folder.
        endpoint: where to send.
        key: see State; empty: from the folder, or new.
        runs: ids that another process was given, by stage.
        shown: what to call the run folder where something is to be sent later.
    """

    def __init__(
        self,
        folder: Path,
        endpoint: Endpoint,
        key: str = "",
        runs: dict[str, str] | None = None,
        shown: str = "",
    ) -> None:
        super().__init__(name="mlflow-sender", daemon=True)
        self.folder = folder
        self.shown = shown or _short(folder)
        self.path = folder / journal.FILE_NAME
        self.endpoint = endpoint
        self.state = State(folder, key)
        self._runs = {stage: run for stage, run in (runs or {}).items() if run}
        self._lock = FolderLock(folder)
        self._writer: Writer | None = None
        self._wake = threading.Event()
        self._closing = False
        self._given_up = False
        self._failures = 0
        self._greeted = ""
        self._first = True
        self._begin = self.path.stat().st_size if self.path.exists() else 0
        self._began = time.monotonic()
        self._decided = False

    @property
    def known(self) -> Known:
        """The server's entry in track.json."""
        return self.state.known(self.endpoint.id)

    def run(self) -> None:
        """Until close(): send what is new, wait, start again. Never raises."""
        while True:
            delay = INTERVAL_S
            closing = self._closing
            try:
                mine = self.take_over()  # otherwise another process sends
                done = not mine or (not self._held() and self.send_now())
                if closing and done:
                    break
            except Exception as error:
                delay = self._away(error)
            if self._given_up:
                break
            self._wake.wait(delay)
            self._wake.clear()
        self._lock.release()

    def wait_for(self, run: str, timeout: float) -> str:
        """The id of a run once it is made, or "" after the time or a failure."""
        deadline = time.monotonic() + timeout
        while not self.known.runs.get(run) and not self._failures:
            if time.monotonic() > deadline or self._held():
                break
            time.sleep(0.1)
        return self.known.runs.get(run, "")

    def close(self, timeout: float = 60.0) -> Unsent:
        """Sends what is left, for at most `timeout` seconds, and returns what is still there.

        Where another process sends for this folder, the rest is left to it.
        """
        self._closing = True
        self._wake.set()
        self.join(timeout)
        if not self.is_alive() and not self._given_up:
            return Unsent(0, 0)
        self._given_up = True  # after the call under way the thread leaves the folder to sync
        self._wake.set()
        left = unsent(self.path, self.known.sent)
        if left:
            log.warning("%s not sent; later: python jobs/sync.py %s", left, self.shown)
        return left

    def take_over(self, again: bool = False) -> bool:
        """Takes the folder's lock; False if another process has it.

        Args:
            again: forget what the server has and send from the beginning.
        """
        if not self._lock.acquire():
            return False
        if self._first:  # the former holder has written it meanwhile
            self.state = State(self.folder, self.state.key)
            if again:
                self.state.servers.pop(self.endpoint.id, None)
            self.known.runs = self._runs | self.known.runs
            self._first = False
        return True

    def release(self) -> None:
        """Gives the folder's lock back."""
        self._lock.release()

    def send_now(self) -> bool:
        """Sends all that is there; False if the server is still starting.

        Raises:
            Exception: the server did not take it; what it took is remembered.
        """
        if not self.path.exists() or self.path.stat().st_size <= self.known.sent:
            return True
        uri = self.endpoint.uri()
        if uri is None:
            return False
        if self._writer is None or uri != self.known.uri:
            self.known.uri = uri
            self._writer = Writer(uri, self.known, self.state.key, self.folder)
        for batch, end in units(self.path, self.known.sent):
            self._writer.apply(batch, end)
            self.known.sent = end
            self.state.save()
            if self._given_up:
                return False
            if batch and self._failures:
                self._back()
            if batch and batch[0]["run"] == "pipeline" and "open" in batch[0]:
                self._greet(batch[0]["open"]["experiment"])
        return True

    def _held(self) -> bool:
        """Whether to wait for a resume that would void rows of the process before this one."""
        if self._decided or self._closing or time.monotonic() > self._began + LONGEST_DOUBT_S:
            return False
        self._decided = not in_doubt(self.path, self.known.sent, self._begin)
        return not self._decided

    def _away(self, error: Exception) -> float:
        self._failures += 1
        if isinstance(error, GivenUpError):
            if self._failures == 1:
                text = "nothing is sent to MLflow: %s; the run goes on, %s keeps everything"
                log.warning(text, explain(error), _short(self.path))
            self._given_up |= self._closing
        elif self._failures == 1:
            what = "is not ready" if isinstance(error, NotReadyError) else "does not answer"
            log.warning(
                "MLflow at %s %s (%s); the run goes on, %s keeps everything",
                self.known.uri,
                what,
                explain(error),
                _short(self.path),
            )
        longest = LONGEST_WAIT_AT_CLOSE_S if self._closing else LONGEST_WAIT_S
        return min(INTERVAL_S * 2.0 ** min(self._failures, 10), longest)

    def _greet(self, experiment: str) -> None:
        known = self.known
        run_id = known.runs.get("pipeline", "")
        if run_id == self._greeted:  # a journal has a line for each start of the job
            return
        self._greeted = run_id
        lines = links(known.uri, experiment, known.experiment_id, run_id)
        for line in lines[1:] or lines:  # the address of the server is in the others
            log.info("%s", line)

    def _back(self) -> None:
        log.warning("MLflow at %s answers again after %d tries", self.known.uri, self._failures)
        self._failures = 0


def _short(path: Path) -> str:
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


# ---- What is still in a journal when its job has ended.


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
    for _, event in journal.read(path):
        if "open" in event:
            opened[event["run"]] = True
        elif "end" in event:
            opened[event["run"]] = False
    lines = journal.Journal(path)
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
