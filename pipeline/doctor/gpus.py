"""The GPU nodes of the cluster, or this machine: each looked at, then all of them together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.config import Config
from pipeline.context import result_line
from pipeline.doctor.gpu_node import ENDED_S, KERNEL_S, REDUCE_S, SMI_S, Group, Node
from pipeline.doctor.gpu_report import NodeReport, Reduced
from pipeline.driver import cluster
from pipeline.heartbeat import now
from pipeline.train.speed.bottleneck import count

NODE_S = KERNEL_S + 2 * SMI_S + 60  # for an actor to start and to say all
SLACK_S = 60.0


@dataclass(frozen=True)
class Seat:
    """A node as the doctor reaches it."""

    name: str  # its address
    call: Callable[..., Callable[[float], Any]]  # method and arguments; gives what waits for it
    gpus: int = 0  # that Ray counts there


def gpu_lines(config: Config) -> None:
    """Prints a line for each node with GPUs of the cluster of RAY_ADDRESS, or for this machine."""
    if not os.environ.get("RAY_ADDRESS"):
        reports = examined([_here()])
    else:
        with cluster.joined(config.resources):
            reports = examined(_seats())
    for report in reports:
        result_line("gpus", report.line())
    if not reports:
        result_line("gpus", "no node of the cluster has a GPU")


def examined(seats: Sequence[Seat]) -> list[NodeReport]:
    """All nodes, each by itself and then one GPU of each together. No node is waited for longer
    than its limits allow.
    """
    now(f"looking at the GPUs of {count(len(seats), 'node')} and compiling a kernel on each")
    until = time.monotonic() + NODE_S
    waiting = [seat.call("report") for seat in seats]
    reports = [_answer(one, until, seat) for one, seat in zip(waiting, seats, strict=True)]
    now("adding numbers up over the GPUs of each node")
    reports = _inside(seats, reports)
    ready = [i for i, report in enumerate(reports) if report.visible]
    if len(ready) > 1:
        now(f"adding numbers up over {len(ready)} nodes")
        outcomes = together([seats[i] for i in ready], "nccl", "cuda:0")
        for i, outcome in zip(ready, outcomes, strict=True):
            reports[i] = replace(reports[i], across=outcome)
    return reports


def together(
    seats: Sequence[Seat], backend: str, device: str, limit_s: float = REDUCE_S
) -> list[Reduced]:
    """One all-reduce with a process on each node."""
    try:
        address = seats[0].call("address", seats[0].name)(SLACK_S)
    except Exception as error:
        return [Reduced(error=f"{seats[0].name} gives no port: {error}")] * len(seats)
    groups = [Group(backend, (device,), rank, len(seats), address) for rank in range(len(seats))]
    waiting = [s.call("reduce", g, limit_s) for s, g in zip(seats, groups, strict=True)]
    until = _end_of(limit_s)
    return [_reduced(one, until) for one in waiting]


def _inside(seats: Sequence[Seat], reports: Sequence[NodeReport]) -> list[NodeReport]:
    """The reports with an all-reduce over all GPUs of each node, on all nodes at once."""
    waiting = [
        _local_group(seat, report.visible) if report.visible > 1 else None
        for seat, report in zip(seats, reports, strict=True)
    ]
    until = _end_of(REDUCE_S)
    return [
        replace(report, inside=_reduced(one, until)) if one else report
        for report, one in zip(reports, waiting, strict=True)
    ]


def _local_group(seat: Seat, gpus: int) -> Callable[[float], Any]:
    devices = tuple(f"cuda:{i}" for i in range(gpus))
    return seat.call("reduce", Group("nccl", devices, 0, gpus, address=""))


def _end_of(limit_s: float) -> float:
    """Until when an answer may come of what ends itself after so many seconds."""
    return time.monotonic() + limit_s + 2 * ENDED_S + SLACK_S


def _left(until: float) -> float:
    return max(1.0, until - time.monotonic())


def _reduced(wait: Callable[[float], Any], until: float) -> Reduced:
    try:
        outcome: Reduced = wait(_left(until))
        return outcome
    except Exception as error:  # of Ray: the node is gone, or does not answer
        return Reduced(error=_short(error))


def _answer(wait: Callable[[float], Any], until: float, seat: Seat) -> NodeReport:
    try:
        report: NodeReport = wait(_left(until))
    except Exception as error:
        return NodeReport(seat.name, errors=(f"it does not answer: {_short(error)}",))
    if seat.gpus and not report.gpus and not report.errors:
        what = f"Ray counts {count(seat.gpus, 'GPU')} here, but there is no driver (install one)"
        return replace(report, errors=(what,))
    return report


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__} {lines[-1][:200] if lines else ''}".strip()


def _here() -> Seat:
    node = Node()
    return Seat("127.0.0.1", lambda name, *words: lambda _: getattr(node, name)(*words))


def _seats() -> list[Seat]:
    """An actor on each node with GPUs. It takes neither CPUs nor GPUs, so it has room on a node
    that is in use.
    """
    import ray

    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU", 0) > 0]
    return [
        replace(seat_of(n["NodeID"], n["NodeManagerAddress"]), gpus=int(n["Resources"]["GPU"]))
        for n in nodes
    ]


def seat_of(node_id: str, name: str) -> Seat:
    """An actor on a node of the cluster."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    actor = ray.remote(Node).options(num_cpus=0, scheduling_strategy=where).remote(True)

    def call(method: str, *words: Any) -> Callable[[float], Any]:
        waiting = getattr(actor, method).remote(*words)
        return lambda limit_s: ray.get(waiting, timeout=limit_s)

    return Seat(name, call)
