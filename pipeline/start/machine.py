"""What a recipe is chosen for: CPUs, memory, GPUs and their memory, disk; or those of a cluster."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from pipeline.config.config import Config
from pipeline.context import local_machine, memory_bytes, nearest
from pipeline.driver import cluster
from pipeline.errors import ConfigError
from pipeline.plan.layout import Machine
from pipeline.plan.nodes import Node
from pipeline.train.speed.bottleneck import count

GB, GIB = 1e9, 2**30
# Memory of a GPU by the kind that Ray counts (`accelerator_type:H100`), in GB as sold. Of kinds
# with several sizes it is the smallest.
KINDS = {
    "T4": 16, "V100": 16, "P100": 16, "A10G": 24, "A10": 24, "L4": 24, "A30": 24, "A40": 48,
    "L40S": 48, "L40": 48, "RTX-PRO-6000": 96, "A100": 40, "A100-40G": 40, "A100-80G": 80,
    "H100": 80, "H200": 141, "H20": 96, "B200": 180, "GB200": 180,
}  # fmt: skip
UNKNOWN_GB = 24  # where nobody knows the GPU
OTHER_CPUS = 8  # decode for a GPU that is not here


@dataclass(frozen=True)
class Surroundings:
    """The machine or cluster.

    Attributes:
        machine: as a plan takes it.
        place: in words: this machine, a cluster, or another one that is asked for.
        gpu: name of its GPUs; "" where it is not known.
        gpu_bytes: memory of the smallest GPU; 0 without one.
        gpu_guess: why the memory of the GPU is not known for sure; "" where it is.
        memory: bytes, of this machine.
        disk: bytes that are free where runs go; None at a URI.
        here: it is this machine, whose speed can be tried.
        cpu_guess: that the number of CPUs is not known, in words; "" where it is.
    """

    machine: Machine
    place: str
    gpu: str
    gpu_bytes: float
    gpu_guess: str
    memory: float
    disk: int | None
    here: bool
    cpu_guess: str = ""

    def line(self) -> str:
        """For the console."""
        parts = [count(self.machine.cpus, "CPU") + self.cpu_guess]
        if self.machine.gpus:
            size = f"{self.gpu_bytes / GIB:.0f} GiB{self.gpu_guess}"
            each = " each" if self.machine.gpus > 1 else ""
            name = f" {self.gpu}" if self.gpu else ""
            parts.append(f"{count(self.machine.gpus, 'GPU')}{name} with {size}{each}")
        else:
            parts.append("no GPU")
        if self.here:
            parts.append(f"{self.memory / GIB:.0f} GiB of memory")
        if self.disk is not None:
            parts.append(f"{self.disk / GIB:.0f} GiB of disk free")
        return f"{self.place}: {', '.join(parts)}"


def look(config: Config) -> Surroundings:
    """Asks this machine, or the cluster of RAY_ADDRESS; with `start.gpu_gb` it is one GPU of that
    size, wherever it may be.

    Raises:
        PipelineError: the cluster does not answer, or a GPU is asked for and not to be used.
    """
    near = nearest(config.run.folder)
    disk = shutil.disk_usage(near).free if near is not None else None
    memory, size = memory_bytes(), config.start.gpu_gb
    if size is not None:
        return _other(config, size, memory)
    if os.environ.get("RAY_ADDRESS"):
        return _cluster(config, memory, disk)
    machine = local_machine(config)
    name, size_bytes = _local_gpu() if machine.gpus else ("", 0.0)
    return Surroundings(machine, "this machine", name, size_bytes, "", memory, disk, True)


def _other(config: Config, gpu_gb: float, memory: float) -> Surroundings:
    """One that is asked for: nothing is known of it but its GPU."""
    if config.train.device == "cpu":
        raise ConfigError(
            f"start.gpu_gb={gpu_gb:g} asks for a GPU, and train.device=cpu for none",
            "leave one of them out",
        )
    cpus = config.resources.cpus or OTHER_CPUS
    place = f"a machine with a GPU of {gpu_gb:g} GB (start.gpu_gb)"
    machine = Machine(
        cpus=cpus,
        gpus=1,
        bfloat16=False,
        nodes=(Node(cpus, 1, driver=True),),
        elsewhere=place,
        gpu_bytes=gpu_gb * GB,
    )
    guess = "" if config.resources.cpus else " (a guess: resources.cpus says it)"
    return Surroundings(machine, place, "", gpu_gb * GB, "", memory, None, False, guess)


def _local_gpu() -> tuple[str, float]:
    import torch

    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    smallest = min(cards, key=lambda card: card.total_memory)
    return str(smallest.name), float(smallest.total_memory)


def _cluster(config: Config, memory: float, disk: int | None) -> Surroundings:
    import ray

    with cluster.joined(config.resources):
        machine, nodes = cluster.machine(), cluster.nodes()
        names = [n.partition(":")[2] for n in ray.cluster_resources() if n.startswith("accel")]
    kinds = sorted((KINDS[name], name) for name in names if name in KINDS)
    size, name = kinds[0] if kinds else (UNKNOWN_GB, ", ".join(names))
    guess = (
        "" if kinds else " (a guess: Ray does not say which GPUs they are; start.gpu_gb says it)"
    )
    place = f"the cluster of RAY_ADDRESS, {count(nodes, 'node')}"
    bytes_of = size * GB if machine.gpus else 0.0
    return Surroundings(machine, place, name, bytes_of, guess, memory, disk, False)
