"""A job that a test has started: its console, and its training workers, which can stand still."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


def training_workers() -> list[psutil.Process]:
    """The training workers of this test's own cluster: they are below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join([process.name(), *process.cmdline()]):
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def held(count: int) -> Iterator[list[psutil.Process]]:
    """Inside, the training workers stand still; there are so many of them."""
    workers = training_workers()
    assert len(workers) == count
    try:
        for worker in workers:
            worker.suspend()
        yield workers
    finally:
        for worker in workers:
            with suppress(psutil.Error):
                worker.resume()


def terminate_held(running: subprocess.Popen[str]) -> str:
    """SIGTERM to the driver of workers that stand still; its console until it says so.

    They end at their next step.
    """
    running.send_signal(signal.SIGTERM)
    console = read_until(running, "SIGTERM ")
    time.sleep(1)  # the driver's word reaches the mailbox, which the workers ask at each step
    return console


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """The console up to the line that fits; the test's own timeout ends the wait."""
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(pattern, line):
            return "".join(lines)
    raise AssertionError(f"ended without {pattern}:\n" + "".join(lines))


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and what is left of its console."""
    assert process.stdout
    rest = process.stdout.read()
    return process.wait(), rest
