"""Messages between driver and workers: lines for the console, reports, requests.

Ray can copy workers' output to the driver, but with a prefix on each line and with everything that
other libraries print. The step lines are the face of a run, so they travel on their own.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from pipeline.heartbeat import HEART, PROGRESS

T = TypeVar("T")
STOP, MOVE, SAVE = "stop", "move", "save"


@dataclass
class Ending:
    """The signal that asked this driver to end, while it goes on for a while; 0: none did."""

    number: int = 0


ENDING = Ending()


class Said(NamedTuple):
    """A line of a worker's log."""

    level: int
    line: str
    left_s: float | None = None  # seconds until the stage is over, where they are known


@dataclass(frozen=True)
class Report:
    """A call of a tracker's method. An actor with several threads does not keep the order of calls,
    so the reports of one worker (`source`) are numbered.
    """

    source: str
    number: int
    method: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Mailbox:
    """Base of the actor beside the driver; its methods are called from driver and workers.

    A request is for the workers, at the end of a step: `stop` (write a checkpoint and end), `move`
    (write one and wait to be taken away) or `save` (write one and go on). `stop` is for good; of
    the others the last one counts.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._request, self._saved, self._acknowledged = "", -1, -1
        self._lines: queue.SimpleQueue[Said] = queue.SimpleQueue()
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()

    def stop(self) -> None:
        """Asks the workers to write a checkpoint and end."""
        self.request(STOP)

    def request(self, request: str) -> None:
        """Asks something of the workers; "" takes an earlier request back, unless it was `stop`."""
        with self._changed:
            if self._request != STOP:
                self._request, self._acknowledged = request, -1
            self._changed.notify_all()

    def wait_request(self, timeout: float = 30.0) -> str:
        """What is requested, or "" after `timeout` seconds without a request.

        The wait has an end so that a worker group that died leaves no thread behind.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._request, timeout)
            return self._request

    def acknowledge(self, request: str, step: int) -> bool:
        """A worker's word that a request has been done at a step. False: it was taken back."""
        with self._changed:
            current = bool(request) and request == self._request
            if current and request != STOP:
                self._request, self._acknowledged = "", step
            return current

    def acknowledged(self) -> int:
        """The step at which the last request was done; -1 while it is not."""
        with self._changed:
            return self._acknowledged

    def note_saved(self, step: int) -> None:
        """A worker's word that there is a checkpoint of a step."""
        with self._changed:
            self._saved = max(self._saved, step)

    def saved(self) -> int:
        """The step of the newest checkpoint that was written in this start of the job; or -1."""
        with self._changed:
            return self._saved

    def say(self, level: int, line: str, left_s: float | None = None) -> None:
        """A worker's log line for the driver's console, and seconds until its stage is over."""
        self._lines.put(Said(level, line, left_s))

    def listen(self, timeout: float = 2.0) -> list[Said]:
        """The lines said since the last call; waits up to `timeout` seconds for one."""
        return _taken(self._lines, timeout)

    def report(self, report: Report) -> None:
        """A worker's report for the driver's tracker."""
        self._reports.put(report)

    def reports(self, timeout: float = 2.0) -> list[Report]:
        """The reports since the last call; waits up to `timeout` seconds for one."""
        return _taken(self._reports, timeout)


def _taken(waiting: queue.SimpleQueue[T], timeout: float) -> list[T]:
    messages: list[T] = []
    try:
        messages.append(waiting.get(timeout=timeout))
        while True:
            messages.append(waiting.get_nowait())
    except queue.Empty:
        return messages


class RemoteLines(logging.Handler):
    """Sends a worker's log records to the driver's console."""

    def __init__(self, mailbox: Any) -> None:
        super().__init__()
        self.mailbox = mailbox

    def emit(self, record: logging.LogRecord) -> None:
        """Hands the line on; does not wait."""
        left_s = getattr(record, "left_s", None)
        self.mailbox.say.remote(record.levelno, self.format(record), left_s)


