"""The harness of several nodes: each is one of Ray's, dies when killed, and needs the token."""

from __future__ import annotations

import json
import sys

import psutil
import pytest

from tests.cluster.nodes import cluster, token, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

WHERE = """
import json, ray
ray.init(logging_level="error", log_to_driver=False)
@ray.remote(num_cpus=1)
def where():
    return ray.get_runtime_context().get_node_id()
names = {n["NodeID"]: n["Labels"]["node"] for n in ray.nodes() if n["Alive"]}
print(json.dumps([names[ray.get(where.remote())], sorted(names.values())]))
"""


def test_nodes_join_work_and_die() -> None:
    with cluster(env=token()) as made:
        head = made.head()
        first = made.add("first", cpus=1)
        shown = made.run(sys.executable, "-c", WHERE)
        assert shown.returncode == 0, shown.stderr
        assert json.loads(shown.stdout.splitlines()[-1]) == ["first", ["first", "head"]]
        second = made.add("second", cpus=1)
        assert made.alive() == {node.node_id: True for node in made.nodes}

        processes = first.processes()
        assert len(processes) > 2
        first.kill()
        assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        wait_for(lambda: not made.alive()[first.node_id], "the head to notice")
        shown = made.run(sys.executable, "-c", WHERE)
        assert json.loads(shown.stdout.splitlines()[-1]) == ["second", ["head", "second"]]

        made.drain(second, deadline_s=1)
        submitted = made.ray("job", "submit", "--", "python", "-c", "print(6 * 7)")
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        assert "42" in submitted.stdout
        made.env.pop("RAY_AUTH_TOKEN")
        refused = made.ray("job", "list")
        assert refused.returncode != 0 and "42" not in refused.stdout
        everything = [p for node in (head, second) for p in node.processes()]
    assert everything
    assert not [p for p in everything if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not made.folder.exists()
