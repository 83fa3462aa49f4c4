"""Flat zeros are no curve: a metric that has always been 0 is not sent until it is not.

The journal keeps every value. With the first value that is not 0, the zero before it is sent too,
so that the curve begins at zero. What is held back is part of `track.json`, which is written
together with how much of the journal the server has; so a restart loses and doubles nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.track import journal
from pipeline.track.journal import Event, kind

Point = tuple[str, float | None, int, int]  # name, value, ms since 1970, step


@dataclass
class Zeros:
    """What of one run is held back on one server.

    Attributes:
        begun: names of the metrics that have had another value than 0, and are sent since.
        held: of each other metric its last zero: [ms since 1970, step, the stage that reported it].
    """

    begun: list[str] = field(default_factory=list)
    held: dict[str, list[int | str]] = field(default_factory=dict)

    def copy(self) -> Zeros:
        """One that may be changed while it is not known whether the server takes the points."""
        return Zeros(list(self.begun), dict(self.held))


def points_of(zeros: Zeros, rows: Sequence[Event]) -> list[Point]:
    """The points of journal lines that are to be sent now; `zeros` is brought up to date.

    Args:
        zeros: of the run that the lines go to.
        rows: lines with `metrics` or `system`, in the order of the journal.
    """
    begun = set(zeros.begun)
    points: list[Point] = []
    for row in rows:
        for name, value in row[kind(row)].items():
            if name not in begun:
                if value == 0:
                    zeros.held[name] = [row["ts"], row["step"], row["run"]]
                    continue
                begun.add(name)
                zeros.begun.append(name)
                if before := zeros.held.pop(name, None):
                    points.append((name, 0.0, int(before[0]), int(before[1])))
            points.append((name, value, row["ts"], row["step"]))
    return points


def voided(held: dict[str, Zeros], path: Path, mark: Event, end: int) -> None:
    """Takes out the zeros that a resume of their stage has made void; the ones before it count.

    Args:
        held: of all runs, by the run.
        path: the journal.
        mark: its `resume` line.
        end: offset after that line.
    """
    stage, first = mark["run"], int(mark["resume"])
    gone = {
        (run, name)
        for run, zeros in held.items()
        for name, (_, step, source) in zeros.held.items()
        if source == stage and int(step) >= first
    }
    for run, name in gone:
        del held[run].held[name]
    if not gone:
        return
    for row in _rows_before(path, mark, end):
        run = row.get("to") or row["run"]
        for name, value in row[kind(row)].items():
            if (run, name) in gone and value == 0:
                held[run].held[name] = [row["ts"], row["step"], row["run"]]


def _rows_before(path: Path, mark: Event, end: int) -> Iterator[Event]:
    """The rows of a stage that have survived all resumes up to this one."""
    marks = [one for one in journal.voided(path, 0) if one[0] <= end]
    for line_end, event in journal.read(path):
        if line_end >= end:
            return
        sent = event["run"] == mark["run"] and "metrics" in event and event.get("send", True)
        if sent and not journal.is_void(line_end, event, marks):
            yield event
