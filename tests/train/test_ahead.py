"""Views of the next step made on a thread: the same bits, one step ahead, and a clean end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.train.ahead import Ahead, Between, ViewMaker, images_of, tensors_of
from pipeline.views.batch import Batch, Views
from pipeline.views.masked import PatchFinder
from pipeline.views.photometric import (
    PHOTOMETRIC_DRAWS,
    CompiledPhotometric,
    PhotometricSpec,
    apply_photometric,
    draw_photometric,
)

SPEC = PhotometricSpec()
IMAGES, LOCAL, PARTS = 4, 2, 2


def batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)

    def crops(count: int, side: int) -> np.ndarray:
        return rng.integers(0, 256, (IMAGES, count, side, side, 3), np.uint8)

    chunk = {
        "image_ids": rng.integers(0, 256, (IMAGES, 16), np.uint8),
        "global_crops": crops(2, 28),
        "local_crops": crops(LOCAL, 14),
        "photometric": draw_photometric(rng.random((IMAGES, 2 + LOCAL, PHOTOMETRIC_DRAWS)), SPEC),
        "masks": rng.random((IMAGES, 2, 4)) < 0.4,
        "labels": np.full(IMAGES, -1),
        "valid": np.arange(IMAGES) != (seed if seed == 3 else -1),
    }
    return Batch.from_chunk(chunk)


def maker(device: str = "cpu") -> ViewMaker:
    patches = PatchFinder(16)
    return ViewMaker(SPEC, apply_photometric, torch.device(device), torch.float32, patches)


class Stream:
    """Micro batches that can be counted, held back or broken."""

    def __init__(self, steps: int, broken_at: int = -1) -> None:
        self.steps, self.broken_at = steps, broken_at
        self.taken, self.closed = 0, threading.Event()
        self.asked, self.gate = 0, threading.Event()
        self.gate.set()

    def __iter__(self) -> Iterator[Batch]:
        try:
            for number in range(self.steps * PARTS):
                self.asked += 1
                self.gate.wait()
                if number == self.broken_at:
                    raise OSError("the feeder is gone")
                self.taken += 1
                yield batch(number)
        finally:
            self.closed.set()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name == "next-views"]


def batched(stream: Stream, parts: int) -> list[list[Batch]]:
    every = list(stream)
    return [every[i : i + parts] for i in range(0, len(every), parts)]


def settled(condition: Any) -> None:
    """Waits until it holds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_thread_makes_the_bits_that_are_made_between_the_steps() -> None:
    between = Between(iter(Stream(5)), PARTS, maker())
    ahead = Ahead(iter(Stream(5)), PARTS, maker())
    for _ in range(5):
        one, two = between.next(), ahead.next()
        for a, b in zip(one.batches, two.batches, strict=True):
            assert torch.equal(a.image_ids, b.image_ids) and a.bad == b.bad
        views = one.views(), two.views()
        assert len(views[0]) == PARTS
        ours, theirs = (tensors_of(each) for each in views)
        assert len(ours) == len(theirs) >= 4 * PARTS
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        for v in views[1]:
            assert v.masked is not None and v.masked.rows == int(v.masks.sum())
    for images in (between, ahead):
        for _ in range(2):
            with pytest.raises(StopIteration):
                images.next()
        images.close()


def test_exactly_one_step_is_made_ahead_and_none_before_the_first_is_done() -> None:
    stream = Stream(6)
    ahead = Ahead(iter(stream), PARTS, maker())
    for step, made in enumerate([1, 3, 4, 5, 6, 6]):
        ahead.next()
        settled(lambda m=made: stream.taken == m * PARTS)
        time.sleep(0.05)  # the thread does not go on by itself
        assert stream.taken == made * PARTS, step
    ahead.close()
    assert stream.closed.is_set()


