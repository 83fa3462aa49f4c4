"""How Ray is started on this machine: its processes, their groups and signals, and its raylet."""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.errors import PipelineError

log = logging.getLogger("pipeline")
TRIES = 3
START_S = 180.0  # a raylet that is neither ready nor at its end after so long is taken for ended
LOOK_S = 1.0


class _RayletEnded(Exception):
    """The raylet, the process of Ray that starts workers, ended before it was ready."""


def until_started(start: Callable[[], object]) -> None:
    """Calls `start`, which starts Ray on this machine, again where Ray's raylet ends at once.

    A raylet gives its helper processes 15 s to start and then ends itself: on a loaded machine
    that is not enough. Ray would wait for it nevertheless, for minutes, and then raise.

    Raises:
        PipelineError: the raylet ended every time.
    """
    for number in range(1, TRIES + 1):
        with own_process_group() as processes, _raylet_watched(processes):
            try:
                start()
                return
            except _RayletEnded:
                _end(processes)
        if number < TRIES:
            log.info("ray         its raylet ended while it started (is the machine busy?); again")
    raise PipelineError(
        f"Ray could not be started on this machine: its raylet ended before it was ready, {TRIES} "
        "times in a row",
        "its helper processes must start within 15 s: end other work on this machine and try "
        "again, or set RAY_ADDRESS to a cluster that runs",
    )


@contextmanager
def _raylet_watched(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Inside, Ray's look-up of its own node, which waits for the raylet, ends when that ended."""
    from ray._private import services

    plain = services.get_node

    def get_node(*arguments: Any) -> Any:
        until = time.monotonic() + START_S
        while True:
            if any(_is_raylet(p) and p.poll() is not None for p in processes):
                raise _RayletEnded
            try:
                return plain(*arguments)
            except RuntimeError:  # it is not there yet
                if time.monotonic() > until:
                    raise _RayletEnded from None
                time.sleep(LOOK_S)

    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = plain


def _is_raylet(process: subprocess.Popen[bytes]) -> bool:
    command = process.args
    return isinstance(command, list) and str(command[0]).endswith("/raylet")


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in reversed(processes):
        process.kill()
    for process in processes:
        process.wait()


@contextmanager
def own_process_group() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Inside, processes that Ray starts get a process group of their own. Gives those processes.

    `timeout`, schedulers and terminals send SIGTERM to the whole group of a job. Ray's processes
    would end on it at once, and with them the workers that should write a checkpoint first. They
    still end with this process, as the kernel sees to it. Where it does not (macOS), Ray's reaper
    ends them, for which they must stay in this group.
    """
    from ray._private import services, utils

    apart = {"start_new_session": True} if utils.detect_fate_sharing_support() else {}
    plain = services.ConsolePopen
    started: list[subprocess.Popen[bytes]] = []

    class Noted(plain):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, **apart)
            started.append(self)

    services.ConsolePopen = Noted
    try:
        yield started
    finally:
        services.ConsolePopen = plain


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Inside, Ray sets no Python handler of its own, which exits with 15 and leaves its folder
    behind. The one that its core sets meanwhile, which aborts after 3 s, is replaced at the end.
    """
    from ray._private import utils

    plain, mine = utils.set_sigterm_handler, signal.getsignal(signal.SIGTERM)
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = plain
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, mine or signal.SIG_DFL)
