"""The head dies and comes back: with GCS fault tolerance (Redis) and without."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import consumed as notes
from tests.cluster.hosts import Host, hosts
from tests.cluster.nodes import Cluster, Node, cluster, free_port, token, wait_for
from tests.cluster.submitted import SAVE_EVERY, Training

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]
# where the driver runs: on a node that stays, not on the head, where Ray puts it by itself
DRIVER = ('--entrypoint-resources={"driver": 1}',)


@contextmanager
def redis(address: str, folder: Path) -> Iterator[str]:
    """host:port of a Redis server of its own."""
    server = shutil.which("redis-server")
    assert server
    port = str(free_port())
    options = ["--bind", address, "--protected-mode", "no", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen([server, "--port", port, *options], stdout=subprocess.DEVNULL)
    try:
        yield f"{address}:{port}"
    finally:
        process.kill()
        process.wait()


@dataclass
class Tolerant:
    """A head that keeps its state in Redis, and two nodes; on hosts, since nodes that share an
    address also share their drivers: Ray takes the head.
    """

    made: Cluster
    head: Node
    host: Host
    kept: dict[str, str]
    nodes: tuple[Node, Node]

    def restart_head(self) -> float:
        """The head dies and comes back; gives the seconds until it is there."""
        at = time.time()
        self.head.kill()
        self.host.boot()
        self.made.head(place=self.host, env=self.kept)
        return time.time() - at


@pytest.fixture
def tolerant(tmp_path: Path) -> Iterator[Tolerant]:
    if not shutil.which("redis-server"):
        pytest.skip("needs redis-server")
    env = token() | notes.environment(tmp_path)
    with hosts(3) as (one, two, three), redis(str(one.net.subnet[1]), tmp_path) as server:
        kept = {"RAY_REDIS_ADDRESS": server}
        with cluster(env=env) as made:
            head = made.head(place=one, env=kept)
            train = made.add("train", cpus=2, place=two)
            decode = made.add("decode", cpus=1, place=three, resources={"driver": 1})
            yield Tolerant(made, head, one, kept, (train, decode))


def test_the_head_restarts_with_fault_tolerance(tolerant: Tolerant, tmp_path: Path) -> None:
    training = Training(tolerant.made, tmp_path, steps=600)
    job = training.submit(options=DRIVER)
    training.until_step(12, job)
    at = time.time()
    back = tolerant.restart_head()
    wait_for(lambda: (training.run / "pretrain" / "_done.json").exists(), "the end", 900)
    groups = training.consumed().groups
    training.check_and_record(
        "head-restart-gcs-ft",
        at,
        f"head back after {back:.0f} s; worker groups started at steps {groups}",
    )


def test_the_head_restarts_with_fault_tolerance_and_takes_the_driver_along(
    tolerant: Tolerant, tmp_path: Path
) -> None:
    """The driver is where `ray job submit` puts it; the nodes stay, the next submission resumes."""
    training = Training(tolerant.made, tmp_path, steps=60)
    job = training.submit()
    training.until_step(12, job)
    at = time.time()
    back = tolerant.restart_head()
    assert job.finish() != 0
    job = training.submit()
    assert job.finish() == 0, job.text
    job.until("resumed     from the checkpoint at step")
    assert all(node.process.poll() is None for node in tolerant.nodes)
    figures = training.check_and_record(
        "head-restart-gcs-ft-driver",
        at,
        f"head back after {back:.0f} s, the other nodes stayed; resubmitted",
    )
    assert figures["lost_steps"] <= SAVE_EVERY + 10


def test_the_head_restarts_without_fault_tolerance(tmp_path: Path) -> None:
    with cluster(env=token() | notes.environment(tmp_path)) as made:
        head = made.head()
        train = made.add("train", cpus=2)
        decode = made.add("decode", cpus=1)
        training = Training(made, tmp_path, steps=60)
        job = training.submit()
        training.until_step(12, job)
        at = time.time()
        head.kill()
        assert job.finish() != 0
        made.head()
        # The other nodes belong to a cluster that is gone. Whether they end or must be
        # ended, others take their place.
        until = time.monotonic() + 90
        while time.monotonic() < until and any(n.process.poll() is None for n in (train, decode)):
            time.sleep(1)
        stayed = [node.name for node in (train, decode) if node.process.poll() is None]
        for node in (train, decode):
            node.kill()
        made.add("train", cpus=2)
        made.add("decode", cpus=1)
        back = time.time() - at
        job = training.submit()
        assert job.finish() == 0, job.text
        job.until("resumed     from the checkpoint at step")
        figures = training.check_and_record(
            "head-restart-no-ft",
            at,
            f"old nodes {'had to be ended' if stayed else 'ended by themselves'}; all back after "
            f"{back:.0f} s, then resubmitted",
        )
        assert figures["lost_steps"] <= SAVE_EVERY + 10
