"""What is changed in Ray Data's loop, without starting one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.data import DataContext

from pipeline.driver import data_internals
from pipeline.driver.data_internals import Limits, near, pace_data


def executor() -> Any:
    shared: list[str] = []
    manager = SimpleNamespace(shared=shared)
    manager._update_allocated_budgets = lambda: shared.append("out")
    cluster = SimpleNamespace(get_total_resources=lambda: "what others leave")
    return SimpleNamespace(_resource_manager=manager, _cluster_autoscaler=cluster)


def turns(limits: Limits | None = None) -> Any:
    context = DataContext()
    pace_data(context, 1.0, 4, limits)
    return context.custom_execution_callback_classes[-1]()


def test_resources_are_shared_out_once_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_internals, "TURN_S", 0.0)
    one, callback = executor(), turns()
    callback.before_execution_starts(one)
    for calls in (3, 1):
        for _ in range(calls):
            one._resource_manager._update_allocated_budgets()
        callback.on_execution_step(one)
    assert one._resource_manager.shared == ["out", "out"]
    assert one._cluster_autoscaler.get_total_resources() == "what others leave"


def test_one_of_several_streams_has_its_cpus_and_a_part_of_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = executor()
    turns(Limits(2.5, 4)).before_execution_starts(one)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 7, "object_store_memory": 800.0})
    has = one._cluster_autoscaler.get_total_resources()
    assert (has.cpu, has.object_store_memory) == (2.5, 200.0)


def test_a_node_without_a_name_asks_for_nothing() -> None:
    assert near("") == {}
    strategy = near("ab" * 28)["scheduling_strategy"]
    assert strategy.soft and strategy._spill_on_unavailable
