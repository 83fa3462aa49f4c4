"""What signals do to a job: SIGTERM ends it with 143 and closes what is open before; while workers
train, either signal asks for a checkpoint first.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.driver.mailbox import ENDING


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM unwinds the job with the status of a shell, so that its MLflow runs are ended
    as killed. Does nothing inside another one, and in other threads than the main one.

    Raises:
        SystemExit: with 128 + the signal. In a call of Ray's the handler's own exit becomes one
            with 1.
    """
    outermost = signal.getsignal(signal.SIGTERM) is not _unwind
    if threading.current_thread() is not threading.main_thread() or not outermost:
        yield
        return
    ENDING.number = 0
    before = signal.signal(signal.SIGTERM, _unwind)
    try:
        yield
    except SystemExit:
        if ENDING.number:
            sys.exit(128 + ENDING.number)
        raise
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        ENDING.number = 0


@contextmanager
def stop_on_signals(feeder: Any) -> Iterator[None]:
    """Inside, SIGTERM or Ctrl-C makes the workers write a checkpoint and end; the driver lives on.

    `ENDING` has the signal then. Ctrl-C after that ends it at once. SIGTERM does not: `timeout`
    sends it twice, to the job and to its process group.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = threading.Event()
    finished = False

    def tell() -> None:
        asked.wait()
        if not finished:
            feeder.stop.remote()

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()

    def handler(number: int, frame: Any) -> None:
        if asked.is_set():
            return
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        logging.getLogger("pipeline.train").info("%-11s writing a checkpoint, then ending", name)
        ENDING.number = number
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        finished = True
        asked.set()
        for number, handling in before.items():
            signal.signal(number, handling)


def _unwind(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # `timeout` sends two: the second must not cut the end
    signal.alarm(0)  # by which Ray's core aborts after 3 s, where the signal came in `ray.init`
    if ENDING.number:
        return  # training has obeyed, and the job is on its way out
    ENDING.number = number
    logging.getLogger("pipeline").info("SIGTERM     ending")
    sys.exit(128 + number)
