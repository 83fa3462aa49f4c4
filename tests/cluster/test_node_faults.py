"""Nodes that decode are lost, and object stores fill up, in the middle of training."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster import consumed as notes
from tests.cluster.nodes import Cluster, cluster, token, wait_for
from tests.cluster.small_disk import small_disk
from tests.cluster.submit import submit
from tests.cluster.submitted import SAVE_EVERY, Training

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]
STORE = 80 * 2**20  # bytes; Ray takes no less than 75 MiB

# Another job's objects: more than the store of the node that it is told to use. Where the disk
# takes no more, smaller and smaller ones, until not even a small one finds room.
FILL = """
import sys, time
import numpy as np, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
ray.init(logging_level="error", log_to_driver=False)

@ray.remote(num_cpus=0)
class Holder:
    def fill(self, parts):
        self.held, size, refused = [], 10 * 2**20, 0
        while len(self.held) < parts and refused < 8:
            try:
                self.held.append(ray.put(np.full(size, len(self.held), np.uint8)))
            except ray.exceptions.OutOfDiskError:
                refused += 1
                size = max(size // 4, 2**17)
                time.sleep(1)  # for what is on its way to the disk
        return len(self.held)
    def intact(self):
        return all((ray.get(ref) == n).all() for n, ref in enumerate(self.held))

nodes = {n["Labels"]["node"]: n["NodeID"] for n in ray.nodes() if n["Alive"]}
holder = Holder.options(scheduling_strategy=On(nodes[sys.argv[1]], soft=False)).remote()
parts = ray.get(holder.fill.remote(int(sys.argv[2])))
print("filled" if parts == int(sys.argv[2]) else "full", parts, flush=True)
while not __import__("os").path.exists(sys.argv[3]):
    time.sleep(1)
print("intact", ray.get(holder.intact.remote()), flush=True)
"""


@pytest.fixture
def three(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A bare head, `train` with two CPUs and `decode` with one: nobody else can do its work.

    A parameter gives them disks of that many MiB to spill to.
    """
    mib = getattr(request, "param", 0)
    with ExitStack() as stack:
        spill = {
            name: (f"--object-spilling-directory={stack.enter_context(small_disk(disk, mib))}",)
            if mib
            else ()
            for name in ("train", "decode")
            for disk in [tmp_path / f"disk-{name}"]
        }
        made = stack.enter_context(cluster(env=token() | notes.environment(tmp_path)))
        made.head(store=STORE)
        made.add("train", cpus=2, store=STORE, arguments=spill["train"])
        made.add("decode", cpus=1, store=STORE, arguments=spill["decode"])
        yield made


def test_the_node_that_decodes_is_lost(three: Cluster, tmp_path: Path) -> None:
    """All decoders die with it; another node comes, as an autoscaler would send one."""
    training = Training(three, tmp_path, steps=600)
    job = training.submit()
    training.until_step(12, job)
    decode = three.nodes[2]
    assert decode.find("_Decode") and not three.nodes[1].find("_Decode")
    assert three.nodes[1].find("RayTrainWorker") and not decode.find("RayTrainWorker")
    at = time.time()
    decode.kill()
    three.add("decode2", cpus=1, store=STORE)
    assert job.finish() == 0, job.text
    groups = training.consumed().groups
    figures = training.check_and_record(
        "decode-node-lost", at, f"worker groups started at steps {groups}; another node came"
    )
    assert figures["lost_steps"] <= SAVE_EVERY + 5


def test_a_full_object_store_spills(three: Cluster, tmp_path: Path) -> None:
    """Another job holds more than the stores have; both go on, through the disk."""
    training = Training(three, tmp_path, steps=400)
    job = training.submit()
    training.until_step(12, job)
    at = time.time()
    over = tmp_path / "over"
    script = tmp_path / "fill.py"
    script.write_text(FILL)
    for name in ("train", "decode"):
        others = submit(three, sys.executable, str(script), name, "16", str(over))
        others.until("filled 16")
        if name == "train":
            first = others
    spilled = [path for node in three.nodes for path in node.folder.rglob("ray_spilled_objects*/*")]
    assert sum(path.stat().st_size for path in spilled) > 50 * 2**20
    assert job.finish() == 0, job.text
    over.touch()
    for held in (first, others):
        assert held.finish() == 0 and "intact True" in held.text, held.text
    training.check_and_record("object-store-full", at, "another job's objects filled both stores")


@pytest.mark.parametrize("three", [48], indirect=True)
def test_a_full_disk_behind_a_full_store_is_said(three: Cluster, tmp_path: Path) -> None:
    """Another job fills store and disk of both nodes to the last 128 KiB."""
    script, over = tmp_path / "fill.py", tmp_path / "over"
    script.write_text(FILL)
    others = [
        submit(three, sys.executable, str(script), node, "100", str(over))
        for node in ("train", "decode")
    ]
    for other in others:
        other.until(r"full \d+")
    training = Training(three, tmp_path, steps=30)
    # a batch is 0.9 MB; the crops of smaller images travel beside the store
    job = training.submit("train.max_restarts=0", "augment.global_size=96")
    code = job.finish()
    assert code != 0, job.text
    assert "object store" in job.text and "disk" in job.text
    over.touch()
    for other in others:
        wait_for(lambda other=other: other.process.poll() is not None, "the other job to end")
    at = time.time()
    job = training.submit("augment.global_size=96")
    assert job.finish() == 0, job.text
    training.check_and_record("object-store-and-disk-full", at, "resubmitted when there was room")
