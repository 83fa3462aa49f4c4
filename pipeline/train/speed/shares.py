"""What the parts of a step take, read from a trace.

Times of a trace are microseconds. A part counts without the parts inside it. What a device does is
counted to the part that launched it, whenever it runs.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

from pipeline.train.speed.parts import Part

PARTS = get_args(Part)
STEP = re.compile(r"step \d+")
COLLECTIVE = re.compile(r"(gloo|nccl):")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCH = ("cuda_runtime", "cuda_driver")
REDUCE, OTHER = "reduce", "other"


class Segment(NamedTuple):
    """A time in which a thread was in one part."""

    start: float
    end: float
    part: str


@dataclass(frozen=True)
class Shares:
    """Milliseconds a step by part, in the order of a step; `reduce` is a part of `backward`."""

    steps: int
    step_ms: float
    host_ms: dict[str, float]  # of the thread that trains; they add up to `step_ms`
    beside_ms: dict[str, float]  # of other threads
    device_ms: dict[str, float]  # empty where there is no GPU
    device_busy_ms: float  # with at least one kernel or copy under way

    def line(self) -> str:
        """For the log: the shares of the GPU where there is one, else those of the host."""
        shown = self.device_ms or self.host_ms
        parts = [
            f"{name} {100 * ms / self.step_ms:.1f} %"
            for name, ms in shown.items()
            if ms >= 0.001 * self.step_ms
        ]
        busy = f", GPU at work {100 * self.device_busy_ms / self.step_ms:.0f} %"
        return f"{self.step_ms:.1f} ms a step{busy if self.device_ms else ''}: {', '.join(parts)}"

    def table(self) -> str:
        """Markdown: a row for each part."""
        rows = [
            f"{self.steps} steps, {self.step_ms:.2f} ms each. A part counts without those inside "
            "it; `reduce` is a part of `backward`.",
            "",
            "| part | host, ms | share | other threads, ms | GPU, ms | share |",
            "|---|---|---|---|---|---|",
        ]
        for name in (*PARTS, REDUCE, OTHER):
            host, beside, device = (
                times.get(name) for times in (self.host_ms, self.beside_ms, self.device_ms)
            )
            if host or beside or device:
                cells = (*self._cells(host), self._cells(beside)[0], *self._cells(device))
                rows.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(rows) + "\n"

    def _cells(self, ms: float | None) -> tuple[str, str]:
        return (f"{ms:.2f}", f"{100 * ms / self.step_ms:.1f} %") if ms else ("", "")


def shares_of(trace: Mapping[str, Any]) -> Shares | None:
    """The shares in a trace of `Profile`, as JSON is read; None where no step is whole in it."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    marks = [event for event in events if event.get("cat") == "user_annotation"]
    steps = [event for event in marks if STEP.fullmatch(event["name"])]
    if not steps:
        return None
    threads: dict[Any, list[Any]] = defaultdict(list)
    for event in marks:
        if event["name"] in PARTS:
            threads[event["tid"]].append(event)
    main = steps[0]["tid"]
    segments = {tid: _innermost(of_thread) for tid, of_thread in threads.items()}
    trained = segments.setdefault(main, [])
    whole = _innermost(steps)
    wall = sum(step["dur"] for step in steps)

    host = _summed(segment for segment in trained if _at(whole, segment.start))
    host[OTHER] = max(0.0, wall - sum(host.values()))
    sums = [
        (event["ts"], event["ts"] + event["dur"])
        for event in marks
        if COLLECTIVE.match(event["name"]) and _at(trained, event["ts"]) == "backward"
    ]
    if sums:
        host[REDUCE] = _union(sums)
    beside = _summed(
        segment
        for tid, of_thread in segments.items()
        if tid != main
        for segment in of_thread
        if _at(whole, segment.start)
    )
    device: dict[str, float] = defaultdict(float)
    busy: list[tuple[float, float]] = []
    launches = {_correlation(x): x for x in events if x.get("cat") in LAUNCH}
    for event in events:
        launch = launches.get(_correlation(event)) if event.get("cat") in ON_DEVICE else None
        if launch is None or not _at(whole, launch["ts"]):
            continue
        own = segments.get(launch["tid"], [])
        part = _at(own, launch["ts"]) or _at(trained, launch["ts"]) or OTHER
        device[part] += event["dur"]
        if part == "backward" and event["name"].startswith("nccl"):
            device[REDUCE] += event["dur"]
        busy.append((event["ts"], event["ts"] + event["dur"]))
    each = 1000 * len(steps)

    def ordered(times: Mapping[str, float]) -> dict[str, float]:
        return {name: times[name] / each for name in (*PARTS, REDUCE, OTHER) if times.get(name)}

    return Shares(
        len(steps),
        wall / each,
        ordered(host),
        ordered(beside),
        ordered(device),
        _union(busy) / each,
    )


def _correlation(event: Mapping[str, Any]) -> Any:
    return event.get("args", {}).get("correlation")


def _innermost(events: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """Nested events of one thread as segments, each with the name of the innermost event."""
    segments: list[Segment] = []
    open_until: list[tuple[float, str]] = []
    at = 0.0

    def advance(until: float) -> None:
        """Closes what ends before `until`, and gives the time up to it to what is open."""
        nonlocal at
        while open_until:
            end, name = open_until[-1]
            upto = min(end, until)
            if upto > at:
                segments.append(Segment(at, upto, name))
                at = upto
            if end > until:
                break
            open_until.pop()
        at = max(at, until)

    for event in sorted(events, key=lambda x: (x["ts"], -x["dur"])):
        advance(event["ts"])
        open_until.append((event["ts"] + event["dur"], event["name"]))
    advance(max((end for end, _ in open_until), default=0.0))
    return segments


def _at(segments: Sequence[Segment], time: float) -> str:
    """The part of a moment; "" between two."""
    place = bisect_right(segments, time, key=lambda segment: segment.start) - 1
    return segments[place].part if place >= 0 and time < segments[place].end else ""


def _summed(segments: Iterable[Segment]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for start, end, part in segments:
        sums[part] += end - start
    return sums


def _union(times: Iterable[tuple[float, float]]) -> float:
    """Time that at least one of these covers."""
    total, reached = 0.0, 0.0
    for start, end in sorted(times):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