class Reports:
    """A worker's side of `reporting`: hands calls on, numbered, and knows when all have arrived."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox
        self.source, self.number = os.urandom(6).hex(), 0
        self.lock = threading.Lock()
        self.under_way: list[Any] = []

    def send(self, method: str, *arguments: Any, **options: Any) -> None:
        """Hands a call on; does not wait."""
        import ray

        with self.lock:
            report = Report(self.source, self.number, method, arguments, options)
            self.number += 1
            self.under_way.append(self.mailbox.report.remote(report))
            if len(self.under_way) > 100:
                _, self.under_way = ray.wait(
                    self.under_way, num_returns=len(self.under_way), timeout=0
                )

    def wait(self, timeout: float) -> None:
        """Waits until all calls are with the driver's side, for at most `timeout` seconds."""
        import ray

        with self.lock:
            ray.wait(self.under_way, num_returns=len(self.under_way), timeout=timeout)


class InOrder:
    """Makes the reported calls on a tracker, in the order in which each worker reported them.

    Reports of a worker from which another one has taken over come too late and are dropped: the new
    one has said from which step on the old rows are void.
    """

    def __init__(self, tracker: Any) -> None:
        self.tracker = tracker
        self.source, self.next = "", 0
        self.gone: set[str] = set()
        self.held: dict[int, Report] = {}

    def take(self, reports: list[Report]) -> None:
        """Makes the calls whose turn it is; keeps those that overtook another one."""
        for report in reports:
            if report.source in self.gone:
                continue
            if report.source != self.source:
                self.finish()
                self.gone.add(self.source)
                self.source, self.next = report.source, 0
            self.held[report.number] = report
            while self.next in self.held:
                self._make(self.held.pop(self.next))
                self.next += 1

    def finish(self) -> None:
        """Makes the calls that wait for one that never came."""
        for number in sorted(self.held):
            self._make(self.held.pop(number))

    def _make(self, report: Report) -> None:
        getattr(self.tracker, report.method)(*report.arguments, **report.options)


@contextmanager
def console(mailbox: Any, log: logging.Logger, silence: str) -> Iterator[None]:
    """Inside, lines that workers say appear in the driver's log as they come.

    Args:
        mailbox: where the workers leave them.
        log: of the driver.
        silence: what is said after the first of them, where the workers say nothing for long.
    """

    def say(lines: list[Said]) -> None:
        if lines:
            known = [left_s for *_, left_s in lines if left_s is not None]
            HEART.now(silence, known[-1] if known else HEART.left_s)
        for level, line, left_s in lines:
            text = HEART.with_rest(line, left_s) if level == PROGRESS else line
            log.log(level, "%s", text)

    with _pumped(mailbox.listen, say):
        yield


@contextmanager
def reporting(mailbox: Any, tracker: Any) -> Iterator[None]:
    """Inside, what workers send by `Reports` is called on `tracker`."""
    calls = InOrder(tracker)
    try:
        with _pumped(mailbox.reports, calls.take):
            yield
    finally:
        calls.finish()


@contextmanager
def _pumped(source: Any, take: Callable[[Any], None]) -> Iterator[None]:
    """Inside, a thread hands on what an actor's method gives; at the end, the rest of it."""
    import ray

    finished = threading.Event()

    def pump(timeout: float) -> None:
        take(ray.get(source.remote(timeout)))

    def run() -> None:
        while not finished.is_set():
            try:
                pump(2.0)
            except ray.exceptions.RayError:
                return  # the actor's death ends the run and is reported there

    listener = threading.Thread(target=run, daemon=True)
    listener.start()
    try:
        yield
    finally:
        finished.set()
        listener.join(10)
        try:
            pump(0.0)
        except ray.exceptions.RayError:
            logging.getLogger("pipeline").debug("the mailbox ended before its last words")
