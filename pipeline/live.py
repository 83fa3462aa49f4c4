"""On a terminal: one line that is written over, with a bar where the work can be counted.

Lines of progress (`heartbeat.PROGRESS`) go into it and do not scroll; all others go above it. In a
log, a pipe or a notebook there is none of this: `log.py` writes plain lines.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.heartbeat import HEART, PROGRESS, SignOfLife
from pipeline.log import line_formatter

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

COUNTED = re.compile(r"(\d[\d,]*)(?: of |/)(\d[\d,]*)")  # "3 of 14 scores", "step 020/200"
BAR = 24  # cells
FRESH_S = 25.0  # a worker's line counts so long; after that, what this process says
TURN = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
STYLES = {logging.WARNING: "yellow", logging.ERROR: "red"}


class LiveLine(logging.Handler):
    """A handler of the log with a line at the bottom of the terminal.

    Args:
        console: rich's.
    """

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        super().__init__()
        self.setFormatter(line_formatter())
        self.addFilter(SignOfLife())
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._live.start()
        self._text, self._at, self._turn = "", -FRESH_S, 0

    def emit(self, record: logging.LogRecord) -> None:
        """Progress goes into the line, everything else above it."""
        text = self.format(record)
        if record.levelno == PROGRESS:
            self._text, self._at = text.removeprefix("still").strip(), time.monotonic()
            self._draw(self._text)
            return
        self._at = -FRESH_S  # what it was about is over
        style = STYLES.get(record.levelno)
        self._live.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def show(self, what: str, lasts: float) -> None:
        """What this process does, and for how many seconds; called each second."""
        with self.lock or _nothing():
            if time.monotonic() - self._at < FRESH_S:
                self._draw(self._text)
            else:
                self._draw(HEART.with_rest(f"{what}, {lasts:.0f} s", HEART.left_s) if what else "")

    def close(self) -> None:
        """Takes the line away."""
        self._live.stop()
        super().close()

    def _draw(self, text: str) -> None:
        from rich.text import Text

        self._turn += 1
        line = Text(no_wrap=True, overflow="ellipsis")
        if text:
            line.append(f"{TURN[self._turn % len(TURN)]} ", "cyan")
            line.append_text(bar(text))
            line.append(text)
        self._live.update(line, refresh=True)


def bar(text: str) -> Text:
    """A bar for a text that counts, `step 020/200`; empty for others."""
    from rich.text import Text

    counted = COUNTED.search(text)
    if counted is None:
        return Text()
    done, total = (int(number.replace(",", "")) for number in counted.groups())
    full = min(BAR, BAR * done // total) if total else 0
    return Text.assemble(("━" * full, "green"), ("━" * (BAR - full), "bright_black"), " ")


@contextmanager
def terminal() -> Iterator[None]:
    """Inside, the log is on a terminal with a live line, where there is a terminal."""
    plain = os.environ.get("TERM", "dumb") == "dumb" or os.environ.get("PIPELINE_DEBUG")
    if plain or not sys.stdout.isatty():
        yield
        return
    from rich.console import Console

    handler = LiveLine(Console(soft_wrap=True))
    root = logging.getLogger("pipeline")
    before = root.handlers[:]
    root.handlers[:] = [handler]
    HEART.live = handler.show
    try:
        yield
    finally:
        HEART.live = None
        root.handlers[:] = before
        handler.close()


@contextmanager
def _nothing() -> Iterator[None]:
    yield
