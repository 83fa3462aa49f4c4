"""Embedding on Ray: the bytes of one process, wherever units go and whatever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from pipeline.embed.embedders import embedder_of, open_embedder
from pipeline.embed.pool import Pace, room_for
from pipeline.embed.run import Request, embed_set
from pipeline.embed.vectors import open_vectors
from pipeline.errors import PipelineError
from pipeline.images.decode import decode_image
from tests.curate.images import scene, shard
from tests.data import encoded

ROOT = Path(__file__).parents[2]


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


@pytest.mark.usefixtures("ray_cluster")
def test_a_pool_makes_the_parts_of_one_process(
    request_: Request,
    tmp_path: Path,
    small_units: Callable[[int], None],
    request: Any,
) -> None:
    small_units(2)  # pieces of row groups, which one task reads together
    asked = Request(**{**request_.__dict__, "outputs": ("cls", "patches")})
    report = embed_set(asked, str(tmp_path / "pool"), tmp_path / "bad.parquet")
    assert (report.embedded, report.workers, len(report.bad)) == (13, 2, 2)
    assert report.pace.embed_s > 0 and 0 <= report.pace.waiting < 1
    request.getfixturevalue("inline")
    embed_set(asked, str(tmp_path / "inline"))
    assert parts(tmp_path / "pool") == parts(tmp_path / "inline")


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_worker_cannot_do_is_one_sentence(
    request_: Request, tmp_path: Path, pile: Path, small_units: Callable[[int], None]
) -> None:
    with pytest.raises(PipelineError, match="has 4 blocks, 9 were asked for"):
        embed_set(Request(**{**request_.__dict__, "blocks": 9}), str(tmp_path / "a"))
    small_units(2)
    (pile / "b.parquet").unlink()
    with pytest.raises(PipelineError, match=r"b\.parquet"):
        embed_set(request_, str(tmp_path / "b"))


@pytest.mark.parametrize(
    ("cpus", "gpus", "units", "actors", "decoders"),
    [
        (2, 0, 99, 2, 1),
        (64, 0, 99, 64, 8),
        (64, 0, 3, 3, 8),
        (16, 1, 99, 1, 15),
        (128, 8, 99, 8, 120),
        (4, 4, 99, 4, 2),
        (1, 0, 99, 1, 1),
    ],
)
def test_what_is_asked_for_is_there(
    cpus: int, gpus: int, units: int, actors: int, decoders: int
) -> None:
    room = room_for(cpus, gpus, units)
    assert (room.actors, room.decoders) == (actors, decoders)
    taken = room.actors * room.actor_cpus + room.decoders * room.decoder_cpus
    assert taken <= cpus and room.actors * room.actor_gpus <= gpus
    assert room.actor_cpus > 0 and room.decoder_cpus > 0


def test_paces_add_up() -> None:
    pace = Pace() + Pace(3, 1.0, 0.5) + Pace(4, 2.0, 0.5)
    assert pace == Pace(7, 3.0, 1.0) and pace.waiting == 0.25 and Pace().waiting == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_ten_times_and_nothing_is_lost(weights: Path, tmp_path: Path) -> None:
    """Kill -9 of the driver and all its processes, at ten moments of the work."""
    draw = np.random.default_rng(0)
    images = [encoded(scene(n, 60, 80), "JPEG") for n in range(300)]
    images[77] = b"broken"
    for name in range(3):
        rows = images[name * 100 : name * 100 + 100]
        shard(tmp_path / "in" / f"{name}.parquet", rows, group=10)
    slow = tmp_path / "slow"
    slow.mkdir()
    # units of ten, and so slow that a kill falls between them
    (slow / "sitecustomize.py").write_text(
        "import time\n"
        "import pipeline.embed.units as units\n"
        "units.UNIT_IMAGES = 10\n"
        "import pipeline.embed.pool as pool\n"
        "write = pool.write_part\n"
        "def late(*a):\n"
        "    time.sleep(0.3)\n"
        "    write(*a)\n"
        "pool.write_part = late\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"PYTHONPATH": f"{slow}:{ROOT}", "OMP_NUM_THREADS": "1"}
    fields = {
        "model": weights,
        "data.shards": tmp_path / "in",
        "run.folder": tmp_path / "runs",
        "track.enabled": "false",
        "resources.cpus": 2,
        "resources.object_store_gb": 0.2,
    }
    command = [sys.executable, ROOT / "jobs" / "embed.py"]
    command += [f"{name}={value}" for name, value in fields.items()]
    folder = tmp_path / "runs" / "embed" / "vectors"
    repeated: Counter[str] = Counter()
    for _ in range(10):
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        goal, deadline = len(before) + int(draw.integers(1, 4)), time.monotonic() + 60
        while len(list(folder.glob("part-*"))) < goal and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(float(draw.uniform(0.01, 0.1)))
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        for one in family:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
        process.wait()
        after = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
        repeated.update(name for name in before if before[name] != after.get(name))
    assert not repeated  # what was whole is never made again
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    vectors = open_vectors(str(folder))
    assert vectors.places().tolist() == [n for n in range(300) if n != 77]
    bad = pq.read_table(tmp_path / "runs" / "embed" / "embed" / "bad.parquet")
    assert bad.num_rows == 1
    assert not list(folder.glob(".*"))
    rows = [open_embedder(embedder_of(str(weights))).prepare(decode_image(x)) for x in images[:10]]
    expected = open_embedder(embedder_of(str(weights))).outputs(rows)["cls"]
    np.testing.assert_array_equal(vectors.read()[:10], expected)
