"""Nodes with training workers that go: lost, about to go, replaced, come back."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import consumed, training
from tests.cluster.consumed import Consumed
from tests.cluster.figures import record
from tests.cluster.nodes import Cluster, Node, cluster, token, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Cluster]:
    """A head without CPUs and three nodes of one CPU: two workers and a decoder fit."""
    notes = consumed.environment(tmp_path / "notes")
    with cluster(env=token() | notes | {"STEP_S": "0.3"}) as found:
        found.head()
        for name in "abc":
            found.add(name, cpus=1)
        yield found


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return training.make_shards(tmp_path)


def with_worker(made: Cluster) -> Node:
    """The last node that has a training worker: not that of rank 0 where there are two."""
    nodes = [n for n in made.nodes if not n.dead and n.find("RayTrainWorker")]
    assert nodes
    return nodes[-1]


def wasted(found: Consumed) -> int:
    """Steps whose work was done again."""
    return found.taken - len(found.steps)


def figures(
    name: str, folder: Path, found: Consumed, at: float, steps: int, note: str, before: int = 0
) -> None:
    """Records a fault; `before`: steps that an earlier one had wasted."""
    record(
        name,
        lost_steps=wasted(found) - before,
        recovery_s=training.recovery(found, at),
        repeated=found.repeated(training.PASS),
        lost=found.lost(training.PASS, training.IMAGES),
        metrics_lost=training.missing_steps(folder, steps),
        note=note,
    )


def test_elastic_goes_on_smaller_and_grows_again(
    made: Cluster, shards: Path, tmp_path: Path
) -> None:
    environment = made.environment()
    job = training.start(tmp_path, shards, environment, "train.workers=[1,2]", "optim.steps=150")
    try:
        job.until(r"step 012/150 ")
        assert "1, 2 of [1, 2] divide the 2 micro batches of a step" in job.text
        lost = with_worker(made)
        at = time.time()
        lost.kill()
        job.until(r"workers     2 -> 1", after=at)
        job.until(r"resumed     from the checkpoint at step", after=at)
        job.until(r"step \d+/150 ", after=at)
        smaller = consumed.consumed(made.env, micro_batches=2)
        figures("worker-node-lost-elastic", tmp_path, smaller, at, max(smaller.steps) + 1,
                "goes on with 1 of 2 workers; most of the time is Ray's notice of the loss and "
                "the start of the group")  # fmt: skip
        at = time.time()
        made.add("d", cpus=1)
        job.until(r"workers     1 -> 2", after=at)
        assert job.finish() == 0, job.text
    finally:
        training.end(job)
    found = consumed.consumed(made.env, micro_batches=2)
    training.assert_all_images_once(found, 150)
    # a second group that came up before the head knew of the loss may stand between
    assert 3 <= len(found.groups) <= 4 and len(set(found.groups)) == 3
    assert not training.missing_steps(tmp_path, 150)
    rows = training.journal(tmp_path)
    sizes = [rows[step]["perf/workers"] for step in range(150)]
    assert sizes[0] == 2 and sizes[found.groups[1]] == 1 and sizes[149] == 2
    # growing is not a fault: it waits for a checkpoint, so no step is done twice
    grown = found.groups[-1]
    assert wasted(found) == wasted(smaller)
    assert f"resumed     from the checkpoint at step {grown}" in job.text
    figures("workers-grow", tmp_path, found, at, 150,
            "from 1 to 2 workers when a node came", before=wasted(smaller))  # fmt: skip


def test_not_elastic_waits_for_another_node(made: Cluster, shards: Path, tmp_path: Path) -> None:
    job = training.start(tmp_path, shards, made.environment())
    try:
        job.until(r"step 12/40 ")
        at = time.time()
        with_worker(made).kill()
        said = job.until(r"waiting     (.*)", after=at)[1]
        assert "leave none of the 2 CPUs for decoding; for " in said
        came = time.time()
        made.add("d", cpus=1)
        job.until(r"resumed     from the checkpoint at step", after=at)
        job.until(r"step \d+/40 ", after=came)
        assert job.finish() == 0, job.text
    finally:
        training.end(job)
    found = consumed.consumed(made.env, micro_batches=2)
    training.assert_all_images_once(found, 40)
    assert len(found.groups) == 2 and not training.missing_steps(tmp_path, 40)
    figures("worker-node-lost-fixed", tmp_path, found, came, 40,
            "counted from the moment another node starts")  # fmt: skip


def test_not_elastic_gives_up_with_a_sentence(made: Cluster, shards: Path, tmp_path: Path) -> None:
    job = training.start(tmp_path, shards, made.environment(), "resources.replace_s=5")
    try:
        job.until(r"step 12/40 ")
        with_worker(made).kill()
        assert job.finish() == 2, job.text
    finally:
        training.end(job)
    assert "leave none of the 2 CPUs for decoding; waited" in job.text
    assert "the same command goes on from the last checkpoint" in job.text
    assert "Traceback" not in job.text
    assert training.checkpoints(tmp_path)[-1] >= 10


def test_a_stop_is_obeyed_while_there_is_no_room(
    made: Cluster, shards: Path, tmp_path: Path
) -> None:
    job = training.start(tmp_path, shards, made.environment())
    try:
        job.until(r"step 12/40 ")
        at = time.time()
        with_worker(made).kill()
        job.until(r"waiting     ", after=at)
        job.process.send_signal(signal.SIGTERM)
        assert job.finish() == 143, job.text
    finally:
        training.end(job)
    saved = training.checkpoints(tmp_path)[-1]
    assert f"stopped     at step {saved}; the same command goes on from there" in job.text


@pytest.mark.parametrize("how", ["notice", "sigterm"])
def test_a_node_about_to_go_is_left_with_a_checkpoint(
    how: str, made: Cluster, shards: Path, tmp_path: Path
) -> None:
    made.add("d", cpus=1)
    job = training.start(tmp_path, shards, made.environment(), "optim.steps=120")
    try:
        job.until(r"step 012/120 ")
        node = with_worker(made)
        at = time.time()
        if how == "notice":
            made.drain(node, deadline_s=300)
        else:
            node.process.send_signal(signal.SIGTERM)
        job.until(r"notice      1 node with training workers will be taken away", after=at)
        job.until(r"resumed     from the checkpoint at step", after=at)
        wait_for(lambda: not node.find("RayTrainWorker"), "the worker to leave the node")
        assert job.finish() == 0, job.text
    finally:
        training.end(job)
    found = consumed.consumed(made.env, micro_batches=2)
    training.assert_all_images_once(found, 120)
    assert len(found.groups) == 2 and not training.missing_steps(tmp_path, 120)
    assert wasted(found) == 0  # the checkpoint is of the last step that the group did
    figures(f"node-{how}", tmp_path, found, at, 120, "a group of the same size on other nodes")


def test_a_plan_without_room_is_refused_or_waits(shards: Path, tmp_path: Path) -> None:
    with cluster(env=token()) as made:
        made.head()
        job = training.start(tmp_path, shards, made.environment())
        assert job.finish() == 2, job.text
        assert (
            "error: 2 workers of 1 CPU each need 2 CPUs; the cluster has 0 CPUs on 1 node: room "
            "for none" in job.text
        )
        assert "resources.wait_s=900" in job.text and "Traceback" not in job.text
        job = training.start(
            tmp_path, shards, made.environment(), "resources.wait_s=600", "optim.steps=5"
        )
        try:
            job.until(r"waiting     2 workers of 1 CPU each need 2 CPUs; .*; for \d+ s more")
            made.add("late", cpus=3)
            assert job.finish() == 0, job.text
        finally:
            training.end(job)
