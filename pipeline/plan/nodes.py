"""Which workers and decoders fit where: arithmetic over the nodes of a cluster, without Ray.

A sum over the cluster is not enough: two nodes with half a free CPU each have no room for a task of
one CPU. So everything is counted node by node.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# CPUs of all read tasks, which wait for storage; more than 0, or they would run on a bare head.
READ_CPUS = 0.1


class Node(NamedTuple):
    """What a node of the cluster has, or has left."""

    cpus: float
    gpus: float = 0.0
    driver: bool = False  # the driver and the feeder run here
    memory: float = 0.0  # bytes, without those of the object store; 0: unknown


@dataclass(frozen=True)
class Share:
    """What one training worker reserves."""

    cpus: float
    gpus: float = 0.0

    def __str__(self) -> str:
        return " and ".join([_count(self.gpus, "GPU")] * bool(self.gpus) + [_cpus(self.cpus)])

    def times(self, workers: int) -> Share:
        """What so many workers reserve together."""
        return Share(self.cpus * workers, self.gpus * workers)


def room(node: Node, share: Share) -> int:
    """Workers that fit on a node."""
    rooms = [_whole(node.cpus / share.cpus)]
    if share.gpus:
        # a worker is on one GPU: what is left of two of them is no room
        whole = _whole(node.gpus)
        fraction = node.gpus - whole
        rooms.append(whole * _whole(1 / share.gpus) + _whole(fraction / share.gpus))
    return max(0, min(rooms))


def capacity(nodes: Sequence[Node], share: Share) -> int:
    """Workers that fit on a cluster."""
    return sum(room(node, share) for node in nodes)


def without_feeder(nodes: Sequence[Node], cpus: float) -> list[Node]:
    """What is left where CPUs of the driver's node are for the feeder, which reserves none."""
    return [n._replace(cpus=n.cpus - cpus) if n.driver else n for n in nodes]


def placed(nodes: Sequence[Node], workers: int, share: Share) -> list[tuple[Node, int]] | None:
    """Each node with the workers that it takes, fullest node first as Ray packs them; None where
    they do not fit.
    """
    places = []
    for node in sorted(nodes, key=lambda n: (n.gpus, n.cpus), reverse=True):
        here = min(workers, room(node, share))
        workers -= here
        places.append((node, here))
    return None if workers else places


def left_by(taken: Sequence[tuple[Node, int]], share: Share) -> list[Node]:
    """What is left on the nodes that `placed` gives."""
    return [
        node._replace(cpus=node.cpus - n * share.cpus, gpus=node.gpus - n * share.gpus)
        for node, n in taken
    ]


def decoders(nodes: Sequence[Node], cpus: float, kept: float) -> int:
    """Decoders of so many CPUs that fit, with `kept` CPUs left over on each node that has some.

    With that, no way in which Ray deals them out takes the last CPUs that reading needs: a node
    that is fuller than counted here leaves another one emptier.
    """
    return sum(max(0, _whole((node.cpus - kept) / cpus)) for node in nodes)


def missing(nodes: Sequence[Node], workers: int, share: Share) -> str:
    """One sentence: what the workers need and what there is."""
    need = share.times(workers)
    there = Share(sum(n.cpus for n in nodes), sum(n.gpus for n in nodes))
    has = _cpus(there.cpus)
    if share.gpus or there.gpus:
        has = f"{_count(there.gpus, 'GPU')} and {has}"
    fits = capacity(nodes, share)
    verb = "needs" if workers == 1 else "need"
    said = f"{_count(workers, 'worker')} of {share} each {verb} {need}; " + (
        f"the cluster has {has} on {_count(len(nodes), 'node')}: room for "
    )
    said += _count(fits, "worker") if fits else "none"
    if there.cpus + 1e-9 >= need.cpus and there.gpus + 1e-9 >= need.gpus and len(nodes) > 1:
        said += ", as no worker can take from two nodes"
    return said


def _whole(number: float) -> int:
    return math.floor(number + 1e-9)  # 0.3 / 0.1 is a hair below 3


def _cpus(number: float) -> str:
    return _count(number, "CPU")


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}" + ("" if number == 1 else "s")
