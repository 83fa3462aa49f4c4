"""A word at least every 20 s, whatever a process does: with a clock of the test's own."""

from __future__ import annotations

import logging
import time
from itertools import pairwise

import pytest

from pipeline import heartbeat, log
from pipeline.heartbeat import LOOK_S, SILENCE_S, Heartbeat


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_no_silence_of_20_s_in_an_hour_of_any_work() -> None:
    said: list[tuple[float, str]] = []
    clock = Clock()
    heart = Heartbeat(lambda line: said.append((clock.seconds, line)), clock=clock)
    with heart.doing("pack"):
        while clock.seconds < 3600:
            clock.seconds += LOOK_S
            heart.look()
    times = [0.0, *(at for at, _ in said)]
    assert max(b - a for a, b in pairwise(times)) < 20
    assert said[0] == (SILENCE_S, f"pack, for {SILENCE_S:.0f} s")
    assert said[1] == (2 * SILENCE_S, f"pack, for {2 * SILENCE_S:.0f} s")


def test_a_server_that_waits_says_nothing() -> None:
    said: list[str] = []
    clock = Clock()
    heart = Heartbeat(said.append, clock=clock)
    with heart.doing("opening"):
        with heart.idle():
            clock.seconds += 3600
            heart.look()
            assert not said
        heart.look()
    assert said == ["opening, for 3600 s"]


def test_other_lines_count_and_the_innermost_work_is_named() -> None:
    said: list[str] = []
    clock = Clock()
    heart = Heartbeat(said.append, silence_s=10, clock=clock)

    def passed(seconds: float) -> list[str]:
        clock.seconds += seconds
        heart.look()
        new, said[:] = said[:], []
        return new

    assert passed(60) == []  # nothing is being done
    with heart.doing("training"):
        assert passed(5) == ["training, for 5 s"]  # silent for 65 s
        heart.spoke()
        assert passed(9) == []
        with heart.doing("starting the workers"):
            assert passed(1) == ["starting the workers"]  # just begun
            heart.now("step 3")
            assert passed(11) == ["step 3, for 11 s"]
        assert passed(10) == ["training, for 36 s"]
    assert passed(100) == []
    with pytest.raises(KeyError), heart.doing("that fails"):
        raise KeyError
    assert passed(100) == []


def test_lines_of_the_log_are_signs_of_life(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(heartbeat, "LOOK_S", 0.01)
    monkeypatch.setattr(heartbeat.HEART, "_clock", clock)
    monkeypatch.setattr(heartbeat.HEART, "_spoken", 0.0)
    log.configure()
    shown = ""
    with heartbeat.beating(silence_s=10), heartbeat.doing("waiting for Godot"):
        for _ in range(20):
            clock.seconds += 9
            heartbeat.HEART.look()
            logging.getLogger("pipeline.train").info("step")
        assert "Godot" not in capsys.readouterr().out
        clock.seconds += 10
        end = time.monotonic() + 60
        while not shown and time.monotonic() < end:  # the thread looks
            time.sleep(0.01)
            shown = capsys.readouterr().out
        heartbeat.HEART.look()  # it has been said
    shown += capsys.readouterr().out
    assert shown == "still       waiting for Godot, for 190 s\n"


def test_who_has_just_begun_speaks_soon() -> None:
    said: list[tuple[float, str]] = []
    clock = Clock()
    heart = Heartbeat(lambda line: said.append((clock.seconds, line)), clock=clock)
    heart.first_after(heartbeat.FIRST_S)
    with heart.doing("loading the libraries"):
        while clock.seconds < 60:
            clock.seconds += LOOK_S
            heart.look()
    assert said[0][0] <= 5
    assert 15 < said[1][0] - said[0][0] < 20


def test_a_line_of_progress_has_a_word_on_all_that_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log.configure()
    monkeypatch.setattr(heartbeat.HEART, "rest", lambda left: f" | all {(left or 0) + 60:.0f} s")
    with heartbeat.doing("training"):
        heartbeat.now("step 3 of 9", left_s=5.0)
        heartbeat._said("step 3 of 9")
        heartbeat.now("counting")
        heartbeat._said("counting")
    assert capsys.readouterr().out == (
        "still       step 3 of 9 | all 65 s\nstill       counting | all 60 s\n"
    )


def test_what_was_done_meanwhile_is_no_longer_left() -> None:
    clock = Clock()
    heart = Heartbeat(print, clock=clock)
    with heart.doing("training"):
        heart.now("step 3 of 9", left_s=30.0)
        with heart.doing("saving"):
            assert heart.left_s is None
            clock.seconds += 12
        assert heart.left_s == 18
        with heart.doing("saving"):
            clock.seconds += 60
        assert heart.left_s == 0
