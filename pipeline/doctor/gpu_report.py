"""What is known of a node with GPUs, in words: what works, what is missing, what to do about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.driver.compiler import Compiler

SHARED_BYTES = 2**30  # what NCCL's guide gives a container
BUSY_MIB = 1024  # an idle GPU has some megabytes in use
# The oldest driver that runs CUDA of a major version (NVIDIA, "CUDA Compatibility", table of minor
# version compatibility): with it all minor versions run.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi."""

    index: int
    name: str
    driver: str
    used_mib: int


@dataclass(frozen=True)
class Reduced:
    """How an all-reduce went."""

    gb_per_s: float = 0.0
    over: str = ""  # "Socket eth0", "IB mlx5_0", "P2P"
    error: str = ""


@dataclass(frozen=True)
class NodeReport:
    """All that is known of a node."""

    host: str
    compiler: Compiler | None = None  # None: the node did not answer
    gpus: tuple[Gpu, ...] = ()
    cuda: str = ""  # that torch was built for
    visible: int = 0  # GPUs that torch can use
    kernel_s: float | None = None  # None: not tried, or failed
    apart: int = 0  # pairs of GPUs without peer to peer
    inside: Reduced | None = None  # over all GPUs of the node
    across: Reduced | None = None  # over one GPU of each node
    shm_free: int = SHARED_BYTES
    errors: tuple[str, ...] = ()  # what failed, with what to do

    def line(self) -> str:
        """What works and what is missing, in one line."""
        if not self.gpus and not self.errors:
            return f"{self.host}: no GPU here; {self.compiler}"
        names = ", ".join(sorted({gpu.name for gpu in self.gpus}))
        works = [f"{len(self.gpus)} x {names}, driver {self.gpus[0].driver}"] if names else []
        works += [str(self.compiler)] if self.compiler else []
        if self.kernel_s is not None:
            works.append(f"a kernel compiled and ran in {self.kernel_s:.0f} s")
        works += [
            f"all-reduce of {where}: {one.gb_per_s:,.3g} GB/s{_over(one)}"
            for one, where in self._reduced()
            if not one.error
        ]
        missing = self.missing()
        text = f"{self.host}: {'; '.join(works)}" if works else f"{self.host}:"
        if not missing:
            return f"{text}; nothing is missing"
        return f"{text}{'; MISSING:' if works else ''} {'; '.join(missing)}"

    def missing(self) -> list[str]:
        """Each with what to do."""
        told = [*self.errors]
        if self.gpus and (old := driver_too_old(self.gpus[0].driver, self.cuda)):
            told.append(old)
        if self.compiler and (what := self.compiler.missing):
            told.append(
                f"{what} (apt-get install gcc python3-dev, or train.compile=false "
                "train.loss_kernels=eager)"
            )
        if self.shm_free < SHARED_BYTES:
            told.append(
                f"/dev/shm has {self.shm_free / 2**20:.0f} MiB free, NCCL wants 1 GiB "
                "(docker: --shm-size=8g; pods: an emptyDir of medium Memory)"
            )
        if busy := [gpu for gpu in self.gpus if gpu.used_mib > BUSY_MIB]:
            most = max(gpu.used_mib for gpu in busy) / 1024
            told.append(
                f"{_numbers([gpu.index for gpu in busy])} in use by others, up to {most:.0f} GiB "
                "(nvidia-smi shows by whom)"
            )
        if self.apart:
            told.append(
                f"no peer to peer in {self.apart} pairs of GPUs: gradients pass through host "
                "memory (usual for L4 and L40S; else switch PCI ACS off)"
            )
        told += [
            f"the all-reduce of {where} failed{_over(one)}: {one.error} (docs/gpus.md#networks)"
            for one, where in self._reduced()
            if one.error
        ]
        return told

    def _reduced(self) -> list[tuple[Reduced, str]]:
        both = ((self.inside, "all GPUs of the node"), (self.across, "the nodes"))
        return [(one, where) for one, where in both if one is not None]


def driver_too_old(driver: str, cuda: str) -> str:
    """What is wrong with a driver for a version of CUDA, in half a sentence; empty: nothing."""
    oldest = OLDEST_DRIVER.get(int(cuda.partition(".")[0] or 0), 0)
    major = driver.partition(".")[0]
    if not major.isdigit() or int(major) >= oldest:
        return ""
    return f"driver {driver} is too old for torch's CUDA {cuda} (install {oldest} or newer)"


def network(log: str) -> str:
    """What NCCL says that it uses: between nodes the network and its interfaces, else the way from
    GPU to GPU; empty where it says nothing. `log` is its output with NCCL_DEBUG=INFO.
    """
    used = re.findall(r"Using network (.+)", log)
    name = used[-1].strip() if used else ""
    ways = [way for way in ("P2P", "SHM") if f"via {way}/" in log]
    if ways and "via NET/" not in log:
        return ways[0]
    listed = re.findall(r"NET/\w+ : Using (.*)", log)
    cards = re.findall(r"\[\d+\]([\w.-]+)", listed[-1]) if listed else []
    return f"{name} {', '.join(dict.fromkeys(cards))}".strip()


def _over(reduced: Reduced) -> str:
    return f" over {reduced.over}" if reduced.over else ""


def _numbers(indices: Sequence[int]) -> str:
    return f"GPU{'s' * (len(indices) > 1)} {', '.join(map(str, indices))}"
