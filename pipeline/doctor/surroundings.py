"""What is around a run: versions, machine or cluster, shared memory, the place of run folders."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import time
import uuid
from importlib import metadata
from pathlib import Path

from pipeline.config.config import Config
from pipeline.context import local_machine, nearest, result_line, size_of
from pipeline.driver import cluster
from pipeline.errors import PipelineError, StorageError
from pipeline.plan.layout import Machine
from pipeline.storage.places import delete_file, resolve_uri
from pipeline.storage.transfer import read_bytes, write_bytes_atomic
from pipeline.train.speed.bottleneck import count

log = logging.getLogger("pipeline")

PACKAGES = ("torch", "ray", "mlflow", "pyarrow", "numpy", "pillow", "simplejpeg")
SHARED_MEMORY = Path("/dev/shm")
WRITTEN = 4 * 2**20


def versions() -> str:
    """Of Python and of what the figures depend on."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "is not installed"

    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"Python {platform.python_version()}, {packages}"


def machine_of(config: Config) -> tuple[Machine, float]:
    """CPUs and GPUs, and the bytes of the object store of the run."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        with cluster.joined(config.resources):
            machine, nodes = cluster.machine(), cluster.nodes()
            store = cluster.object_store()
        place = f"cluster at {address}, {count(nodes, 'node')}: "
    else:
        machine, place = local_machine(config), "this machine: "
        store = config.resources.object_store_gb * 2**30
    text = f"{place}{count(machine.cpus, 'CPU')}, {_gpus(machine, bool(address))}"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine.cpus
    if not address and usable < machine.cpus:
        text += f"; this process may use {usable} of them: set resources.cpus={usable}"
    result_line("machine", text)
    return machine, store


def _gpus(machine: Machine, remote: bool) -> str:
    if not machine.gpus:
        return "no GPU"
    import torch

    name = "" if remote else f" ({torch.cuda.get_device_name(0)})"
    return f"{count(machine.gpus, 'GPU')}{name}"


def shared_memory(config: Config) -> None:
    """The object store of a Ray that is started here lies in shared memory, if it has the room."""
    if os.environ.get("RAY_ADDRESS") or not SHARED_MEMORY.is_dir():
        return
    free, needed = shutil.disk_usage(SHARED_MEMORY).free, config.resources.object_store_gb * 2**30
    result_line("shm", f"{size_of(free)} free in {SHARED_MEMORY}, object store {size_of(needed)}")
    if free < needed:
        log.warning(
            "the object store (resources.object_store_gb=%g) does not fit into %s; Ray would "
            "put it on the disk, which is slow: start the container with a larger --shm-size",
            config.resources.object_store_gb,
            SHARED_MEMORY,
        )


def disk(run_folder: str) -> None:
    """Writes a file where runs go, reads it back and takes it away.

    Raises:
        PipelineError: where that is not possible.
    """
    begin = time.perf_counter()
    path = try_writing(run_folder, os.urandom(WRITTEN))
    seconds = time.perf_counter() - begin
    free = f"{size_of(shutil.disk_usage(path).free)} free; " if nearest(run_folder) else ""
    result_line("disk", f"{path}: {free}4 MiB written and read back in {1000 * seconds:.0f} ms")


def try_writing(run_folder: str, content: bytes) -> str:
    """Writes a file where runs go, reads it back and takes it away. Returns the folder.

    Raises:
        PipelineError: where that is not possible, or something else comes back.
    """
    files, path = resolve_uri(run_folder)
    path = str(nearest(run_folder) or path)  # it need not be there yet, and this does not make it
    name = f"{path}/.doctor.{uuid.uuid4().hex[:8]}.tmp"
    try:
        try:
            write_bytes_atomic(content, files, name)
            same = read_bytes(files, name) == content
        finally:
            delete_file(files, name)
    except StorageError:
        raise  # says what to do
    except OSError as error:
        raise PipelineError(
            f"run.folder={run_folder} cannot be written: {str(error).splitlines()[0]}",
            "give a folder that this user may write in, with room for checkpoints",
        ) from None
    if not same:
        raise PipelineError(
            f"run.folder={run_folder} gives back other bytes than were written",
            "take other storage for runs",
        )
    return path
