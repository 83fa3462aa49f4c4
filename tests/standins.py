"""What stands in for Ray: tasks and calls that run in this process, one after the other."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest


def tasks_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack and curation run their tasks here, with what they take and give pickled as for Ray."""
    import ray
    from ray import cloudpickle

    from pipeline.curate.copies import pairs
    from pipeline.curate.embed import embed
    from pipeline.curate.steps import tasks as steps
    from pipeline.driver import cluster
    from pipeline.pack import pack as packing

    def run(folder: str, tasks: Any, function: Any, *_: Any) -> Any:
        for task in tasks:
            sent = cloudpickle.loads(cloudpickle.dumps((task, function)))
            yield task.name, steps._account(steps._task(folder, *sent))

    monkeypatch.setattr(steps, "_run", run)
    monkeypatch.setattr(packing, "_each", lambda function, items: map(function, items))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(embed, "task_resources", lambda: (0.0, 1.0))
    monkeypatch.setattr(pairs, "_cpus_of_fit", lambda: 1.0)
    monkeypatch.setattr(cluster, "joined", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(cluster, "nodes", lambda: 1)


class Handle:
    """An object as the handle of an actor: `handle.method.remote(…)` calls it at once."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.target, name)
        return type("Method", (), {"remote": staticmethod(method)})
