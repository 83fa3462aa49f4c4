"""Lines and the stop wish between driver and workers."""

from __future__ import annotations

import logging
import threading
import time

import ray

from pipeline.control import Control, RemoteLines, console


def test_lines_keep_their_order_and_level() -> None:
    control = Control()
    control.say(logging.INFO, "one")
    control.say(logging.WARNING, "two")
    assert control.listen(0) == [(logging.INFO, "one"), (logging.WARNING, "two")]
    assert control.listen(0) == []


def test_wait_stop_returns_when_asked() -> None:
    control = Control()
    answered: list[bool] = []
    waiter = threading.Thread(target=lambda: answered.append(control.wait_stop()), daemon=True)
    waiter.start()
    time.sleep(0.05)
    assert not answered
    control.stop()
    waiter.join(5)
    assert answered == [True]


def test_a_workers_log_reaches_the_drivers(ray_cluster: None) -> None:
    actor = ray.remote(Control).options(num_cpus=0, max_concurrency=4).remote()
    seen: list[tuple[int, str]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((record.levelno, record.getMessage()))

    driver = logging.getLogger("test.driver")
    driver.setLevel(logging.INFO)
    driver.propagate = False
    driver.addHandler(Keep())

    @ray.remote(num_cpus=0)
    def work(control: Control) -> None:
        log = logging.getLogger("test.worker")
        log.setLevel(logging.INFO)
        log.handlers[:] = [RemoteLines(control)]
        log.info("step %d", 1)
        log.error("step %d", 2)

    with console(actor, driver):
        ray.get(work.remote(actor))
        ray.get(actor.listen.remote(0.0))  # whatever is said before is in the queue by now
        deadline = time.monotonic() + 10
        ray.get(work.remote(actor))
        while len(seen) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    ray.kill(actor)
    assert (logging.INFO, "step 1") in seen
    assert (logging.ERROR, "step 2") in seen
