"""Lines and requests between driver and workers."""

from __future__ import annotations

import logging
import threading
import time

import ray
from hypothesis import given
from hypothesis import strategies as st

from pipeline.driver.mailbox import (
    InOrder,
    Mailbox,
    RemoteLines,
    Report,
    Reports,
    console,
    reporting,
)
from pipeline.heartbeat import HEART, doing


def test_lines_keep_their_order_and_level() -> None:
    mailbox = Mailbox()
    mailbox.say(logging.INFO, "one")
    mailbox.say(logging.WARNING, "two")
    assert mailbox.listen(0) == [(logging.INFO, "one", None), (logging.WARNING, "two", None)]
    assert mailbox.listen(0) == []


def test_wait_request_returns_when_one_comes() -> None:
    mailbox = Mailbox()
    acknowledged: list[str] = []
    waiter = threading.Thread(
        target=lambda: acknowledged.append(mailbox.wait_request()), daemon=True
    )
    waiter.start()
    time.sleep(0.05)
    assert not acknowledged
    mailbox.stop()
    waiter.join(5)
    assert acknowledged == ["stop"]


def test_requests_are_acknowledged_once_and_stop_is_for_good() -> None:
    mailbox = Mailbox()
    assert mailbox.wait_request(0) == "" and mailbox.acknowledged() == -1
    mailbox.request("save")
    mailbox.request("move")  # the last one counts
    assert mailbox.wait_request(0) == "move"
    assert not mailbox.acknowledge("save", 3) and mailbox.acknowledged() == -1
    assert mailbox.acknowledge("move", 4) and mailbox.acknowledged() == 4
    assert mailbox.wait_request(0) == "" and not mailbox.acknowledge("move", 5)
    mailbox.request("move")
    assert mailbox.acknowledged() == -1
    mailbox.request("")  # taken back
    assert not mailbox.acknowledge("move", 6)
    mailbox.stop()
    mailbox.request("move")
    mailbox.request("")
    assert mailbox.wait_request(0) == "stop"
    assert mailbox.acknowledge("stop", 7) and mailbox.wait_request(0) == "stop"


def test_a_workers_log_reaches_the_drivers(ray_cluster: None) -> None:
    actor = ray.remote(Mailbox).options(num_cpus=0, max_concurrency=4).remote()
    seen: list[tuple[int, str]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((record.levelno, record.getMessage()))

    driver = logging.getLogger("test.driver")
    driver.setLevel(logging.INFO)
    driver.propagate = False
    driver.addHandler(Keep())

    @ray.remote(num_cpus=0)
    def work(mailbox: Mailbox) -> None:
        log = logging.getLogger("test.worker")
        log.setLevel(logging.INFO)
        log.handlers[:] = [RemoteLines(mailbox)]
        log.info("step %d", 1)
        log.error("step %d", 2)

    with doing("work: the workers start"), console(actor, driver, "work: no word"):
        assert innermost() == "work: the workers start"
        ray.get(work.remote(actor))
        ray.get(actor.listen.remote(0.0))  # whatever is said before is in the queue by now
        deadline = time.monotonic() + 10
        ray.get(work.remote(actor))
        while len(seen) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert innermost() == "work: no word"
    ray.kill(actor)
    assert (logging.INFO, "step 1") in seen
    assert (logging.ERROR, "step 2") in seen


def innermost() -> str:
    """What the heartbeat would say."""
    return HEART._doing[-1][0]


class Recorder:
    """A tracker that writes down its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.calls.append(("metrics", step))

    def resume(self, step: int) -> None:
        self.calls.append(("resume", step))


def report(source: str, number: int, method: str = "metrics") -> Report:
    arguments = (number, {"x": 1.0}) if method == "metrics" else (number,)
    return Report(source, number, method, arguments, {})


@given(st.permutations(range(8)), st.integers(1, 4))
def test_reports_are_made_in_their_order(order: list[int], size: int) -> None:
    recorder = Recorder()
    calls = InOrder(recorder)
    reports = [report("a", number) for number in order]
    for at in range(0, len(reports), size):
        calls.take(reports[at : at + size])
        done = [step for _, step in recorder.calls]
        assert done == list(range(len(done)))
    assert len(recorder.calls) == 8


def test_a_worker_that_took_over_is_heard_alone() -> None:
    recorder = Recorder()
    calls = InOrder(recorder)
    calls.take([report("a", 0), report("a", 2)])  # 1 died with its worker
    calls.take([report("b", 1), report("b", 0, "resume"), report("a", 1), report("a", 3)])
    calls.finish()
    assert recorder.calls == [("metrics", 0), ("metrics", 2), ("resume", 0), ("metrics", 1)]


def test_reports_of_a_worker_reach_the_drivers_tracker(ray_cluster: None) -> None:
    actor = ray.remote(Mailbox).options(num_cpus=0, max_concurrency=6).remote()
    recorder = Recorder()

    @ray.remote(num_cpus=0)
    def work(mailbox: Mailbox) -> None:
        reports = Reports(mailbox)
        reports.send("resume", 3)
        for step in range(3, 203):
            reports.send("metrics", step, values={"x": 1.0})
        reports.wait(60)

    with reporting(actor, recorder):
        ray.get(work.remote(actor))
    assert recorder.calls == [("resume", 3), *(("metrics", step) for step in range(3, 203))]
    ray.kill(actor)
