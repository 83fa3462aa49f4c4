"""Rank 0 on another node: what it reports is in the driver's journal as if it had written it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.track import system
from pipeline.track.journal import FILE_NAME, read
from pipeline.track.settings import TrackSettings
from pipeline.track.tracker import RemoteTracker, Tracker


class Post:
    """Makes the calls at once."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.waited = tracker, False

    def send(self, method: str, *arguments: Any, **options: Any) -> None:
        getattr(self.tracker, method)(*arguments, **options)

    def wait(self, timeout: float) -> None:
        self.waited = True


def report(tracker: Any) -> None:
    tracker.resume(0)
    tracker.metrics(0, {"loss/total": 1.5}, send=False)
    tracker.headline(0, {"loss/total": 1.5})
    tracker.picture("crops", 0, np.zeros((4, 4, 3), np.uint8))
    tracker.tags({"alarm": "none"})
    tracker.table("bad", {"a": [1, 2]})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k != "ts"} for _, e in read(folder / FILE_NAME)]


def settings(folder: Path, **more: Any) -> TrackSettings:
    return TrackSettings(str(folder), "pretrain", uri="none", run_id="abc", **more)


def test_reports_are_the_same_as_of_a_tracker_in_the_folder(tmp_path: Path) -> None:
    here = Tracker(settings(tmp_path / "here"))
    report(here)
    here.close()
    driver = Tracker(settings(tmp_path / "driver"))
    post = Post(driver)
    away = RemoteTracker(settings(tmp_path / "nowhere"), post)
    report(away)
    away.close()
    driver.close()
    assert post.waited
    assert away.run_id == "abc"
    assert lines(tmp_path / "driver") == lines(tmp_path / "here")
    assert len(lines(tmp_path / "driver")) == 5
    files = {p.name for p in (tmp_path / "driver").rglob("*") if p.is_file()}
    assert files >= {"crops-00000000.png", "bad.json", FILE_NAME}
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(AttributeError):
        away.no_such_report(1)


def test_its_machine_is_the_one_that_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system.SystemMetrics.__init__, "__defaults__", (0.02,))
    monkeypatch.setattr(system, "sample", lambda: {"cpu_utilization_percentage": 42.0})
    monkeypatch.setattr(system, "_gpu_sampler", lambda: dict)
    driver = Tracker(settings(tmp_path / "driver"))
    away = RemoteTracker(settings(tmp_path / "x", system_metrics=True), Post(driver))
    end = time.monotonic() + 60
    while not any("system" in e for e in lines(tmp_path / "driver")) and time.monotonic() < end:
        time.sleep(0.02)
    away.close()
    driver.close()
    samples = [e for e in lines(tmp_path / "driver") if "system" in e]
    assert samples
    assert samples[0]["run"] == "pretrain"
    assert json.loads(json.dumps(samples[0]["system"])) == {
        "system/cpu_utilization_percentage": 42.0
    }
