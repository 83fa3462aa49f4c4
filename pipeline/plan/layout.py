"""How many training workers a cluster takes, and where they, the feeder and the decoders go."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from pipeline.config.config import Config
from pipeline.errors import PlacementError
from pipeline.plan.nodes import (
    READ_CPUS,
    Node,
    Share,
    decoders,
    left_by,
    missing,
    placed,
    without_feeder,
)
from pipeline.plan.streams import streams_for

DECODE_CPUS = 0.95  # of a decoder; the rest of a core finds other uses
FEEDER_CPUS = 1.0  # of a large node that the feeder runs on: its loop takes a part of a core
LARGE_NODE = 16  # CPUs


class Machine(BaseModel):
    """What `resolve` must know of the place where training runs."""

    model_config = ConfigDict(frozen=True)

    cpus: int
    gpus: int
    bfloat16: bool  # the CPUs multiply it in hardware; GPUs of this decade do
    nodes: tuple[Node, ...] = ()  # the same by node; none: all on one
    # Of a machine that is asked for and is not here
    elsewhere: str = ""  # which one it is, in words
    gpu_bytes: float = 0.0  # memory of its GPU

    @property
    def rooms(self) -> tuple[Node, ...]:
        """What each node has."""
        return self.nodes or (Node(self.cpus, self.gpus, driver=True),)


class Arrangement(BaseModel):
    """Where workers, feeder and decoders go: what follows from a number of workers on a cluster."""

    model_config = ConfigDict(frozen=True)

    workers: int
    feeder_cpus: float
    decode_cpus: float
    decode_tasks: int
    threads: int
    streams: int = 1  # Ray Data executions, see `plan.streams`


def worker_share(config: Config, gpus: int) -> Share:
    """What a training worker reserves on a cluster with so many GPUs: of each GPU that it uses, it
    leaves `evaluate.gpu_share` to the evaluations.
    """
    resources = config.resources
    with_gpu = gpus > 0 or config.train.device == "cuda"
    cpus = resources.cpus_per_worker or (1.0 if with_gpu else 0.25)
    left = round(resources.gpus_per_worker - config.evaluate.gpu_share, 4)  # as finely as Ray does
    return Share(cpus, left if with_gpu else 0.0)


def feeder_share(config: Config, machine: Machine) -> float:
    """CPUs of the driver's node that others leave to the feeder: none on a head without CPUs."""
    asked = config.resources.feeder_cpus
    there = sum(node.cpus for node in machine.rooms if node.driver)
    if asked is not None:
        return min(asked, there)
    return FEEDER_CPUS if there >= LARGE_NODE else 0.0


def group_sizes(config: Config, machine: Machine, gpus: int) -> tuple[int, ...]:
    """Numbers of workers that a group may have, ascending; none where the batch does not divide.

    A step consists of the same micro batches whatever the number of workers: as many as the largest
    group has with `train.accumulation`. A size that does not divide that number is not used.
    """
    train, batch = config.train, config.optim.global_batch_size
    if train.workers == "auto":
        per_worker, feeder = worker_share(config, gpus), feeder_share(config, machine)
        for_all = gpus / per_worker.gpus if gpus else min(8, machine.cpus // 2)
        for n in range(max(1, int(for_all)), 0, -1):
            fits = arrange(config, machine.rooms, n, per_worker, feeder) is not None
            if n == 1 or (fits and not batch % (n * train.accumulation)):
                return () if batch % (n * train.accumulation) else (n,)
        return ()
    asked = train.workers
    low, high = asked if isinstance(asked, tuple) else (asked, asked)
    for n in range(high, low - 1, -1):
        if not batch % (n * train.accumulation):
            micro_batches = n * train.accumulation
            return tuple(m for m in range(low, n + 1) if not micro_batches % m)
    return ()


def arrange(
    config: Config, nodes: Sequence[Node], workers: int, share: Share, feeder_cpus: float
) -> Arrangement | None:
    """Where so many workers, the feeder and the decoders go; None where they do not fit.

    Args:
        config: the recipe.
        nodes: what each node has.
        workers: training workers.
        share: what each of them reserves.
        feeder_cpus: what they leave to the feeder; where that does not fit and was not asked for,
            nothing.
    """
    arrangement = _arranged(config, nodes, workers, share, feeder_cpus)
    if arrangement is None and feeder_cpus and config.resources.feeder_cpus is None:
        return _arranged(config, nodes, workers, share, 0.0)
    return arrangement


def arrange_largest(
    config: Config, nodes: Sequence[Node], sizes: Sequence[int], share: Share, feeder_cpus: float
) -> Arrangement | None:
    """As `arrange`, for the largest of some numbers of workers that fits; they are ascending."""
    groups = (arrange(config, nodes, workers, share, feeder_cpus) for workers in reversed(sizes))
    return next((group for group in groups if group is not None), None)


def _arranged(
    config: Config, nodes: Sequence[Node], workers: int, share: Share, feeder_cpus: float
) -> Arrangement | None:
    taken = placed(without_feeder(nodes, feeder_cpus), workers, share)
    if taken is None:
        return None
    free = left_by(taken, share)
    for_decoding = max(node.cpus for node in free) - READ_CPUS
    if for_decoding <= 1e-9:
        return None
    # threads may use what is reserved for others on their node, as most of it is not in use
    beside = [(node.cpus + node.driver * feeder_cpus, here) for node, here in taken if here]
    resources = config.resources
    decode_cpus = min(DECODE_CPUS, for_decoding)
    decode_tasks = resources.decode_tasks or decoders(free, decode_cpus, READ_CPUS)
    ranks = [str(place) for place, (_, here) in enumerate(taken) for _ in range(here)]
    return Arrangement(
        workers=workers,
        feeder_cpus=feeder_cpus,
        decode_cpus=decode_cpus,
        decode_tasks=decode_tasks,
        threads=resources.threads or max(1, min(int(cpus / here) for cpus, here in beside)),
        streams=len(streams_for(ranks, decode_tasks, resources.streams)),
    )


def no_room(
    config: Config, machine: Machine, workers: int, share: Share, feeder_cpus: float
) -> PlacementError:
    """What to say where not even so many workers fit."""
    asked = feeder_cpus if config.resources.feeder_cpus is not None else 0.0
    nodes = without_feeder(machine.rooms, asked)
    beside = f" beside resources.feeder_cpus={asked:g}" if asked else ""
    hint = "add nodes, or wait for some that are coming with resources.wait_s=900"
    worker = {"CPU": share.cpus} | ({"GPU": share.gpus} if share.gpus else {})
    needs = [worker] * workers + [{"CPU": DECODE_CPUS}]
    if placed(nodes, workers, share) is None:
        all_of_it = placed(machine.rooms, workers, share) is None
        said = missing(machine.rooms, workers, share)
        if not all_of_it:
            said = f"{missing(nodes, workers, share)}{beside}"
        first = "train.device=cpu trains without GPUs" if share.gpus else "lower train.workers"
        return PlacementError(said, f"{first}, or {hint}", needs)
    return PlacementError(
        f"train.workers={workers} x resources.cpus_per_worker={share.cpus:g}{beside} leave none of "
        f"the {machine.cpus} CPUs for decoding",
        f"lower one of them, or {hint}",
        needs,
    )


def shown(workers: object) -> str:
    """`train.workers` as it was written."""
    return str(list(workers)) if isinstance(workers, tuple) else str(workers)
