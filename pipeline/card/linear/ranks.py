"""A function on several ranks that share a process group; on one, a task without a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.errors import DataError, PipelineError, last_line

T = TypeVar("T")
WAIT_S = 120  # for all ranks to have their device
MOST_CPUS = 8  # of one rank without a GPU: more threads wait for each other


def ranks_of(gpu: bool, workers: int = 0) -> int:
    """How many ranks there are: `workers`, else one for each GPU, else one."""
    import ray

    if workers:
        return workers
    return max(1, int(ray.cluster_resources().get("GPU", 0))) if gpu else 1


def on_ranks(
    function: Callable[[Any, int, int, str], T], argument: Any, ranks: int, gpu: bool
) -> list[T]:
    """What a function of (`argument`, rank, ranks, device) gives back on each rank.

    Where not all ranks have a device within two minutes, one does everything.

    Raises:
        PipelineError: a rank failed; the others are ended.
    """
    import ray
    from ray.exceptions import RayError

    shared = ray.put(argument)
    try:
        if ranks > 1 and (actors := _started(ranks, gpu)):
            try:
                meeting = ray.get(actors[0].meet.remote())
                running = [
                    actor.run.remote(function, shared, rank, ranks, meeting)
                    for rank, actor in enumerate(actors)
                ]
                outcomes: list[T] = ray.get(running)
                return outcomes
            finally:
                for actor in actors:
                    ray.kill(actor)
        cpus = 1 if gpu else max(1, min(MOST_CPUS, int(ray.cluster_resources().get("CPU", 1))))
        task = ray.remote(_alone).options(num_cpus=cpus, num_gpus=int(gpu))
        return [ray.get(task.remote(function, shared, cpus, gpu))]
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, PipelineError):
            raise cause from error
        raise DataError(f"the linear grid stopped: {last_line(error)}", "run it again") from error


def _alone(function: Callable[[Any, int, int, str], T], argument: Any, cpus: int, gpu: bool) -> T:
    import torch

    torch.set_num_threads(cpus)
    return function(argument, 0, 1, "cuda" if gpu else "cpu")


def _started(ranks: int, gpu: bool) -> list[Any]:
    """Actors that are up; none where they did not all come up."""
    import ray

    kind = ray.remote(Rank).options(num_cpus=1, num_gpus=int(gpu))
    actors = [kind.remote(gpu) for _ in range(ranks)]
    up, missing = ray.wait([a.ready.remote() for a in actors], num_returns=ranks, timeout=WAIT_S)
    if not missing:
        ray.get(up)
        return actors
    for actor in actors:
        ray.kill(actor)
    return []


class Rank:
    """One rank, an actor; the first one is where they meet."""

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu
        self.store: Any = None

    def ready(self) -> None:
        """Answers once it is up."""

    def meet(self) -> tuple[str, int]:
        """Host and port of a store that this rank opens; the port is free, for it is taken here."""
        import ray
        import torch.distributed as dist

        host = ray.util.get_node_ip_address()
        group: Any = dist
        self.store = group.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self.store.port

    def run(
        self,
        function: Callable[[Any, int, int, str], T],
        argument: Any,
        rank: int,
        ranks: int,
        meeting: tuple[str, int],
    ) -> T:
        """Runs it within the group."""
        import torch
        import torch.distributed as dist

        if not self.gpu:
            torch.set_num_threads(1)
        group: Any = dist
        store = self.store or group.TCPStore(*meeting, is_master=False)
        backend = "nccl" if self.gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
        try:
            return function(argument, rank, ranks, "cuda" if self.gpu else "cpu")
        finally:
            dist.destroy_process_group()
