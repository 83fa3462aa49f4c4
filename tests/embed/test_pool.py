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
    from ray.data import DataContext

    small_units(2)  # pieces of row groups, which one task reads together
    asked = Request(**{**request_.__dict__, "outputs": ("cls", "patches")})
    report = embed_set(asked, str(tmp_path / "pool"), tmp_path / "bad.parquet")
    assert (report.embedded, report.workers, report.bad) == (13, 2, 2)
    assert report.pace.embed_s > 0 and 0 <= report.pace.waiting < 1
    assert DataContext.get_current().target_max_block_size != 1  # of the driver's own datasets
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


SLOW = """
import time
import pipeline.embed.units as units
units.UNIT_IMAGES = 10
import pipeline.embed.pool as pool
write = pool.write_part
def late(*arguments):
    time.sleep(0.3)
    write(*arguments)
pool.write_part = late
"""
HERE = """
import sys
from dataclasses import replace
from pipeline.embed import pool, run
from pipeline.embed.embedders import embedder_of
from pipeline.shards.shards import open_shards
weights, images, folder, bad = sys.argv[1:]
def facts(request):
    return run._model_facts(request.spec, request.outputs, request.blocks)
def embedded(reads, assignment):
    yield pool._embed_all(reads, replace(assignment, gpu=False)), 1
run._asked_of_a_task = facts
run.embedded_by_pool = run.embedded_in_one_task = embedded
run.embed_set(run.Request(embedder_of(weights), open_shards(images)), folder, bad)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("where", ["one process", "a job with its Ray"])
def test_killed_ten_times_and_nothing_is_lost(where: str, weights: Path, tmp_path: Path) -> None:
    """Kill -9 of all processes, at ten moments of the work."""
    draw = np.random.default_rng(0)
    images = [encoded(scene(n, 60, 80), "JPEG") for n in range(400)]
    images[77] = b"broken"
    for name in range(4):
        rows = images[name * 100 : name * 100 + 100]
        shard(tmp_path / "in" / f"{name}.parquet", rows, group=10)
    # units of ten, and so slow that a kill falls between them
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"PYTHONPATH": f"{tmp_path}/slow:{ROOT}", "OMP_NUM_THREADS": "1"}
    run = tmp_path / "runs" / "embed"
    folder, bad = run / "vectors", run / "embed" / "bad.parquet"
    if where == "one process":
        places = [weights, tmp_path / "in", folder, bad]
        command = [sys.executable, "-c", HERE, *map(str, places)]
    else:
        fields = {
            "model": weights,
            "data.shards": tmp_path / "in",
            "run.folder": tmp_path / "runs",
            "track.enabled": "false",
            "resources.cpus": 2,
            "resources.object_store_gb": 0.2,
        }
        command = [sys.executable, str(ROOT / "jobs" / "embed.py")]
        command += [f"{name}={value}" for name, value in fields.items()]
    repeated: Counter[str] = Counter()
    for _ in range(10):
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        goal, deadline = len(before) + int(draw.integers(1, 4)), time.monotonic() + 60
        while len(list(folder.glob("part-*"))) < goal and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(float(draw.uniform(0.01, 0.1)))
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
        process.wait()
        after = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
        repeated.update(name for name in before if before[name] != after.get(name))
    assert not repeated  # what was whole is never made again
    last = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert last.returncode == 0, last.stderr
    vectors = open_vectors(str(folder))
    assert vectors.places().tolist() == [n for n in range(400) if n != 77]
    assert pq.read_table(bad).num_rows == 1
    assert not list(folder.glob(".*"))
    embedder = open_embedder(embedder_of(str(weights)))
    first = [embedder.prepare(decode_image(image)) for image in images[:10]]
    np.testing.assert_array_equal(vectors.read()[:10], embedder.outputs(first)["cls"])
