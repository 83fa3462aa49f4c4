"""What of the journal is to be sent, cut into calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.track import journal
from pipeline.track.journal import Event, kind
from pipeline.track.names import METRICS_PER_BATCH


@dataclass(frozen=True)
class Unsent:
    """What MLflow does not have yet."""

    metrics: int
    others: int

    def __bool__(self) -> bool:
        return self.metrics + self.others > 0

    def __str__(self) -> str:
        parts = [f"{self.metrics:,} metrics"] if self.metrics else []
        parts += [f"{self.others:,} other entries"] if self.others else []
        return " and ".join(parts) or "nothing"


def units(path: Path, start: int) -> Iterator[tuple[list[Event], int]]:
    """Cuts the journal after `start` into calls: (lines, offset after them).

    A call is up to 1,000 metrics, or one other line. Lines that stay here (`"send": false`, void)
    are passed over; the last unit may be empty and only move the offset.
    """
    marks = journal.voided(path, start)
    batch: list[Event] = []
    points, end, done = 0, start, start
    for line_end, event in journal.read(path, start):
        if event.get("send", True) and not journal.is_void(line_end, event, marks):
            size = len(event["metrics"]) if "metrics" in event else len(event.get("system", ()))
            if batch and (not size or points + size > METRICS_PER_BATCH):
                yield batch, end
                batch, points, done = [], 0, end
            batch.append(event)
            points += size
            if not size:
                yield batch, line_end
                batch, points, done = [], 0, line_end
        end = line_end
    if end > done:
        yield batch, end


def unsent(path: Path, start: int) -> Unsent:
    """Counts what the journal holds after `start` and would be sent."""
    events = [event for batch, _ in units(path, start) for event in batch]
    metrics = [event[kind(event)] for event in events if kind(event) in ("metrics", "system")]
    return Unsent(sum(map(len, metrics)), len(events) - len(metrics))


def in_doubt(path: Path, sent: int, begin: int) -> bool:
    """Whether rows that an earlier process left unsent may still be voided by a resume.

    They may while this process, whose journal begins at `begin`, has not said where their stage
    goes on (a resume), or that it does (a row), or that it does not (an end, another stage).
    """
    old = ((end, event) for end, event in journal.read(path, sent) if "metrics" in event)
    waiting = {event["run"] for end, event in old if end <= begin}
    for _, event in journal.read(path, begin) if waiting else ():
        if event["run"] in waiting and kind(event) in ("resume", "metrics", "end"):
            waiting.remove(event["run"])
        elif event["run"] not in (*waiting, "pipeline"):
            return False
    return bool(waiting)
