"""One node with GPUs, looked at from itself. Nothing here waits longer than its limit: what hangs
is ended, with all that it started, and said.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.doctor.gpu_probe import MARK
from pipeline.doctor.gpu_report import (
    SHARED_BYTES,
    Gpu,
    NodeReport,
    Reduced,
    driver_too_old,
    network,
)
from pipeline.driver.compiler import tried

SMI_S = 30.0
KERNEL_S = 240.0  # torch is imported from a cold disk, CUDA starts, Triton compiles
REDUCE_S = 120.0
ENDED_S = 10.0  # for a process to be gone that was killed
SHARED_MEMORY = Path("/dev/shm")
DRIVER = Path("/proc/driver/nvidia/version")
QUERY = "--query-gpu=index,name,driver_version,memory.used"
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ran:
    """A process that ended by itself, or was ended at its limit."""

    code: int | None  # None: it was ended
    output: str

    @property
    def result(self) -> dict[str, Any] | None:
        """What it reported, where it came so far."""
        lines = [line for line in self.output.splitlines() if line.startswith(MARK)]
        return json.loads(lines[-1].removeprefix(MARK)) if lines and self.code == 0 else None

    def reason(self, limit_s: float) -> str:
        """Why there is no result."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        warned = [line.partition("NCCL WARN ")[2] for line in lines if "NCCL WARN " in line]
        if self.code is None:
            return f"no end after {limit_s:.0f} s{f', {warned[-1][:200]}' if warned else ''}"
        said = warned or [line for line in lines if "Error" in line] or lines
        return said[-1][:200] if said else f"it ended with {self.code} and said nothing"


def run_limited(
    command: Sequence[str], limit_s: float, variables: Mapping[str, str] | None = None
) -> Ran:
    """Runs a command for so long at most; then it is killed, with all that it started."""
    try:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **(variables or {})},
            start_new_session=True,
        )
    except OSError as error:
        return Ran(127, str(error))
    try:
        output, _ = process.communicate(timeout=limit_s)
        return Ran(process.returncode, output)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # where it hangs in the driver, it stays
            return Ran(None, process.communicate(timeout=ENDED_S)[0])
        return Ran(None, "")


@dataclass(frozen=True)
class Group:
    """An all-reduce, as the processes of one node see it."""

    backend: str  # "nccl"; "gloo" on CPUs
    devices: tuple[str, ...]  # of this node, one a process
    first_rank: int
    world: int
    address: str  # tcp://host:port of rank 0; "" for a group within this node


class Node:
    """The node that this runs on: an actor on a cluster, an object here."""

    def __init__(self, reserves_none: bool = False) -> None:
        # Ray may hide all GPUs from an actor that reserves none
        if reserves_none and not os.environ.get("CUDA_VISIBLE_DEVICES", "all"):
            del os.environ["CUDA_VISIBLE_DEVICES"]

    def address(self, host: str) -> str:
        """A free port of this node, for rank 0 of a group."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return f"tcp://{host}:{listener.getsockname()[1]}"

    def report(self) -> NodeReport:
        """Everything that needs no other process of a group."""
        report = NodeReport(socket.gethostname(), tried(), shm_free=shm_free())
        smi = shutil.which("nvidia-smi")
        if smi is None and not DRIVER.exists():
            return report
        gpus, error = gpus_of(smi or "nvidia-smi")
        report = replace(report, gpus=gpus, errors=(error,) if error else (), cuda=_torch_cuda())
        ran = run_limited(_probe("kernel", "cuda"), KERNEL_S, _paths())
        return with_kernel(report, ran) if gpus else report

    def reduce(self, group: Group, limit_s: float = REDUCE_S) -> Reduced:
        """Runs this node's processes of a group."""
        address = group.address or self.address("127.0.0.1")

        def one(number: int) -> Ran:
            rank = str(group.first_rank + number)
            words = group.devices[number], rank, str(group.world), address, str(limit_s)
            command = _probe("reduce", group.backend, *words)
            # NCCL then says which network it takes, and how GPUs reach each other
            return run_limited(command, limit_s, _paths() | {"NCCL_DEBUG": "INFO"})

        with ThreadPoolExecutor(len(group.devices)) as pool:
            ran = list(pool.map(one, range(len(group.devices))))
        return reduced_of(ran, limit_s)


def reduced_of(ran: Sequence[Ran], limit_s: float) -> Reduced:
    """The slowest rank's rate, or why there is none."""
    over = next((name for one in ran if (name := network(one.output))), "")
    if failed := [one for one in ran if one.result is None]:
        # a rank that ended by itself knows more than those that waited for it
        first = min(failed, key=lambda one: one.code is None)
        return Reduced(over=over, error=first.reason(limit_s))
    return Reduced(min(one.result["gb_per_s"] for one in ran if one.result), over)


def with_kernel(report: NodeReport, ran: Ran) -> NodeReport:
    """The report with what the probe of one kernel said."""
    if (result := ran.result) is None:
        error = f"no kernel could be compiled and run: {ran.reason(KERNEL_S)}"
        return replace(report, errors=(*report.errors, error))
    report = replace(report, visible=result["gpus"], apart=result["apart"])
    if result["error"]:
        compiler = report.compiler.missing if report.compiler else ""
        if compiler or driver_too_old(report.gpus[0].driver, report.cuda):
            return report  # which says it, with what to do
        error = f"no kernel could be compiled and run: {result['error']}"
        return replace(report, errors=(*report.errors, error))
    return replace(report, kernel_s=result["seconds"])


def gpus_of(smi: str) -> tuple[tuple[Gpu, ...], str]:
    """The GPUs by nvidia-smi, and what is wrong where it does not answer."""
    ran = run_limited([smi, QUERY, "--format=csv,noheader,nounits"], SMI_S)
    if ran.code != 0:
        hint = "load the driver; in a container set NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        return (), f"nvidia-smi does not answer: {ran.reason(SMI_S)} ({hint})"
    rows = [[word.strip() for word in line.split(",")] for line in ran.output.splitlines()]
    return tuple(
        Gpu(int(row[0]), row[1], row[2], int(row[3]) if row[3].isdigit() else 0)
        for row in rows
        if len(row) == 4 and row[0].isdigit()
    ), ""


def shm_free() -> int:
    """Bytes free in shared memory; enough where there is no such place."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else SHARED_BYTES


def _torch_cuda() -> str:
    import torch

    return torch.version.cuda or ""


def _probe(*words: str) -> list[str]:
    return [sys.executable, "-m", "pipeline.doctor.gpu_probe", *words]


def _paths() -> dict[str, str]:
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{ROOT}{os.pathsep}{inherited}" if inherited else str(ROOT)}
