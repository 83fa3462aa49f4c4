"""Which workers a stream serves, on clusters of every shape."""

from __future__ import annotations

import itertools

import pytest

from pipeline.config.load import load
from pipeline.plan.layout import Machine
from pipeline.plan.nodes import Node
from pipeline.plan.plan import Plan, SetFacts, resolve
from pipeline.plan.streams import Stream, streams_for


def test_a_stream_for_each_node_of_workers() -> None:
    nodes = ["a"] * 8 + ["b"] * 8
    assert streams_for(nodes, 20) == [Stream(0, 8, "a", 10), Stream(8, 16, "b", 10)]
    assert streams_for(["a"] * 3, 4) == [Stream(0, 3, "a", 4)]
    assert streams_for(["a", "a", "a", "b"], 9) == [Stream(0, 3, "a", 6), Stream(3, 4, "b", 3)]


def test_as_many_as_are_asked_for() -> None:
    assert streams_for(["a"] * 4, 4, 2) == [Stream(0, 2, "a", 2), Stream(2, 4, "a", 2)]
    assert [s.node for s in streams_for(["a"] * 3 + ["b"] * 3, 6, 3)] == ["a", "a", "b"]
    assert streams_for(["a", "b"], 6, 1) == [Stream(0, 2, "a", 6)]


def test_never_more_than_there_are_workers_or_decoders() -> None:
    assert len(streams_for(["a", "b"], 8, 5)) == 2
    assert streams_for(["a", "b", "c"], 1) == [Stream(0, 3, "a", 1)]


def test_ranks_of_a_node_that_are_apart_make_no_stream_each() -> None:
    assert [s[:2] for s in streams_for(["a", "b", "a", "b"], 4)] == [(0, 2), (2, 4)]


@pytest.mark.parametrize("asked", ["auto", 1, 2, 3, 5])
def test_each_rank_once_and_each_decoder_once(asked) -> None:
    for workers, on_each, decoders in itertools.product(range(1, 14), (1, 3, 8), (1, 2, 7, 30)):
        nodes = [str(rank // on_each) for rank in range(workers)]
        streams = streams_for(nodes, decoders, asked)
        assert [r for s in streams for r in range(s.first, s.last)] == list(range(workers))
        assert all(s.first < s.last and s.decoders >= 1 for s in streams)
        assert sum(s.decoders for s in streams) == decoders


def test_the_plan_has_a_stream_for_each_node_of_workers() -> None:
    nodes = (Node(0, 0, True), Node(32, 8), Node(32, 8), Node(16))
    machine = Machine(cpus=80, gpus=16, bfloat16=True, nodes=nodes)
    overrides = ["optim.global_batch_size=64", "optim.steps=10"]

    def plan(*more: str) -> Plan:
        return resolve(load([*overrides, *more]), SetFacts(1000, "d"), machine)

    auto = plan()
    assert (auto.workers, auto.streams) == (16, 2)
    assert auto.decode_tasks == 2 * int(23.9 / 0.95) + int(15.9 / 0.95)
    assert plan("resources.streams=4").streams == 4
    assert plan("resources.streams=4", "resources.decode_tasks=3").streams == 3
    assert plan("train.workers=8").streams == 1  # all on one node
