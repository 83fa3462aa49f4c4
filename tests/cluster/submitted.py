"""A training run on a test cluster that faults happen to, and what it must be afterwards."""

from __future__ import annotations

import io
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.track.journal import read_steps
from tests.cluster import consumed as notes
from tests.cluster.figures import record
from tests.cluster.nodes import Cluster
from tests.cluster.pile import write_recipe
from tests.cluster.submit import Job, submit
from tests.curate.piles import hub
from tests.tiny import BATCH

IMAGES = 100  # of which a pass drops what fills no batch
PER_PASS = IMAGES // BATCH
SAVE_EVERY = 10


def make_shards(folder: Path) -> Path:
    """Parquet of noise; no two images are the same."""
    draw = np.random.default_rng(0)
    images = []
    for _ in range(IMAGES):
        stream = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (24, 24, 3), np.uint8)).save(stream, "PNG")
        images.append(stream.getvalue())
    hub(folder / "hub", [images[:50], images[50:]])
    return folder / "hub"


class Training:
    """`jobs/pretrain.py` with two workers that need a CPU each, submitted as often as needed.

    Args:
        cluster: made with `notes.environment(folder)`.
        folder: shared by all nodes.
        steps: of the run.
    """

    def __init__(self, cluster: Cluster, folder: Path, steps: int) -> None:
        self.cluster, self.folder, self.steps = cluster, folder, steps
        self.run = folder / "runs" / "small"
        self.shards = make_shards(folder)

    def submit(self, *extra: str, options: tuple[str, ...] = ()) -> Job:
        """Starts it, or goes on with it."""
        given = [
            str(write_recipe(self.folder)),
            f"data.shards={self.shards}",
            f"run.folder={self.folder}/runs",
            f"optim.steps={self.steps}",
            "train.eval_every=10000",
            f"train.save_every={SAVE_EVERY}",
        ]
        return submit(self.cluster, "python", "jobs/pretrain.py", *given, *extra, options=options)

    def journal(self) -> list[int]:
        """Steps whose metrics are in the journal, in order."""
        rows = read_steps(self.run / "metrics.jsonl", "pretrain")
        return [step for step, row in rows.items() if "loss/total" in row]

    def until_step(self, step: int, job: Job, timeout: float = 600) -> None:
        """Waits until the journal has that step; the job's console may be cut off by a fault."""
        end = time.monotonic() + timeout
        journal = self.run / "metrics.jsonl"
        while not (journal.exists() and max(self.journal(), default=-1) >= step):
            assert time.monotonic() < end, f"step {step} did not come\n{job.text}"
            time.sleep(0.3)

    def consumed(self) -> notes.Consumed:
        """What the workers were given up to now."""
        return notes.consumed(self.cluster.env)

    def check_and_record(self, name: str, at: float, note: str) -> dict[str, Any]:
        """After the end: each image as often as it should be, each step in the journal once.

        Args:
            name: of the fault, as in the table.
            at: when it happened, seconds since 1970.
            note: for the table.

        Returns:
            The figures that were recorded. `recovery_s` is the longest time without a new step that
            began or ended after the fault; to the first step, where the fault was before it.
        """
        found = self.consumed()
        assert list(found.steps) == list(range(self.steps)), sorted(found.steps)
        repeated = found.repeated(PER_PASS)
        lost = found.lost(PER_PASS, PER_PASS * BATCH)
        missing = self.steps - len(set(self.journal()) & set(range(self.steps)))
        times = [found.times[step] for step in range(self.steps)]
        pauses = [b - max(a, at) for a, b in pairwise([at, *times]) if b > at]
        figures = record(
            name,
            lost_steps=found.taken - self.steps,
            recovery_s=max(pauses, default=0.0),
            repeated=repeated,
            lost=lost,
            metrics_lost=missing,
            note=note,
        )
        assert (repeated, lost, missing) == (0, 0, 0), figures
        assert self.journal() == list(range(self.steps))
        return figures
