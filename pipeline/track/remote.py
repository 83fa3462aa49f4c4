"""A tracker on another node than the run folder: its reports are made by the driver's tracker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from pipeline.track.settings import TrackSettings
from pipeline.track.system import SystemMetrics
from pipeline.track.tracker import Tracker


class Sending(Protocol):
    """How reports travel; see `pipeline.control.Reports`."""

    def send(self, method: str, *arguments: Any, **options: Any) -> None:
        """Hands a call on."""

    def wait(self, timeout: float) -> None:
        """Waits until the calls have arrived."""


class _Lines:
    """What `SystemMetrics` needs of a journal."""

    path = Path("/nonexistent/metrics.jsonl")  # no earlier lines are known here

    def __init__(self, sending: Sending) -> None:
        self.sending = sending

    def append(self, run: str, **event: Any) -> None:
        """Hands a line on, whose run the driver's tracker knows."""
        self.sending.send("line", event)


class RemoteTracker:
    """Has the reporting methods of `Tracker`; each call is made on the driver's one."""

    def __init__(self, settings: TrackSettings, sending: Sending) -> None:
        self.run_id = settings.run_id
        self._sending = sending
        lines: Any = _Lines(sending)
        self._system = SystemMetrics(lines, settings.stage) if settings.system_metrics else None

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_") or not callable(getattr(Tracker, name, None)):
            raise AttributeError(name)

        def report(*arguments: Any, **options: Any) -> None:
            self._sending.send(name, *arguments, **options)

        return report

    def flush(self, timeout: float) -> None:
        """Waits until the reports so far are with the driver, for at most `timeout` seconds."""
        self._sending.wait(timeout)

    def close(self, timeout: float = 60.0) -> None:
        """Waits until all reports have arrived. The run itself is the driver's to end."""
        if self._system:
            self._system.close()
        self._sending.wait(timeout)
