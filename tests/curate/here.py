"""One runner that stands in for Ray: the tasks of a step run in this process."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
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
