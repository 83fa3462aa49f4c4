"""Groups of workers at the feeder, with streams that are stand-ins: no Ray runs here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipeline.plan.streams import streams_for
from pipeline.stream import feeder as module
from pipeline.stream.dealer import DecodeTasks, RunSteps
from pipeline.stream.feeder import Feeder, Group, StreamRun


class Streams:
    """Dealers that answer at once, unless `hold` is cleared; who was ended is noted."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.hold, self.ended = threading.Event(), []
        self.error: Exception | None = None
        self.hold.set()
        patch.setattr(Feeder, "_launch", lambda feeder, group: self.launch(feeder, group))
        patch.setattr(ray, "get", lambda calls: [call() for call in calls])
        patch.setattr(ray, "kill", self.ended.append)
        patch.setattr(module, "end_split", lambda part: None)

    def launch(self, feeder: Feeder, group: Group) -> None:
        nodes = [group.nodes[rank] for rank in range(len(group.nodes))]
        group.streams = streams_for(nodes, feeder.tasks.at_once)
        group.dealers = [self.dealer(group, stream) for stream in group.streams]
        group.actors = [*group.dealers]

    def dealer(self, group: Group, stream: Any) -> Any:
        def open_at(first: int) -> Callable[[], Any]:
            def call() -> Any:
                assert self.hold.wait(20)
                if self.error:
                    raise self.error
                ranks = range(stream.first, stream.last)
                return first + 5, [f"{group.group_id} {first} {rank}" for rank in ranks]

            return call

        return SimpleNamespace(open=SimpleNamespace(remote=open_at), node=stream.node)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(monkeypatch)


def feeder_of() -> Feeder:
    return Feeder(StreamRun([], [], [], 8, 2, RunSteps(20)), DecodeTasks(1.0, 4), 4)


def asked(feeder: Feeder, group_id: str, step: int, nodes: list[str]) -> list[Any]:
    """What each worker of a group gets, the last one first; rank 0 opens."""
    with ThreadPoolExecutor(16) as pool:
        ranks = list(reversed(range(len(nodes))))
        parts = [pool.submit(feeder.iterator, group_id, step, r, nodes[r]) for r in ranks]
        pool.submit(feeder.open, group_id, step, len(nodes))
        return [part.result(20) for part in reversed(parts)]


def test_each_worker_gets_its_part_of_its_stream(streams: Streams) -> None:
    feeder = feeder_of()
    nodes = ["a", "a", "b", "c"]
    for step in (0, 5):
        expected = [(step + 5, f"one {step} {rank}") for rank in range(4)]
        assert asked(feeder, "one", step, nodes) == expected
    assert [s.node for s in feeder.group.streams] == ["a", "b", "c"]
    feeder.open("one", 20, 4)  # behind the last step
    assert set(feeder.group.segments) == {0, 5}


def test_a_new_group_ends_the_streams_of_the_old_one(streams: Streams) -> None:
    feeder = feeder_of()
    asked(feeder, "one", 0, ["a", "b"])
    old = [*feeder.group.dealers]
    assert asked(feeder, "two", 0, ["c"]) == [(5, "two 0 0")]
    assert streams.ended == old
    with pytest.raises(RuntimeError, match="taken over"):
        feeder.iterator("one", 5, 0, "a")
    feeder.open("one", 5, 2)  # a late word
    assert feeder.group.group_id == "two" and not feeder.early


def test_a_node_that_does_not_answer_holds_nothing_up(streams: Streams) -> None:
    feeder = feeder_of()
    streams.hold.clear()
    said: list[str] = []

    def wait() -> None:
        try:
            feeder.iterator("one", 0, 0, "a")
        except RuntimeError as error:
            said.append(str(error))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    opening = threading.Thread(target=feeder.open, args=("one", 0, 1), daemon=True)
    opening.start()
    while not feeder.group.dealers:
        assert opening.is_alive()
    feeder.release()  # the driver starts another group
    waiting.join(20)
    assert said == ["another group of workers has taken over"] and opening.is_alive()
    streams.hold.set()
    opening.join(20)
    assert asked(feeder, "two", 0, ["b"]) == [(5, "two 0 0")]


def test_what_stops_a_stream_from_starting_reaches_its_workers(streams: Streams) -> None:
    feeder = feeder_of()
    streams.error = ValueError("no such set")
    with pytest.raises(ValueError, match="no such set"):
        asked(feeder, "one", 0, ["a", "b"])


def test_workers_that_went_before_their_group_opened_wait_no_longer(streams: Streams) -> None:
    feeder = feeder_of()
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(feeder.iterator, "one", 0, 1, "a")
        while not feeder.early:
            assert not waiting.done()
        feeder.release()  # their group ended before its first worker opened
        with pytest.raises(RuntimeError, match="taken over"):
            waiting.result(20)
    feeder.open("one", 0, 2)  # a late word
    assert asked(feeder, "two", 0, ["b"]) == [(5, "two 0 0")] and not feeder.early
