"""The journal: an append-only file of what a run reported, written before anything is sent.

`runs/<name>/metrics.jsonl` holds one JSON object a line. All have `run` (the stage, or `pipeline`)
and `ts` (milliseconds since 1970); exactly one further key says what the line is:

    {"run": "pretrain", "step": 40, "ts": 1700000000000, "metrics": {"loss/total": 9.81}}
    {"run": "pretrain", "ts": …, "resume": 30, "attempt": 2}    steps >= 30 above it are void
    open, end, params, tags, note, dataset, picture, artifact, table, model, system

`"send": false` marks metrics that stay in the journal; `"to": "pipeline"` marks metrics that are
shown on the parent run. A value that is not finite is `null`. Nothing is ever rewritten, so a
reader needs no lock, and a line that was torn by a crash is skipped.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.track.names import numbers
from pipeline.uri import public

log = logging.getLogger("pipeline.track")

FILE_NAME = "metrics.jsonl"

_COMMON = ("run", "ts", "step", "attempt", "to", "send")

Event = dict[str, Any]


def kind(event: Event) -> str:
    """What a journal line is: `metrics`, `open`, `picture`, …"""
    return next((name for name in event if name not in _COMMON), "")


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def _public(value: Any) -> Any:
    """All texts of a line as they may be shown: the line is kept, and sent to MLflow."""
    if isinstance(value, dict):
        return {_public(key): _public(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_public(one) for one in value]
    return public(value) if isinstance(value, str) else value


def read(path: Path, start: int = 0, having: bytes = b"") -> Iterator[tuple[int, Event]]:
    """Yields (offset after the line, event) for each complete, readable line from `start` on.

    `having` skips lines without these bytes, unparsed.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        end = start
        for line in file:
            if not line.endswith(b"\n"):
                return  # being written, or torn: the next writer ends it
            end += len(line)
            if having not in line:
                continue
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "run" in event:
                yield end, event


def voided(path: Path, start: int) -> list[tuple[int, str, int]]:
    """The resume marks after `start`: (offset after the mark, run, step)."""
    lines = read(path, start, having=b'"resume": ')
    return [(end, event["run"], int(event["resume"])) for end, event in lines if "resume" in event]


def is_void(end: int, event: Event, marks: list[tuple[int, str, int]]) -> bool:
    """Whether a later resume of the same stage starts at or before the step of this line."""
    if "metrics" not in event and "picture" not in event:
        return False
    return any(
        mark > end and run == event["run"] and event["step"] >= step for mark, run, step in marks
    )


def read_steps(path: Path, run: str) -> dict[int, dict[str, float]]:
    """The metrics of a stage by step, as the surviving steps reported them; NaN for null."""
    rows: dict[int, dict[str, float]] = {}
    for _, event in read(path):
        if event["run"] != run:
            continue
        if "resume" in event:
            rows = {step: row for step, row in rows.items() if step < event["resume"]}
        elif "metrics" in event and "to" not in event:
            values = {k: math.nan if v is None else v for k, v in event["metrics"].items()}
            rows.setdefault(event["step"], {}).update(values)
    return dict(sorted(rows.items()))


class Journal:
    """The journal of one run folder. Appending is safe from several threads and processes.

    No method raises on a full or broken disk: that is said once, training goes on, and the lines
    wait in memory until they can be written. What still waits when the process ends is lost.
    """

    HELD_BYTES = 64 * 2**20

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered, one write a line with O_APPEND: whole lines, also from several processes.
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._lock = threading.Lock()
        self._torn = not _ends_with_newline(path)
        self._held: deque[bytes] = deque()  # lines that could not be written yet
        self._held_bytes = self._lost = 0
        self._said = False

    def append(self, run: str, **event: Any) -> None:
        """Writes one line; `ts` is filled in."""
        event = {"run": run, **event, "ts": event.get("ts") or now_ms()}
        line = json.dumps(event, default=str)
        if ":/" in line:
            line = json.dumps(_public(json.loads(line)))
        with self._lock:
            self._hold((line + "\n").encode())
            self._write_held()

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_bytes += len(data)
        while self._held_bytes > self.HELD_BYTES and len(self._held) > 1:
            self._held_bytes -= len(self._held.popleft())
            self._lost += 1

    def _write_held(self) -> None:
        while self._held:
            data = b"\n" * self._torn + self._held[0]
            try:
                written = os.write(self._fd, data)
            except OSError as error:
                self._say(str(error))
                return
            self._torn = written < len(data)
            if self._torn:  # the whole line again, once there is room
                self._say("the disk is full")
                return
            self._held_bytes -= len(self._held.popleft())
        if self._said:
            log.warning("%s is written again; %d lines are lost", self.path, self._lost)
        self._said, self._lost = False, 0

    def _say(self, why: str) -> None:
        if not self._said:
            log.warning(
                "cannot write %s (%s); training goes on, its lines wait in memory", self.path, why
            )
        self._said = True

    def metrics(
        self, run: str, step: int, values: Mapping[str, Any], send: bool = True, to: str = ""
    ) -> None:
        """Writes the metrics of a step; what is not a number is left out and named once."""
        kept, refused = numbers(values)
        if refused:
            log.warning("not a number, left out at step %d: %s", step, ", ".join(refused))
        if kept:
            marks: Event = {"to": to} if to else {}
            marks |= {} if send else {"send": False}
            self.append(run, step=int(step), metrics=kept, **marks)

    def attempt(self, run: str) -> int:
        """The number, from 1, of a start of this run that begins now.

        A start that reported nothing does not count: the driver's `open` and the `resume` of the
        first worker that follows it are the same start.
        """
        attempt, reported = 0, True
        for _, event in read(self.path):
            if event.get("to", event["run"]) != run:
                continue
            if "open" in event or "resume" in event:
                attempt, reported = attempt + reported, False
            elif "metrics" in event or "end" in event:
                reported = True
        return attempt + reported

    def resume(self, run: str, step: int) -> int:
        """Marks the rows of `run` with step >= `step` as void and returns the attempt.

        Call it whenever a stage starts at a step; without earlier rows nothing is written. Rows
        that MLflow has already stay there, because it cannot take a point back.
        """
        attempt = self.attempt(run)
        if self.steps(run):
            self.append(run, resume=int(step), attempt=attempt)
        return attempt

    def steps(self, run: str) -> dict[int, dict[str, float]]:
        """See read_steps."""
        return read_steps(self.path, run)

    def close(self) -> None:
        """Closes the file; further lines are lost."""
        with self._lock:
            if self._fd >= 0:
                self._write_held()
                if self._held:
                    log.error("%d lines of %s are lost", len(self._held) + self._lost, self.path)
                os.close(self._fd)
            self._fd = -1


def _ends_with_newline(path: Path) -> bool:
    size = path.stat().st_size
    if size == 0:
        return True
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1) == b"\n"
