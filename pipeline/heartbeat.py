"""Says what a process is doing where it has said nothing for a while, whatever it does.

    with doing("starting Ray"):
        ...

Every line that is logged counts as a sign of life. `beating` has a thread that looks every second.
On a terminal `live` shows it all the time, in one line that is written over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("pipeline")
PROGRESS = logging.INFO + 1  # level of lines that the next one makes old
SILENCE_S = 18.0  # of a driver; with the pause of the thread, 20 s are never reached
WORKER_SILENCE_S = 15.0  # less, so that a worker, which knows more, speaks before the driver
FIRST_S = 3.0  # of a driver that has just begun: who has typed a command looks for an answer
LOOK_S = 1.0
JUST_BEGUN_S = 2.0  # a step that has just begun is not said to last


class Heartbeat:
    """What is being done, and how long nothing has been said.

    Args:
        say: takes a line.
        silence_s: after which a line is due.
        clock: seconds.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        silence_s: float = SILENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.silence_s = silence_s
        self._say, self._clock = say, clock
        self._lock = threading.Lock()
        self._doing: list[tuple[str, float]] = []
        self._spoken = clock()
        self._ends: float | None = None  # when what is being done is over, where that is known
        self.rest: Callable[[float | None], str] | None = None  # a word on all that is left
        self.live: Callable[[str, float], None] | None = (
            None  # takes what is done, and for how long
        )

    @property
    def left_s(self) -> float | None:
        """Seconds until what is being done is over, where that is known."""
        return None if self._ends is None else max(0.0, self._ends - self._clock())

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Inside, this is what is being done; where it is nested, the innermost is said."""
        begun = self._clock()
        with self._lock:
            depth, ends = len(self._doing), self._ends
            self._doing.append((what, begun))
            self._ends = None  # it is of what was done before
        try:
            yield
        finally:
            with self._lock:
                del self._doing[depth:]
                self._ends = ends

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Inside, nothing is said: a server that waits for requests is not at work."""
        with self._lock:
            before, self._doing = self._doing, []
        try:
            yield
        finally:
            with self._lock:
                self._doing = before

    def now(self, what: str, left_s: float | None = None) -> None:
        """Says more exactly what is being done, since now; the word of the innermost `doing`.

        Args:
            what: is being done.
            left_s: seconds until that is over, where they are known.
        """
        with self._lock:
            self._ends = None if left_s is None else self._clock() + left_s
            if self._doing:
                self._doing[-1] = (what, self._clock())

    def spoke(self) -> None:
        """A line was said by somebody else."""
        with self._lock:
            self._spoken = self._clock()

    def look(self) -> None:
        """Says what is being done, where nothing has been said for so long."""
        with self._lock:
            now = self._clock()
            if not self._doing:
                what, begun = "", now
            else:
                what, begun = self._doing[-1]
            due = bool(what) and now - self._spoken >= self.silence_s and self.live is None
            if due:
                self._spoken = now
        lasts = now - begun
        if self.live is not None:
            self.live(what, lasts)
        if due:
            self._say(f"{what}, for {lasts:.0f} s" if lasts >= JUST_BEGUN_S else what)

    def first_after(self, seconds: float) -> None:
        """The next line is due after so many seconds, however long the silence may be later."""
        with self._lock:
            self._spoken = self._clock() - self.silence_s + seconds

    def with_rest(self, line: str, left_s: float | None) -> str:
        """A line with a word on all that is left behind it, in the process that knows."""
        return line if self.rest is None else line + self.rest(left_s)


def _said(line: str) -> None:
    text = HEART.with_rest(f"still       {line}", HEART.left_s)
    log.log(PROGRESS, "%s", text, extra={"left_s": HEART.left_s})


HEART = Heartbeat(_said)
doing, now, idle = HEART.doing, HEART.now, HEART.idle


class SignOfLife(logging.Filter):
    """On a handler: each line that it lets through counts."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets everything through."""
        HEART.spoke()
        return True


@contextmanager
def beating(silence_s: float = SILENCE_S, first_s: float | None = None) -> Iterator[None]:
    """Inside, a thread looks whether a line is due.

    Args:
        silence_s: after which one is.
        first_s: after which the first one is; default: the same.
    """
    finished = threading.Event()
    HEART.silence_s = silence_s
    HEART.first_after(silence_s if first_s is None else first_s)

    def run() -> None:
        while not finished.wait(LOOK_S):
            HEART.look()

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join(5)
