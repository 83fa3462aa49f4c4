"""The network between the training node and the rest is away for a minute."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.cluster import consumed as notes
from tests.cluster.hosts import hosts
from tests.cluster.nodes import cluster, token
from tests.cluster.submitted import SAVE_EVERY, Training

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]
CUT_S = 60


def test_the_network_is_cut_for_a_minute(tmp_path: Path) -> None:
    env = token() | notes.environment(tmp_path)
    with hosts(3) as (one, two, three), cluster(env=env) as made:
        made.head(place=one)
        train = made.add("train", cpus=2, place=two)
        made.add("decode", cpus=1, place=three)
        training = Training(made, tmp_path, steps=150)
        job = training.submit()
        training.until_step(12, job)
        at = time.time()
        two.cut()
        time.sleep(CUT_S)
        two.mend()
        mended = time.time()
        # What Ray does is its own choice: keep the node, or end it. An ended node is started again,
        # as systemd, Kubernetes or an autoscaler would.
        ended = False
        while job.process.poll() is None:
            if not ended and train.process.poll() is not None:
                ended = True
                two.kill()
                two.boot()
                made.add("train", cpus=2, place=two)
            time.sleep(1)
        assert job.finish() == 0, job.text
        groups = training.consumed().groups
        figures = training.check_and_record(
            "network-cut-60s",
            at,
            f"the node {'was taken for dead and started again' if ended else 'was kept'}; "
            f"{mended - at:.0f} s cut; worker groups started at steps {groups}",
        )
        assert figures["lost_steps"] <= SAVE_EVERY + 10
