"""Messages between the driver and its workers: lines for the console, and the wish to stop.

Ray can copy workers' output to the driver, but with a prefix on each line and with everything that
other libraries print. The step lines are the face of a run, so they travel on their own.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Control:
    """Base of the actor beside the driver; its methods are called from driver and workers."""

    def __init__(self) -> None:
        self._stopping = threading.Event()
        self._lines: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()

    def stop(self) -> None:
        """Asks the workers to write a checkpoint and end."""
        self._stopping.set()

    def wait_stop(self, timeout: float = 30.0) -> bool:
        """Whether somebody asked to stop; waits up to `timeout` seconds for that.

        The wait has an end so that a worker group that died leaves no thread behind.
        """
        return self._stopping.wait(timeout)

    def say(self, level: int, line: str) -> None:
        """A worker's log line for the driver's console."""
        self._lines.put((level, line))

    def listen(self, timeout: float = 2.0) -> list[tuple[int, str]]:
        """The lines said since the last call; waits up to `timeout` seconds for one."""
        found = []
        try:
            found.append(self._lines.get(timeout=timeout))
            while True:
                found.append(self._lines.get_nowait())
        except queue.Empty:
            return found


class RemoteLines(logging.Handler):
    """Sends a worker's log records to the driver's console."""

    def __init__(self, control: Any) -> None:
        super().__init__()
        self.control = control

    def emit(self, record: logging.LogRecord) -> None:
        """Hands the line on; does not wait."""
        self.control.say.remote(record.levelno, self.format(record))


@contextmanager
def console(control: Any, log: logging.Logger) -> Iterator[None]:
    """Inside, lines that workers say appear in the driver's log as they come."""
    import ray

    finished = threading.Event()

    def pump(timeout: float) -> None:
        for level, line in ray.get(control.listen.remote(timeout)):
            log.log(level, "%s", line)

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
            log.debug("the control actor ended before its last lines were read")
