"""The decisions about groups of workers, on made-up nodes and a clock of the test's own."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.load import load
from pipeline.driver.cluster import Seen
from pipeline.driver.mailbox import Mailbox
from pipeline.errors import PlacementError, StoppedError
from pipeline.plan.layout import Machine
from pipeline.plan.nodes import Node
from pipeline.plan.plan import SetFacts, resolve
from pipeline.train import scaling
from pipeline.train.scaling import Scaling
from tests.standins import Handle


class Feeder(Mailbox):
    """A feeder's side of the policy; `remote` calls are plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[int | None] = []

    def release(self, tasks: Any = None) -> None:
        self.tasks.append(tasks.at_once if tasks else None)
        self.request("")

    @property
    def said(self) -> list[str]:
        return [line for _, line, _ in self.listen(0)]


class Policy:
    """A policy with its surroundings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, workers: str, **overrides: str) -> None:
        self.now, self.nodes, self.feeder = (
            1000.0,
            {"head": Seen(Node(0, 0, True), False)},
            Feeder(),
        )
        monkeypatch.setattr(scaling.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(scaling.time, "sleep", self.pass_time)
        monkeypatch.setattr(scaling, "seen_nodes", lambda: self.nodes)
        self.held = 0.0  # CPUs of each node that another job holds
        monkeypatch.setattr(
            scaling,
            "free_nodes",
            lambda nodes, workers, share: [
                n.node._replace(cpus=n.node.cpus - self.held) for n in nodes.values()
            ],
        )
        monkeypatch.setattr(scaling.ray, "get", lambda value: value)
        fields = {"optim.steps": "9", "optim.global_batch_size": "64", "train.workers": workers}
        fields |= {"resources.cpus_per_worker": "1", **overrides}
        plan = resolve(
            load([f"{k}={v}" for k, v in fields.items()]),
            SetFacts(1000, "d"),
            machine=Machine(cpus=64, gpus=0, bfloat16=False),
        )
        self.policy = Scaling(plan, Handle(self.feeder))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def give(self, **cpus: float) -> None:
        """Sets what the nodes have; 0 takes a node away, a negative number is one about to go."""
        for name, number in cpus.items():
            self.nodes.pop(name, None)
            if number:
                self.nodes[name] = Seen(Node(abs(number)), number < 0)

    def start(self) -> int:
        """The size of the next group; 0: none yet."""
        return self.policy.next_group() or 0

    def look(self, *nodes: str) -> int:
        """The same of a group that runs on these nodes; 0: it stays."""
        return self.policy.other_group(list(nodes)) or 0


def test_a_lost_node_makes_the_group_smaller_and_a_new_one_larger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Policy(monkeypatch, "[2,8]")
    one.give(a=6, b=6)
    assert one.start() == 8 and one.feeder.tasks == [None, 4]
    assert one.look(*"ab" * 4) == 0
    one.give(b=0)
    assert one.start() == 4 and one.feeder.said == ["workers     8 -> 4"]
    one.give(c=1)
    for _ in range(20):
        assert one.look("a", "a", "a", "a") == 0
        one.pass_time(1)
    assert one.feeder.wait_request(0) == ""  # one more CPU is no room for eight
    one.give(c=6)
    asked = one.now
    while not one.feeder.wait_request(0):
        assert one.look("a", "a", "a", "a") == 0
        one.pass_time(1)
    assert one.feeder.wait_request(0) == "move" and one.now - asked >= scaling.SETTLE_S
    assert one.look("a", "a", "a", "a") == 0  # not before there is a checkpoint
    assert one.feeder.acknowledge("move", 7)
    assert one.look("a", "a", "a", "a") == 8


def test_a_group_leaves_a_node_that_is_about_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Policy(monkeypatch, "2")
    one.give(a=2, b=3)
    assert one.start() == 2
    one.give(b=-3)
    one.pass_time(5)
    assert one.look("b", "b") == 0
    assert "1 node with training workers will be taken away" in one.feeder.said[-1]
    assert one.feeder.wait_request(0) == "save"  # there is nowhere to go
    one.feeder.acknowledge("save", 3)
    for _ in range(5):
        one.pass_time(5)
        assert one.look("b", "b") == 0 and one.feeder.wait_request(0) == ""
    one.give(c=-3, b=3, a=3)
    one.pass_time(5)
    assert one.look("c", "a") == 0 and one.feeder.wait_request(0) == "move"
    one.feeder.acknowledge("move", 4)
    assert one.look("c", "a") == 2


def test_a_group_that_shrinks_before_a_node_goes_has_time_for_its_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Policy(monkeypatch, "[2,8]")
    one.give(a=6, b=6)
    assert one.start() == 8
    one.give(b=-6)
    one.pass_time(5)
    assert one.look(*"ab" * 4) == 0 and one.feeder.wait_request(0) == "move"
    for _ in range(3):
        one.pass_time(scaling.ANSWER_S)  # a large checkpoint
        assert one.look(*"ab" * 4) == 0
    one.feeder.acknowledge("move", 7)
    assert one.look(*"ab" * 4) == 4


def test_a_group_that_came_up_too_large_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head took a dead node for alive: two workers hold the CPUs that decoding needs."""
    one = Policy(monkeypatch, "[1,2]")
    one.give(a=1, b=1, c=1)
    assert one.start() == 2
    one.give(c=0)
    one.pass_time(5)
    assert one.look("a", "b") == 0 and one.feeder.wait_request(0) == "move"
    one.pass_time(5)
    assert one.look("a", "b") == 0
    one.pass_time(scaling.ANSWER_S)  # they wait for data and cannot answer
    assert one.look("a", "b") == 1


