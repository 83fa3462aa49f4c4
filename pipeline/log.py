"""Logging: configured once per process by a job or a worker, never at import."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType

from pipeline.heartbeat import SignOfLife
from pipeline.uri import public

_JOB = re.compile(r"(?:python )?\bjobs/([a-z]+)\.py")


@dataclass
class Typed:
    """How commands are written in what is said: `python jobs/run.py` or `raydino run`."""

    as_command: bool = False


TYPED = Typed()


def say_as_command() -> None:
    """From now on commands are said as `raydino run`, since that is how this one was typed."""
    TYPED.as_command = True


def as_typed(text: str) -> str:
    """A text with the commands in it as the user types them."""
    return _JOB.sub(r"raydino \1", text) if TYPED.as_command else text


def configure(
    prefix: str = "", level: int = logging.INFO, handler: logging.Handler | None = None
) -> None:
    """Sends `pipeline.*` log records to stdout, one line each.

    Args:
        prefix: put before every line, e.g. `[w3]` on training worker 3.
        level: lowest level shown; `PIPELINE_DEBUG=1` lowers it to DEBUG.
        handler: takes the records instead of stdout.
    """
    if os.environ.get("PIPELINE_DEBUG"):
        level = logging.DEBUG
    root = logging.getLogger("pipeline")
    root.setLevel(level)
    root.propagate = False
    if handler is None:
        handler = _Lines(sys.stdout)
        handler.setFormatter(_LineFormatter(prefix))
    else:
        handler.setFormatter(_Formatter(f"{prefix} %(message)s" if prefix else None))
    handler.addFilter(SignOfLife())
    root.handlers[:] = [handler]
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)  # it says what it is about to try
    sys.excepthook = _bug
    threading.excepthook = lambda bug: _bug(bug.exc_type, bug.exc_value, bug.exc_traceback)


def line_formatter() -> logging.Formatter:
    """Of one line a record, as `configure` has it."""
    return _LineFormatter("")


@contextmanager
def only_errors(name: str) -> Iterator[None]:
    """Inside, another library's logger says errors and nothing else."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _bug(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    """Shows an error that nobody expected, without the keys that a URI in it may hold."""
    sys.stderr.write(public("".join(traceback.format_exception(kind, error, trace))))


def nobody_reads() -> None:
    """Whoever read stdout has gone (`| head`): the job goes on, and what it says goes nowhere."""
    with suppress(OSError, ValueError):  # a stdout without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Lines(logging.StreamHandler):  # type: ignore[type-arg]
    """Lines to a stream, whose reader may leave."""

    def handleError(self, record: logging.LogRecord) -> None:
        """A reader that has gone is no error of ours."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            nobody_reads()
        else:
            super().handleError(record)


class _Formatter(logging.Formatter):
    """Lines without the keys that a URI may hold: whoever logs a place need not think of them."""

    def format(self, record: logging.LogRecord) -> str:
        return as_typed(public(super().format(record)))


class _LineFormatter(_Formatter):
    def __init__(self, prefix: str) -> None:
        super().__init__("%(message)s")
        self.prefix = f"{prefix} " if prefix else ""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        mark = "warning: " if record.levelno == logging.WARNING else ""
        mark = "error: " if record.levelno >= logging.ERROR else mark
        return self.prefix + mark + text
