"""Where the time goes: images/s, the share spent waiting for data, and the end of the run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Measures a window of steps (between two readings) and the run as a whole.

    Args:
        first_step: the step that the run starts or resumes at.
        steps: length of the run.
        global_batch: images in a step, over all workers.
        flops_per_image: of one training step, forward and backward, student and teacher.
        peak_flops: of all training devices together; 0 where unknown (no `perf/mfu` then).
    """

    WARMUP_STEPS = 5  # compilation, caches and the first blocks: not typical of what follows

    def __init__(
        self,
        first_step: int,
        steps: int,
        global_batch: int,
        flops_per_image: float,
        peak_flops: float,
    ) -> None:
        self.first_step, self.steps, self.global_batch = first_step, steps, global_batch
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
        self.done = 0
        self.settled: tuple[int, float] | None = None
        self.settled_wait = 0.0
        self.window_start = time.perf_counter()
        self.window_steps, self.window_wait, self.total_wait = 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        begin = time.perf_counter()
        yield
        waited = time.perf_counter() - begin
        self.window_wait += waited
        self.total_wait += waited

    def tick(self) -> None:
        """One step is over."""
        self.done += 1
        self.window_steps += 1
        if self.done == self.WARMUP_STEPS:
            self.settled = (self.done, time.perf_counter())
            self.settled_wait = self.total_wait

    def read(self) -> dict[str, float]:
        """The metrics since the last reading, and starts a new window."""
        now = time.perf_counter()
        seconds = max(now - self.window_start, 1e-9)
        steps = max(self.window_steps, 1)
        images_per_s = steps * self.global_batch / seconds
        found = {
            "perf/images_per_s": images_per_s,
            "perf/step_s": seconds / steps,
            "perf/data_wait_fraction": min(1.0, self.window_wait / seconds),
        }
        if self.peak_flops:
            found["perf/mfu"] = images_per_s * self.flops_per_image / self.peak_flops
        self.window_start, self.window_steps, self.window_wait = now, 0, 0.0
        return found

    def summary(self) -> dict[str, float]:
        """images/s and wait fraction of the run so far, without its first steps."""
        if self.settled is None:
            return {}
        steps, since = self.settled
        seconds = max(time.perf_counter() - since, 1e-9)
        return {
            "images_per_s": (self.done - steps) * self.global_batch / seconds,
            "data_wait_fraction": min(1.0, (self.total_wait - self.settled_wait) / seconds),
        }

    def eta(self) -> str:
        """Time to the end of the whole run, from the mean step after the first few."""
        if self.settled is None or self.done <= self.settled[0]:
            return "--"
        steps, since = self.settled
        per_step = (time.perf_counter() - since) / (self.done - steps)
        return duration((self.steps - self.first_step - self.done) * per_step)


def duration(seconds: float) -> str:
    """`14h 21m`, `3m 05s` or `42s`."""
    whole = round(max(0.0, seconds))
    if whole >= 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 60}m {whole % 60:02d}s" if whole >= 60 else f"{whole}s"
