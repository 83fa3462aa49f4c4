"""What stands in for Ray: tasks and calls that run in this process, one after the other."""

from __future__ import annotations

import contextlib
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from pipeline.curate.steps import tasks


def run_here(patch: pytest.MonkeyPatch, seed: int | None = None, sent: bool = True) -> None:
    """Steps run their tasks in this process.

    Args:
        patch: of the test.
        seed: of the order of the tasks; None: as they come.
        sent: they are pickled as for Ray; False: functions of a test may be called.
    """
    import ray

    def run(folder: str, waiting: Any, function: Any, *_: Any) -> Iterator[Any]:
        order = list(waiting)
        if seed is not None:
            random.Random(seed).shuffle(order)
        for task in order:
            call = (task, function)
            call = pickle.loads(pickle.dumps(call)) if sent else call
            yield task.name, tasks._account(tasks._task(folder, *call))

    patch.setattr(tasks, "_run", run)
    patch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    patch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}])


@contextmanager
def without_ray(seed: int = 1) -> Iterator[None]:
    """Inside, steps run in this process, their tasks in a random order."""
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch, seed)
        yield


def tasks_here(patch: pytest.MonkeyPatch) -> None:
    """Pack and curation run in this process, and jobs join no cluster."""
    from pipeline.driver import cluster
    from pipeline.pack import pack as packing

    run_here(patch, sent=False)
    patch.setattr(packing, "_each", lambda function, items: map(function, items))
    patch.setattr(cluster, "joined", lambda _: contextlib.nullcontext())
    patch.setattr(cluster, "nodes", lambda: 1)


def embedding_here(patch: pytest.MonkeyPatch) -> list[int]:
    """Sets are embedded in this process, on its CPU; the numbers of the units as they come."""
    from pipeline.embed import pool, run

    numbers: list[int] = []

    def facts(request: run.Request) -> Any:
        return run._model_facts(request.spec, request.outputs, request.blocks)

    def embedded(reads: Any, assignment: pool.Assignment) -> Any:
        numbers.extend(unit.number for units in reads for unit in units)
        yield pool._embed_all(reads, replace(assignment, gpu=False)), 1

    patch.setattr(run, "_known_models", {})
    patch.setattr(run, "_asked_of_a_task", facts)
    patch.setattr(run, "embedded_in_one_task", embedded)
    patch.setattr(run, "embedded_by_pool", embedded)
    return numbers


class Handle:
    """An object as the handle of an actor: `handle.method.remote(…)` calls it at once."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.target, name)
        return type("Method", (), {"remote": staticmethod(method)})


def ray_here(patch: pytest.MonkeyPatch) -> None:
    """Tasks of an evaluation run in this process, at once, with what they are told pickled."""
    from dataclasses import replace

    import ray

    from pipeline.embed import pool, run

    class Task:
        def __init__(self, function: Any) -> None:
            self.function = function

        def options(self, **_: Any) -> Task:
            return self

        def remote(self, *arguments: Any) -> Result:
            try:
                return Result(self.function(*pickled(arguments)))
            except Exception as error:  # said by whoever asks for the value, as with Ray
                return Result(None, error)

    def pickled(value: Any) -> Any:
        return pickle.loads(pickle.dumps(value))

    class Result:
        def __init__(self, value: Any, error: Exception | None = None) -> None:
            self.value, self.error = value, error

    def embedded(reads: Any, assignment: Any) -> Iterator[Any]:
        yield pool._embed_all(reads, replace(assignment, gpu=False)), 1

    def get(results: Any) -> Any:
        if isinstance(results, list):
            return [get(x) for x in results]
        if results.error is not None:
            raise results.error
        return results.value

    patch.setattr(ray, "remote", Task)
    patch.setattr(ray, "get", get)
    patch.setattr(ray, "wait", lambda waiting, num_returns=1: (waiting[:1], waiting[1:]))
    patch.setattr(ray, "put", pickled)
    patch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    patch.setattr(run, "_known_models", {})
    patch.setattr(run, "embedded_in_one_task", embedded)
    patch.setattr(run, "embedded_by_pool", embedded)
