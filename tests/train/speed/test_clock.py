"""The clock against a time that the test sets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.train.speed import bottleneck
from pipeline.train.speed.bottleneck import Clock, duration


class Time:
    """Seconds, moved by hand."""

    now = 1000.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(bottleneck, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def steps(on: Clock, time: Time, count: int, wait: float, busy: float) -> None:
    for _ in range(count):
        with on.waiting():
            time.pass_(wait)
        time.pass_(busy)
        on.tick()


def test_a_window_is_measured_and_a_new_one_begins(time: Time) -> None:
    on = Clock(0, 100, 64, flops_per_image=1e9, peak_flops=64e9, tokens_per_image=730)
    steps(on, time, 10, wait=0.5, busy=1.5)
    assert on.read() == pytest.approx(
        {
            "perf/images_per_s": 32.0,
            "perf/step_s": 2.0,
            "perf/data_wait_fraction": 0.25,
            "perf/tokens_per_s": 32.0 * 730,
            "perf/mfu": 0.5,
        }
    )
    steps(on, time, 4, wait=0.0, busy=1.0)
    assert on.read()["perf/images_per_s"] == pytest.approx(64)
    assert on.read()["perf/data_wait_fraction"] == 0


def test_without_a_known_peak_there_is_no_mfu(time: Time) -> None:
    on = Clock(0, 10, 4, 1e9, 0.0)
    steps(on, time, 9, 0, 1)
    assert "perf/mfu" not in on.read()
    assert "mfu" not in on.summary()


def test_the_summary_has_the_mfu_of_the_run_without_its_first_steps(time: Time) -> None:
    on = Clock(0, 20, 8, flops_per_image=1e9, peak_flops=16e9)
    steps(on, time, Clock.WARMUP_STEPS, 0, busy=50)
    steps(on, time, 10, wait=0.5, busy=0.5)
    assert on.summary() == pytest.approx(
        {"images_per_s": 8.0, "data_wait_fraction": 0.5, "mfu": 0.5}
    )


def test_the_eta_is_that_of_the_whole_run_without_its_start(time: Time) -> None:
    on = Clock(first_step=40, steps=100, global_batch=8, flops_per_image=1, peak_flops=0)
    assert on.eta() == "--"
    steps(on, time, Clock.WARMUP_STEPS, wait=30, busy=30)
    assert on.eta() == "--"
    steps(on, time, 5, wait=0, busy=2)
    assert on.eta() == "1m 40s"  # 50 steps are left, 2 s each
    assert on.summary() == pytest.approx({"images_per_s": 4.0, "data_wait_fraction": 0.0})
    steps(on, time, 5, wait=2, busy=0)
    assert on.summary()["data_wait_fraction"] == pytest.approx(0.5)
    assert on.eta() == "1m 30s"


def test_reading_windows_does_not_change_the_run(time: Time) -> None:
    read, unread = (Clock(0, 50, 8, 1, 0) for _ in range(2))
    for _ in range(20):
        with read.waiting(), unread.waiting():
            time.pass_(1)
        time.pass_(1)
        read.tick()
        unread.tick()
        read.read()
    assert read.summary() == unread.summary()
    assert read.eta() == unread.eta()


def test_a_run_shorter_than_the_start_has_no_summary(time: Time) -> None:
    on = Clock(0, 3, 8, 1, 0)
    steps(on, time, 3, 0, 1)
    assert on.summary() == {}
    assert on.eta() == "--"


def test_no_time_at_all_is_no_division_by_zero(time: Time) -> None:
    on = Clock(0, 10, 8, 1, 1)
    assert on.read()["perf/data_wait_fraction"] == 0
    steps(on, time, 10, 0, 0)
    on.read()
    assert on.summary()["images_per_s"] > 0
    assert on.eta() == "0s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0s"),
        (0.4, "0s"),
        (42, "42s"),
        (59.6, "1m 00s"),
        (185, "3m 05s"),
        (3599.4, "59m 59s"),
        (3599.6, "1h 00m"),
        (51660, "14h 21m"),
        (360000, "100h 00m"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