@pytest.mark.parametrize("broken_at", [0, 5])
def test_an_error_of_the_thread_reaches_who_asks(broken_at: int) -> None:
    ahead = Ahead(iter(Stream(4, broken_at)), PARTS, maker())
    for _ in range(broken_at // PARTS):
        ahead.next()
    for _ in range(2):
        with pytest.raises(OSError, match="the feeder is gone"):
            ahead.next()
    ahead.close()

    def breaks(*_: Any) -> Tensor:
        raise RuntimeError("out of memory")

    make = maker()
    make.colours = breaks
    ahead = Ahead(iter(Stream(4)), PARTS, make)
    with pytest.raises(RuntimeError, match="out of memory"):
        ahead.next()
    ahead.close()


def test_it_ends_before_any_step_and_with_a_step_that_nobody_takes() -> None:
    for steps in (0, 1, 2, 3):
        stream = Stream(9)
        ahead = Ahead(iter(stream), PARTS, maker())
        for _ in range(steps):
            ahead.next()
        ahead.close()
        ahead.close()  # the loop's end, and what is around it
        assert stream.closed.is_set() or not steps


def test_at_the_end_images_that_do_not_come_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.train.ahead.CLOSE_S", 0.05)
    stream = Stream(9)
    ahead = Ahead(iter(stream), PARTS, maker())
    ahead.next()
    ahead.next()
    settled(lambda: stream.taken == 3 * PARTS)
    stream.gate.clear()
    ahead.next()
    settled(lambda: stream.asked == 3 * PARTS + 1)
    ahead.close()
    assert not stream.closed.is_set()
    stream.gate.set()  # the images come after all: it ends then, and makes no views of them
    assert stream.closed.wait(30)
    settled(lambda: not [t for t in threading.enumerate() if t.name == "next-views"])


def test_views_are_handed_over_and_held_by_nobody_else() -> None:
    import gc
    import weakref

    ahead = Ahead(iter(Stream(3)), PARTS, maker())
    images = ahead.next()
    views = images.views()
    watched = weakref.ref(views[0].global_views)
    assert len(views) == PARTS and images.views() == []
    del views
    gc.collect()
    assert watched() is None
    ahead.close()


def test_every_tensor_of_views_is_known_to_the_stream_that_uses_it() -> None:
    views = maker()(batch(3))
    assert views.weights is not None and views.masked is not None
    held = []
    for field in fields(Views):
        value = getattr(views, field.name)
        held += [x for x in (value if isinstance(value, tuple) else [value])]
    tensors = [x for x in held if isinstance(x, Tensor)]
    assert len(tensors) == 5  # another field needs its tensors marked too
    ours = tensors_of([views])
    assert all(a is b for a, b in zip(ours, tensors, strict=True))


def test_on_a_gpu_the_step_waits_by_an_event_and_memory_is_kept_until_it_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a GPU: streams and events that note what is asked of them."""
    said: list[Any] = []

    class Lane:
        def __init__(self, device: torch.device) -> None:
            said.append(("new stream", str(device)))

        def record_event(self) -> str:
            said.append(("event", threading.current_thread().name))
            return "event"

        def __enter__(self) -> None:
            said.append(("on stream", threading.current_thread().name))

        def __exit__(self, *_: Any) -> None: ...

    class Main:
        def wait_event(self, event: str) -> None:
            said.append(("wait", event))

    monkeypatch.setattr(torch.cuda, "Stream", Lane)
    monkeypatch.setattr(torch.cuda, "stream", lambda lane: lane)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, to: said.append((id(x), to)))
    main, make = Main(), maker("cuda:1")

    class OnCpu(ViewMaker):
        def __call__(self, batch: Batch) -> Views:
            said.append(("made", threading.current_thread().name))
            return maker()(batch)

    make.__class__ = OnCpu
    ahead = images_of(iter(Stream(1)), PARTS, make)
    assert isinstance(ahead, Ahead)
    images = ahead.next()
    thread = "next-views"
    made = [("made", thread)] * PARTS
    before = [("new stream", "cuda:1"), ("on stream", thread), *made, ("event", thread)]
    assert said == before
    views = images.views()
    used = [(id(x), main) for x in tensors_of(views)]
    assert len(used) >= 4 * PARTS and said == [*before, ("wait", "event"), *used]
    ahead.close()


@pytest.mark.gpu
def test_on_a_gpu_views_are_whole_however_long_a_step_computes() -> None:
    """While the step before keeps the device, and memory that is given back is asked for again."""
    make = maker("cuda")
    make.colours = CompiledPhotometric()
    expected = [[make(one) for one in two] for two in batched(Stream(8), PARTS)]
    torch.cuda.synchronize()
    ahead, busy = images_of(iter(Stream(8)), PARTS, make), torch.randn(4096, 4096, device="cuda")
    sums: list[list[Tensor]] = []
    for _ in expected:
        views = ahead.next().views()
        for _ in range(20):
            busy = busy @ busy / busy.norm()
        sums.append([x.double().sum() for x in tensors_of(views)])
        del views  # long before the device comes to it
    ahead.close()
    for own, views in zip(sums, expected, strict=True):
        theirs = [x.double().sum() for x in tensors_of(views)]
        assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))


def test_a_cpu_has_no_thread() -> None:
    assert isinstance(images_of(iter(Stream(1)), PARTS, maker()), Between)
