"""CPU, memory, network and GPU of this machine, sampled beside the run.

Not by MLflow's own sampler, which has the same names: it sends to a server at once, where these go
to the journal first and outlive a dead server, and it loads MLflow (4 s, 160 MB) in every worker.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from pipeline.track.journal import now_ms

log = logging.getLogger("pipeline.track")

INTERVAL_S = 10.0


class SystemMetrics(threading.Thread):
    """Writes a `system` line every 10 s; step is seconds since the stage began.

    The names are those of MLflow's own sampler, which its System metrics page expects.

    Args:
        write: takes the fields of a line.
        began: when the stage did, in milliseconds since 1970; called once, in the thread.
        interval: seconds between lines.
    """

    def __init__(
        self,
        write: Callable[..., None],
        began: Callable[[], int],
        interval: float = INTERVAL_S,
    ) -> None:
        super().__init__(name="system-metrics", daemon=True)
        self._write, self._began_ms, self._interval = write, began, interval
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        """Until close(): sample, write, wait. An error ends the sampling, not the run."""
        try:
            begin = self._began_ms()
            gpu = _gpu_sampler()
            while not self._done.wait(self._interval):
                values = {f"system/{k}": v for k, v in {**sample(), **gpu()}.items()}
                now = now_ms()
                self._write(step=(now - begin) // 1000, ts=now, system=values)
        except Exception as error:
            log.warning("no system metrics: %s", error)

    def close(self) -> None:
        """Ends the sampling."""
        self._done.set()
        self.join(5.0)


def sample() -> dict[str, float]:
    """CPU, memory, disk and network now, for the whole machine."""
    import psutil

    memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
    network = psutil.net_io_counters()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "network_receive_megabytes": network.bytes_recv / 1e6 if network else 0.0,
        "network_transmit_megabytes": network.bytes_sent / 1e6 if network else 0.0,
    }


def _gpu_sampler() -> Callable[[], dict[str, float]]:
    """A function that reads the GPUs, or one that returns nothing where there are none."""
    try:
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # no package, no driver, no permission: each has its own error class
        return dict

    def read_gpus() -> dict[str, float]:
        values: dict[str, Any] = {}
        for i, handle in enumerate(handles):
            use = pynvml.nvmlDeviceGetUtilizationRates(handle)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            values[f"gpu_{i}_utilization_percentage"] = float(use.gpu)
            values[f"gpu_{i}_memory_usage_megabytes"] = memory.used / 1e6
            values[f"gpu_{i}_memory_usage_percentage"] = 100.0 * memory.used / memory.total
        return values

    return read_gpus
