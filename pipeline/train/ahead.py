"""The views of the next step, made while this one runs.

On a GPU a thread joins the next step's chunks, copies them, changes their colours and looks up the
masked patches, on a CUDA stream of its own. Its work waits for nothing of the step that runs, and
the step waits for it on the device: by an event, not by the host. At most one step's views are
there besides those in use.

On a CPU a thread would take the core of a decoder, so views are made between the steps
(benchmarks/RESULTS.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from itertools import islice
from queue import SimpleQueue

import torch
from torch import Tensor

from pipeline.train.speed.parts import part
from pipeline.views.batch import Apply, Batch, Views, crop_major
from pipeline.views.masked import PatchFinder
from pipeline.views.photometric import PhotometricSpec

CLOSE_S = 10.0  # a thread that waits for images so long at the end is left alone; it is a daemon


@dataclass
class ViewMaker:
    """Turns a micro batch into views on the training device."""

    spec: PhotometricSpec  # the one the stream draws with
    colours: Apply
    device: torch.device
    dtype: torch.dtype  # of the views
    patches: PatchFinder

    def __call__(self, batch: Batch) -> Views:
        """The views of a micro batch; the host waits for nothing."""
        if self.device.type != "cpu":  # a bad image then asks for no other kernel of the loss
            batch = replace(batch, weights=batch.weights_or_ones)
        with part("colour"):
            masked = self.patches(crop_major(batch.masks), batch.weights).to(self.device)
            return batch.to(self.device).views(self.spec, self.dtype, self.colours, masked)


@dataclass(frozen=True)
class StepImages:
    """The images of one step on one worker."""

    batches: list[Batch]  # on the host: what the log counts and the first picture shows
    views: Callable[[], list[Views]]  # of each micro batch; to be called once


class Between:
    """The images of one step after the other; their views are made when they are asked for."""

    def __init__(self, stream: Iterator[Batch], parts: int, make: ViewMaker) -> None:
        """Of a stream of micro batches, `parts` a step."""
        self._stream, self._parts, self._make = stream, parts, make

    def next(self) -> StepImages:
        """The images of the next step; waits for the stream.

        Raises:
            StopIteration: there is none.
        """
        batches = _step(self._stream, self._parts)
        return StepImages(batches, lambda: [self._make(batch) for batch in batches])

    def close(self) -> None:
        """Gives up the stream."""
        self._stream = iter(())


def images_of(stream: Iterator[Batch], parts: int, make: ViewMaker) -> Between | Ahead:
    """The images of the steps of a run, `parts` micro batches each."""
    return (Ahead if make.device.type == "cuda" else Between)(stream, parts, make)


class Ahead:
    """The same, where the views of the next step are made on a thread while this one runs.

    The first two are made when they are asked for: the first step compiles, and so does the thread.
    """

    def __init__(self, stream: Iterator[Batch], parts: int, make: ViewMaker) -> None:
        """Of a stream of micro batches, `parts` a step; only the thread reads it from now on."""
        self._stream, self._parts, self._make = stream, parts, make
        self._lane = _CudaLane(make.device) if make.device.type == "cuda" else _HostLane()
        self._requests = threading.Semaphore(0)
        self._ready: SimpleQueue[_StepViews | BaseException] = SimpleQueue()
        self._steps, self._closed = 0, False
        self._thread = threading.Thread(target=self._run, name="next-views", daemon=True)
        self._thread.start()

    def next(self) -> StepImages:
        """The images of the next step, whose views are ready or under way on the device; waits for
        them.

        Raises:
            StopIteration: there is none.
            BaseException: what the stream raised, or the making of views.
        """
        self._steps += 1
        if self._steps <= 2:
            self._requests.release()
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            self._ready.put(ready)  # who asks again is told again
            raise ready
        if self._steps >= 2:
            self._requests.release()
        return StepImages(ready.batches, lambda: self._lane.handed_over(ready))

    def close(self) -> None:
        """Ends the thread. What it has made or is about to make is given up; these images count for
        nothing, as a run that goes on reads them again.
        """
        self._closed = True
        self._requests.release()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        try:
            with self._lane.making():  # joining too: memory is pinned for the device that is set
                while self._requests.acquire() and not self._closed:
                    batches = _step(self._stream, self._parts)
                    views = [self._make(batch) for batch in batches]
                    self._ready.put(_StepViews(batches, views, self._lane.event()))
                    del batches, views  # held by nobody here while they are used
        except BaseException as error:  # handed on by `next`
            self._ready.put(error)
        finally:
            self._stream = iter(())  # what reads for it ends too


@dataclass
class _StepViews:
    batches: list[Batch]
    views: list[Views]
    event: torch.cuda.Event | None  # of the last thing that was done for the views


class _HostLane:
    """Where views are there when the call that makes them returns."""

    def making(self) -> AbstractContextManager[object]:
        return nullcontext()

    def event(self) -> torch.cuda.Event | None:
        return None

    def handed_over(self, ready: _StepViews) -> list[Views]:
        """The views, which nothing else holds from now on."""
        views, ready.views = ready.views, []
        return views


class _CudaLane(_HostLane):
    """A CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def making(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)  # and its device: a thread begins with device 0

    def event(self) -> torch.cuda.Event | None:
        event: torch.cuda.Event = self._stream.record_event()
        return event

    def handed_over(self, ready: _StepViews) -> list[Views]:
        """From here on work on the current stream begins when the views are there, and their memory
        is used again when that work is done.
        """
        here = torch.cuda.current_stream(self._device)
        assert ready.event is not None
        here.wait_event(ready.event)
        views = super().handed_over(ready)
        for tensor in tensors_of(views):
            tensor.record_stream(here)
        return views


def tensors_of(views: Sequence[Views]) -> list[Tensor]:
    """All tensors that views hold."""
    values = (getattr(each, field.name) for each in views for field in fields(each))
    flat = (x for value in values for x in (value if isinstance(value, tuple) else (value,)))
    return [x for x in flat if isinstance(x, Tensor)]


def _step(stream: Iterator[Batch], parts: int) -> list[Batch]:
    batches = list(islice(stream, parts))
    if len(batches) < parts:
        raise StopIteration
    return batches
