"""What others leave free, on a real Ray."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.driver.cluster import Seen, seen_nodes
from pipeline.plan.nodes import Node, Share
from pipeline.train.scaling import free_nodes


@ray.remote
class Actor:
    def there(self) -> None: ...


def settled(find: Callable[[], float], expected: float) -> float:
    """What Ray says of free resources is up to a second old."""
    end = time.monotonic() + 60
    while find() != pytest.approx(expected) and time.monotonic() < end:
        time.sleep(0.2)
    return find()


def test_what_this_run_holds_counts_as_free_and_what_others_hold_does_not(
    ray_cluster: None,
) -> None:
    nodes, share = seen_nodes(), Share(0.25)
    (key,) = nodes
    total = nodes[key].node.cpus

    def free(workers: int) -> float:
        (node,) = free_nodes(nodes, [key] * workers, share)
        return node.cpus

    assert settled(lambda: free(0), total) == pytest.approx(total)
    decoder: Any = Actor.options(num_cpus=0.5).remote()  # type: ignore[attr-defined]
    ray.get(decoder.there.remote(), timeout=120)
    # 3 workers, as Ray Train starts them, and a bundle that is somebody else's
    bundles = placement_group([{"CPU": 0.25}] * 3)
    other = placement_group([{"CPU": 0.5}])
    ray.get([bundles.ready(), other.ready()], timeout=120)
    workers: list[Any] = [
        Actor.options(  # type: ignore[attr-defined]
            num_cpus=0.25, scheduling_strategy=PlacementGroupSchedulingStrategy(bundles)
        ).remote()
        for _ in range(3)
    ]
    ray.get([worker.there.remote() for worker in workers], timeout=120)
    try:
        assert settled(lambda: free(3), total - 0.5) == pytest.approx(total - 0.5)
    finally:
        for actor in [decoder, *workers]:
            ray.kill(actor)
        remove_placement_group(bundles)
        remove_placement_group(other)


def test_nodes_about_to_go_are_left_out(ray_cluster: None) -> None:
    nodes = {"gone": Seen(Node(8, 1), True), "new": Seen(Node(8, 1), False)}
    # Ray knows neither: nothing is free there but what the workers hold
    assert free_nodes(nodes, ["new", "gone"], Share(1, 1)) == [Node(1, 1)]
