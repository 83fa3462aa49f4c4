"""What fits on which node: against trying all ways out, and the sentences."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.load import load
from pipeline.driver import cluster
from pipeline.errors import ConfigError, PlacementError
from pipeline.plan.layout import READ_CPUS, Machine
from pipeline.plan.nodes import (
    Node,
    Share,
    capacity,
    decoders,
    left_by,
    missing,
    placed,
    without_feeder,
)
from pipeline.plan.plan import Plan, SetFacts, resolve


def can(nodes: tuple[tuple[float, float], ...], tasks: int, cpus: float, gpus: float) -> bool:
    """Whether some way of dealing equal tasks out fits; tries all."""

    @lru_cache(None)
    def try_all(free: tuple[tuple[float, float], ...], left: int) -> bool:
        if not left:
            return True
        return any(
            try_all(free[:i] + ((c - cpus, g - gpus),) + free[i + 1 :], left - 1)
            for i, (c, g) in enumerate(free)
            if c >= cpus - 1e-9 and g >= gpus - 1e-9
        )

    return try_all(nodes, tasks)


quarters = st.integers(0, 10).map(lambda n: n / 4)
clusters = st.lists(st.tuples(quarters, st.integers(0, 2).map(float)), min_size=1, max_size=3)


@settings(deadline=None)
@given(clusters, st.integers(1, 4), st.sampled_from([0.25, 0.5, 1.0, 1.5]), st.sampled_from([0, 1]))
def test_workers_fit_where_some_way_of_dealing_them_out_does(
    rooms: list[tuple[float, float]], workers: int, cpus: float, gpus: int
) -> None:
    nodes = [Node(c, g) for c, g in rooms]
    share = Share(cpus, gpus)
    expected = can(tuple(rooms), workers, cpus, gpus)
    taken = placed(nodes, workers, share)
    assert (taken is not None) == expected == (capacity(nodes, share) >= workers)
    if taken is not None:
        assert sum(here for _, here in taken) == workers
        left = left_by(taken, share)
        assert min(min(n.cpus, n.gpus) for n in left) >= -1e-9
        used = sum(n.cpus for n in nodes) - sum(n.cpus for n in left)
        assert used == pytest.approx(workers * cpus)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 4).map(float), min_size=1, max_size=3))
def test_decoders_never_take_what_reading_needs(free: list[float]) -> None:
    """However Ray deals so many decoders out, a node keeps enough for a read task."""
    count = decoders([Node(cpus) for cpus in free], 0.95, READ_CPUS)
    for places in product(range(len(free)), repeat=min(count, 6)):
        left = list(free)
        for place in places:
            left[place] -= 0.95
        if count and min(left) >= -1e-9:
            assert max(left) >= READ_CPUS - 1e-9
    if max(free) >= 0.95 + READ_CPUS:
        assert count


def test_what_is_missing_is_a_sentence() -> None:
    two_gpus = [Node(16, 2, True)]
    assert missing(two_gpus, 4, Share(1, 1)) == (
        "4 workers of 1 GPU and 1 CPU each need 4 GPUs and 4 CPUs; the cluster has 2 GPUs and "
        "16 CPUs on 1 node: room for 2 workers"
    )
    assert missing([Node(0.0, 0.0, True)], 1, Share(0.5)) == (
        "1 worker of 0.5 CPUs each needs 0.5 CPUs; the cluster has 0 CPUs on 1 node: room for none"
    )
    assert missing([Node(3), Node(3)], 3, Share(2)) == (
        "3 workers of 2 CPUs each need 6 CPUs; the cluster has 6 CPUs on 2 nodes: room for "
        "2 workers, as no worker can take from two nodes"
    )


def plan_on(*nodes: Node, overrides: tuple[str, ...] = ()) -> Plan:
    config = load(["optim.steps=10", "optim.global_batch_size=64", *overrides])
    machine = Machine(
        cpus=max(1, int(sum(n.cpus for n in nodes))),
        gpus=int(sum(n.gpus for n in nodes)),
        bfloat16=False,
        nodes=nodes,
    )
    return resolve(config, SetFacts(1000, "d"), machine=machine)


HEAD = Node(0, 0, True)


def test_decoders_go_where_cpus_are_and_the_head_may_be_bare() -> None:
    result = plan_on(HEAD, Node(8), Node(4, 2))
    assert (result.device, result.workers, result.feeder_cpus) == ("cuda", 2, 0)
    # 8 decoders of .95 on the CPU node, and 2 CPUs beside the workers
    assert result.decode_tasks == 8 + 2
    large = plan_on(Node(64, 0, True), Node(8, 8))
    assert large.feeder_cpus == 1 and plan_on(Node(8, 1, True)).feeder_cpus == 0
    assert large.decode_tasks == int((63 - READ_CPUS) / 0.95)
    assert plan_on(Node(64, 0, True), overrides=("resources.feeder_cpus=0",)).feeder_cpus == 0
    # threads of a worker are a share of its own node, not of the cluster
    assert plan_on(HEAD, Node(4), Node(4), overrides=("train.workers=2",)).threads == 2


@pytest.mark.parametrize(
    ("node", "overrides", "workers"),
    [
        (Node(16, 1, True), ("resources.cpus_per_worker=15",), 1),
        (Node(16, 2, True), ("resources.cpus_per_worker=7.5",), 2),
        (
            Node(16, 0, True),
            ("train.workers=15", "resources.cpus_per_worker=1", "optim.global_batch_size=60"),
            15,
        ),
    ],
)
def test_head_room_of_the_feeder_refuses_no_plan(
    node: Node, overrides: tuple[str, ...], workers: int
) -> None:
    result = plan_on(node, overrides=overrides)
    assert (result.workers, result.decode_tasks, result.feeder_cpus) == (workers, 1, 0)
    assert result.arranged_on([node]) is not None
    with pytest.raises(PlacementError, match=r"resources\.feeder_cpus=1 leave none of the 16 CPUs"):
        plan_on(
            node,
            overrides=(*overrides, f"train.workers={workers}", "resources.feeder_cpus=1"),
        )


@pytest.mark.parametrize(
    ("nodes", "overrides", "words"),
    [
        ((Node(16, 2, True),), ("train.workers=4",), "has 2 GPUs and 16 CPUs on 1 node"),
        ((HEAD, Node(1), Node(1)), ("train.workers=2", "resources.cpus_per_worker=1.5"),
         "2 workers of 1.5 CPUs each need 3 CPUs; the cluster has 2 CPUs on 3 nodes: room for no"),
        ((HEAD, Node(1), Node(1)), ("train.workers=2", "resources.cpus_per_worker=1"),
         "leave none of the 2 CPUs for decoding"),
        ((HEAD,), (), "1 worker of 0.25 CPUs each needs 0.25 CPUs; the cluster has 0 CPUs"),
        ((Node(4),), ("train.workers=[4,8]", "resources.cpus_per_worker=1"),
         "train.workers=4 x resources.cpus_per_worker=1 leave none"),
    ],
)  # fmt: skip
def test_what_cannot_be_placed_is_refused(
    nodes: tuple[Node, ...], overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(PlacementError, match=words) as caught:
        plan_on(*nodes, overrides=overrides)
    assert "resources.wait_s" in caught.value.hint and caught.value.bundles


@pytest.mark.parametrize(
    ("asked", "batch", "cpus", "sizes", "workers", "accumulation"),
    [
        ("[2,8]", 64, 64, (2, 4, 8), 8, 1),
        ("[2,8]", 64, 6, (2, 4, 8), 4, 2),  # five would fit beside a decoder
        ("[2,8]", 64, 3, (2, 4, 8), 2, 4),
        ("[1,6]", 64, 64, (1, 2, 4), 4, 1),  # six and five do not divide 64
        ("[3,7]", 63, 64, (7,), 7, 1),
        ("[2,2]", 64, 64, (2,), 2, 1),
    ],
)
def test_a_range_keeps_the_micro_batches(
    asked: str, batch: int, cpus: int, sizes: tuple[int, ...], workers: int, accumulation: int
) -> None:
    result = plan_on(
        Node(cpus, 0, True),
        overrides=(
            f"train.workers={asked}",
            f"optim.global_batch_size={batch}",
            "resources.cpus_per_worker=1",
            "resources.feeder_cpus=0",
        ),
    )
    assert (result.sizes, result.workers, result.accumulation) == (sizes, workers, accumulation)
    for size in result.sizes:
        other = result.for_workers(size)
        assert other.micro_batch == result.micro_batch
        assert other.workers * other.accumulation * other.micro_batch == batch
        assert other.worker_batch == batch // size
        assert other.micro_batch % other.chunk_images == 0
        # the order of the images is that of the first group
        assert (other.window_images, other.layout, other.steps) == (
            (result.window_images, result.layout, result.steps)
        )
    fewer = result.arranged_on([Node(sizes[0] + 1, 0, True)])
    assert fewer is not None and fewer.workers == sizes[0]
    assert result.arranged_on([Node(0.5, 0, True)]) is None


def test_a_range_multiplies_with_the_accumulation() -> None:
    result = plan_on(
        Node(64), overrides=("train.workers=[2,8]", "train.accumulation=3",
                             "optim.global_batch_size=96")
    )  # fmt: skip
    assert result.sizes == (2, 3, 4, 6, 8)


def test_ranges_that_are_none() -> None:
    with pytest.raises(ConfigError, match=r"did you mean \[2,8\]\?"):
        load(["train.workers=[8,2]"])
    with pytest.raises(ConfigError, match=r"does not divide into train\.workers=\[3, 3\]"):
        plan_on(Node(64), overrides=("train.workers=[3,3]",))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`cluster.with_room` on a clock of its own, with an autoscaler that notes its orders."""
    seen: dict[str, Any] = {"now": 0.0, "orders": []}
    monkeypatch.setattr(cluster.time, "monotonic", lambda: seen["now"])

    def sleep(seconds: float) -> None:
        seen["now"] += seconds

    monkeypatch.setattr(cluster.time, "sleep", sleep)
    monkeypatch.setattr(cluster, "machine", lambda: None)
    monkeypatch.setattr(cluster, "_request", seen["orders"].append)
    return seen


