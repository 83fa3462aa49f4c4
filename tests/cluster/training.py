"""A tiny training run on a cluster of several nodes: started, watched, hurt, and accounted for."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.track.journal import read_steps
from tests.cluster.consumed import Consumed
from tests.cluster.nodes import ROOT, clean_environment
from tests.cluster.submit import Job
from tests.tiny import BATCH, write_tiny

IMAGES = 80
PASS = IMAGES // BATCH  # steps
LOSSES = ["loss/total", "loss/dino_global", "loss/dino_local", "loss/ibot", "loss/koleo"]


def make_shards(folder: Path) -> Path:
    """`folder`/shards/0.parquet with 80 images of noise in row groups of 16."""
    draw = np.random.default_rng(0)
    rows = []
    for number in range(IMAGES):
        pixels = draw.integers(0, 256, (24, 24, 3), np.uint8)
        pixels[..., number % 2] //= 4
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        rows.append({"image": {"bytes": data.getvalue(), "path": ""}, "label": number % 2})
    shards = folder / "shards"
    shards.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), shards / "0.parquet", row_group_size=16)
    return shards


def start(
    folder: Path, shards: Path, environment: dict[str, str], *extra: str, group: bool = False
) -> Job:
    """Starts `jobs/pretrain.py` as a process of its own; its run folder is `folder`/fault.

    Args:
        folder: of the run.
        shards: from `make_shards`.
        environment: of a client of a cluster, or of none.
        extra: overrides.
        group: in a process group of its own, as a shell starts a job.
    """
    recipe = write_tiny(
        folder / "fault.yaml",
        resources={"cpus": 4, "cpus_per_worker": 1, "object_store_gb": 0.2},
    )
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "jobs" / "pretrain.py"), str(recipe)]
        + [f"data.shards={shards}", f"run.folder={folder}", *extra],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=group,
    )
    return Job(process)


def alone() -> dict[str, str]:
    """Environment of a job that starts a Ray of its own."""
    return clean_environment()


def end(job: Job) -> None:
    """Ends a job that still runs, with everything that it started."""
    if job.process.poll() is None:
        below = psutil.Process(job.process.pid).children(recursive=True)
        job.process.kill()
        for process in below:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
    job.process.wait()


def journal(folder: Path) -> dict[int, dict[str, float]]:
    """The metrics of the training steps that count."""
    rows = read_steps(folder / "fault" / "metrics.jsonl", "pretrain")
    return {step: row for step, row in rows.items() if "loss/total" in row}


def missing_steps(folder: Path, steps: int) -> int:
    """Steps without metrics in the journal."""
    return steps - len(set(journal(folder)) & set(range(steps)))


def checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints in the run folder."""
    found = (folder / "fault" / "checkpoints").glob("step-*")
    return sorted(int(path.name.partition("-")[2]) for path in found)


def assert_all_images_once(found: Consumed, steps: int) -> None:
    """Each pass used each image once, and each step a whole batch."""
    assert sorted(found.steps) == list(range(steps))
    assert {len(images) for images in found.steps.values()} == {BATCH}
    assert found.repeated(PASS) == 0
    assert found.lost(PASS, IMAGES) == 0


def recovery(found: Consumed, at: float) -> float:
    """Seconds from a moment to the first step that a later group of workers took."""
    first = found.groups[-1]
    return min(time for step, time in found.times.items() if step >= first) - at


def pids(word: str, below: int | None = None) -> list[int]:
    """Processes below one (default: this one) whose name or command line has the word."""
    found = []
    for process in psutil.Process(below or os.getpid()).children(recursive=True):
        try:
            if word in " ".join([process.name(), *process.cmdline()]):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