def test_workers_without_a_cpu_for_decoding_do_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = Policy(monkeypatch, "2", **{"resources.replace_s": "60"})
    one.give(a=3)
    assert one.start() == 2
    one.give(a=2)
    with pytest.raises(PlacementError, match="leave none of the 2 CPUs for decoding; waited 6"):
        for _ in range(100):
            one.pass_time(4)
            assert one.look("a", "a") == 0
    assert len(one.feeder.said) == 2


def test_a_stop_is_obeyed_while_there_are_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Policy(monkeypatch, "2")
    one.give(a=2)
    assert one.start() == 0  # no room
    one.feeder.stop()
    with pytest.raises(StoppedError):
        one.start()


def test_a_stop_is_obeyed_while_the_workers_wait_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Policy(monkeypatch, "2")
    one.give(a=3)
    assert one.start() == 2
    one.feeder.stop()
    assert one.look("a", "a") == 0  # they will write a checkpoint
    one.give(a=2)
    one.pass_time(5)
    assert one.look("a", "a") == 0
    one.pass_time(scaling.ANSWER_S)
    with pytest.raises(StoppedError):
        one.look("a", "a")


def test_waiting_is_said_and_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Policy(monkeypatch, "2", **{"resources.replace_s": "70"})
    one.give(a=2)
    begun = one.now
    with pytest.raises(PlacementError, match=r"leave none of the 2 CPUs .* waited 7\d s for it"):
        while one.now < begun + 200:
            assert one.start() == 0
    said = one.feeder.said
    assert len(said) == 3 and said[0].endswith("CPUs for decoding; for 70 s more")


def test_room_that_others_use_makes_the_group_smaller_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray waits for the resources of a group and gives up: the next size is tried."""
    one = Policy(monkeypatch, "[2,8]")
    one.give(a=20)
    assert [one.start() for _ in range(4)] == [8, 4, 2, 8]
    assert one.look("a", "a") == 0
    assert one.policy.settle_s > scaling.SETTLE_S  # it does not move again and again for nothing


def test_a_group_grows_into_what_others_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Policy(monkeypatch, "[2,8]")
    one.give(a=3)
    assert one.start() == 2
    one.give(a=10)
    one.held = 7.0
    for _ in range(20):
        one.pass_time(5)
        assert one.look("a", "a") == 0 and one.feeder.wait_request(0) == ""
    one.held = 3.0  # the other job has given some back: room for 4, not for 8
    for _ in range(10):
        one.pass_time(5)
        assert one.look("a", "a") == 0
    assert one.feeder.wait_request(0) == "move"
    one.feeder.acknowledge("move", 7)
    assert one.look("a", "a") == 4