def until(seen: dict[str, Any], ready_at: float) -> Callable[[Any], str]:
    def make(machine: Any) -> str:
        if seen["now"] < ready_at:
            raise PlacementError("2 workers need more", "a hint", [{"CPU": 1.0}])
        return "plan"

    return make


def test_a_plan_waits_for_nodes_that_come(
    quick: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="pipeline"):
        assert cluster.with_room(until(quick, 70), 100) == "plan"
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 3  # at 0, 30 and 60 s
    assert said[1] == "waiting     2 workers need more; for 70 s more"
    assert quick["orders"] == [[{"CPU": 1.0}]] * 14 + [[]]  # each 5 s; and takes the order back


def test_a_plan_without_room_is_refused_at_once_or_in_time(quick: dict[str, Any]) -> None:
    with pytest.raises(PlacementError, match=r"^2 workers need more\n"):
        cluster.with_room(until(quick, 70), 0)
    assert quick["now"] == 0 and not quick["orders"]
    with pytest.raises(PlacementError, match="2 workers need more; waited 50 s for more"):
        cluster.with_room(until(quick, 70), 50)
    assert quick["now"] == 50
    assert quick["orders"] == [[{"CPU": 1.0}]] * 10 + [[]]


def test_an_order_is_taken_back_when_the_job_is_ended(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(seconds: float) -> None:
        raise SystemExit(143)  # as the handler of SIGTERM does

    monkeypatch.setattr(cluster.time, "sleep", ended)
    with pytest.raises(SystemExit):
        cluster.with_room(until(quick, 70), 100)
    assert quick["orders"] == [[{"CPU": 1.0}], []]


def test_what_is_left_to_the_feeder() -> None:
    nodes = without_feeder([Node(8, 1, True), Node(8)], 1)
    assert [n.cpus for n in nodes] == [7, 8]
