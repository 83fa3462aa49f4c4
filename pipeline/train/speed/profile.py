"""A trace of some steps of one worker, which Perfetto opens, and what the parts of a step took."""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, record_function
from torch.profiler.profiler import _KinetoProfile

from pipeline.errors import one_line
from pipeline.storage.places import resolve_uri
from pipeline.storage.transfer import write_bytes_atomic
from pipeline.train.speed import parts
from pipeline.train.speed.shares import shares_of
from pipeline.uri import Place, join, public

log = logging.getLogger("pipeline.train")


class Profile:
    """Takes the trace of the steps from a first to a last one, and writes it into a folder.

    Steps count from 1, as in the step lines. Before and after these steps it costs nothing but the
    call; the step before the first one gets the profiler ready, which takes a second or two.
    """

    def __init__(self, steps: tuple[int, int] | None, done: int, folder: Place) -> None:
        """Of a run that has done so many steps when it starts or goes on."""
        self.steps, self.folder = steps, folder
        self.traced: list[int] = []
        self._profiler: _KinetoProfile | None = None
        self._step: Any = None
        if steps and done >= steps[1]:
            self.steps = None
            log.info(
                "profile     train.profile_steps=[%d,%d] lies before step %d, from where this run "
                "goes on: no trace",
                *steps,
                done,
            )

    def begin(self, step: int) -> None:
        """Before a step, its number."""
        if self.steps is None:
            return
        first, last = self.steps
        if self._profiler is None and first - 1 <= step <= last:
            self._profiler = _profiler()
            self._profiler.prepare_trace()
        if self._profiler and first <= step <= last:
            if not self.traced:
                self._profiler.start_trace()
                parts.record(True)
            self.traced.append(step)
            self._step = record_function(f"step {step}")
            self._step.__enter__()

    def end(self) -> None:
        """After the step."""
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None
            if self.steps and self.traced[-1] == self.steps[1]:
                self.close()

    def close(self) -> None:
        """Ends the trace and writes what it has; nothing where there is none under way."""
        parts.record(False)
        profiler, self._profiler, self.steps = self._profiler, None, None
        if profiler is None or not self.traced:
            return
        if self._step is not None:  # a step that was not finite
            self._step.__exit__(None, None, None)
            self._step = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profiler.stop_trace()
        name = f"steps-{self.traced[0]}-{self.traced[-1]}"
        try:
            with TemporaryDirectory() as temporary:
                local = Path(temporary) / f"{name}.json.gz"
                profiler.export_chrome_trace(str(local))
                content = local.read_bytes()
            shares = shares_of(json.loads(gzip.decompress(content)))
            self._write(f"{name}.json.gz", content)
            if shares:
                self._write(f"{name}.md", shares.table().encode())
        # a full disk cuts a trace short, which its reader notices: the run must not end by it
        except (OSError, EOFError, ValueError, RuntimeError) as error:
            log.error("the trace could not be written (%s); going on", one_line(error))
            return
        finally:
            del profiler
        place = public(str(join(self.folder, f"{name}.json.gz")))
        log.info("profile     %s (ui.perfetto.dev opens it)", place)
        if shares:
            log.info("profile     %s", shares.line())

    def _write(self, name: str, content: bytes) -> None:
        fs, path = resolve_uri(str(join(self.folder, name)))
        write_bytes_atomic(content, fs, path)


def _profiler() -> _KinetoProfile:
    """Operations of all threads and kernels; without shapes, memory and stacks, which cost more."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else it writes about its starts and ends
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return _KinetoProfile(
        activities=activities,
        # the thread that makes views ahead, DDP's, autograd's
        experimental_config=_ExperimentalConfig(profile_all_threads=True),
    )
