"""The stream on many nodes, simulated: what a block costs its coordinator, and what crosses nodes.

    python benchmarks/nodes.py --nodes 1,8 --steps 200

"Nodes" are raylets of their own on this machine (`--share` of them on one raylet, to save memory),
each with one decoder, one consuming worker and a part of an object store. Decoders make crops of
zeros and consumers only count, both without torch, so that many fit. Measured in steady state, with
one stream for all nodes and with one stream a node:

    start          seconds until every worker has had its first blocks
    blocks/s       of all workers together, when what had been made ahead is used up; a few cores
                   cannot show what many nodes would do
    CPU a block    ms of CPU time of each kind of process, all of that kind together; of the
                   coordinators also what remains without their turns while nobody takes anything
    between nodes  bytes that raylets sent each other, for an image (Ray's own counter), and how
                   many of the bytes of its crops that is; nodes on one raylet send nothing
    read           rows of the row groups that were read, over images taken
    memory         of all Ray processes of the simulation (proportional set size)
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # none of these would be used

import numpy as np
import psutil
import pyarrow as pa
import ray
from PIL import Image
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.driver.cluster import quiet_environment
from pipeline.pack.pack import PackPlaces, pack
from pipeline.shards.row_group import read_group
from pipeline.shards.shards import ShardColumns, ShardSet, open_shards
from pipeline.stream.dealer import DecodeTasks
from pipeline.stream.decoder import StreamSpec
from pipeline.stream.feeder import launch_feeder
from pipeline.stream.reader import EncodedImages, Reading, reading_of
from pipeline.stream.rows import row_at, row_of
from pipeline.views.crops import CropSpec
from pipeline.views.masks import MaskSpec
from pipeline.views.photometric import PhotometricSpec

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes cannot import this file

CROPS = CropSpec(global_size=64, local_size=16, local_crops=1)
CROP_BYTES = 25344  # of these, an image
CHUNK = 8  # 203 KB: smaller blocks would not go through the object store
STORE = 80 * 2**20  # of a raylet, the least that Ray takes
KINDS = {  # part of a process title: what it is called here
    "SplitCoordinator": "coordinator",
    "Dealer": "dealer",
    "WindowReader": "window reader",
    "_Read": "read task",
    "MapWorker": "decoder",
    "Consumer": "consumer",
    "Feeder": "feeder",
    "Agent": "agents of nodes",
    "StatsActor": "statistics",
    "LocationTracker": "locations",
    "raylet": "raylet",
    "gcs_server": "gcs",
}


@dataclass(frozen=True)
class Counts:
    """Everything that is counted, at one moment."""

    at: float
    cpu_s: dict[str, float]  # by kind of process
    sent: float  # bytes, by raylets
    read: int  # row groups


class CountedColumns(ShardColumns):
    """Writes a byte to a file when it is asked for its column: `per_group` times a row group."""

    @property
    def image(self) -> str:
        with Path(self.uri_of_count).open("ab") as file:
            file.write(b".")
        return "image"

    @image.setter
    def image(self, value: str) -> None: ...


def counted(columns: ShardColumns, count: Path) -> ShardColumns:
    """The columns of a set, with every reading counted."""
    same = object.__new__(CountedColumns)
    for name in columns.__dataclass_fields__:
        if name != "image":
            object.__setattr__(same, name, getattr(columns, name))
    object.__setattr__(same, "uri_of_count", str(count))
    return same


class LightDecode:
    """In place of `dealer._Decode`: as many chunks, as large, of zeros."""

    def __init__(self, dealer: Any, spec: list[Any], first_step: int) -> None:
        self.dealer, self.first_step = dealer, first_step

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for row in range(table.num_rows):
            portion = EncodedImages.of(table, row)
            for images in portion.portions(CHUNK):
                crops = np.zeros(len(images) * CROP_BYTES, np.uint8)
                yield row_of({"image_ids": images.image_ids}, {"crops": crops})
            place = portion.pass_index, portion.start
            self.dealer.note_decoded.remote(self.first_step, place, len(portion))


def light_decoders() -> None:
    """In every process of the simulation, before anything else."""
    import pipeline.stream.dealer

    pipeline.stream.dealer._Decode = LightDecode  # type: ignore[assignment, misc]


@ray.remote(num_cpus=0)
class Consumer:
    """Training workers of one raylet, which take blocks and do nothing with them."""

    def __init__(self, feeder: Any, ranks: list[int], workers: int) -> None:
        node = ray.get_runtime_context().get_node_id()
        if 0 in ranks:
            feeder.open.remote("one", 0, workers)
        self.asked = [feeder.iterator.remote("one", 0, rank, node) for rank in ranks]
        self.blocks: list[Any] = []

    def take(self, steps: int) -> int:
        """Images of so many steps."""
        if not self.blocks:
            options = dict(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
            self.blocks = [iter(part.iter_batches(**options)) for _, part in ray.get(self.asked)]

        def one(blocks: Any) -> int:
            return sum(len(row_at(next(blocks), 0)[0]["image_ids"]) for _ in range(steps))

        with ThreadPoolExecutor(len(self.blocks)) as pool:
            return sum(pool.map(one, self.blocks))


def cpu_seconds() -> tuple[dict[str, float], float]:
    """(CPU seconds by kind, MiB of all) of this process's children."""
    seconds: dict[str, float] = defaultdict(float)
    memory = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, OSError):
            title = " ".join(process.cmdline()[:1])
            kind = next((k for part, k in KINDS.items() if part in title), "other")
            times = process.cpu_times()
            seconds[kind] += times.user + times.system
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            memory += int(re.search(r"^Pss:\s+(\d+)", rollup, re.M)[1]) / 1024  # type: ignore[index]
    return dict(seconds), memory


def sent_bytes() -> float:
    """Bytes that raylets have sent to each other, by the metrics that each node exports."""
    total = 0.0
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with suppress(OSError):
            text = urllib.request.urlopen(url, timeout=20).read().decode()
            for line in text.splitlines():
                if line.startswith("ray_object_manager_bytes") and "Pushed" in line:
                    total += float(line.split()[-1])
    return total


def counts(count: Path) -> Counts:
    """Now."""
    return Counts(time.perf_counter(), cpu_seconds()[0], sent_bytes(), count.stat().st_size)


def per_group(shards: ShardSet, folder: Path) -> int:
    """Bytes that `CountedColumns` writes for a row group."""
    count = folder / "one"
    count.write_bytes(b"")
    read_group(counted(shards.columns, count), shards.files[0].path, 0)
    return count.stat().st_size


def shards_in(folder: Path, images: int) -> ShardSet:
    """Packed shards of small JPEGs."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(images):
        low = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        stream = io.BytesIO()
        low.resize((72, 72), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        (folder / "images" / f"{i:05}.jpg").write_bytes(stream.getvalue())
    places = PackPlaces(bad_images=str(folder / "bad.parquet"), scratch=str(folder / "work"))
    pack(str(folder / "images"), str(folder / "shards"), places)
    return open_shards(str(folder / "shards"))


def spec_of(reading: Reading, columns: ShardColumns) -> StreamSpec:
    """Small crops, which cost little to make."""
    return StreamSpec(
        columns=columns,
        seed=0,
        global_batch=reading.order.global_batch,
        steps_per_pass=reading.order.steps_per_pass,
        crops=CROPS,
        photometric=PhotometricSpec(),
        masks=MaskSpec((4, 4), 0.5, (0.1, 0.5)),
        chunk=CHUNK,
        max_pixels=10**6,
        image_bytes=reading.shards.image_bytes,
        store_bytes=2 * CHUNK * CROPS.bytes,  # one chunk a portion, as with photos
    )


def consumers(feeder: Any, on_each: list[int]) -> list[Any]:
    """One for each raylet, for as many ranks as it has CPUs."""
    places = sorted(
        ((n["Resources"]["CPU"], n["NodeID"]) for n in ray.nodes() if "CPU" in n["Resources"]),
        reverse=True,
    )
    workers, first = [], 0
    for (_, node), here in zip(places, on_each, strict=True):
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        ranks = list(range(first, first + here))
        first += here
        workers.append(
            Consumer.options(scheduling_strategy=there).remote(feeder, ranks, sum(on_each))
        )
    return workers


def taken(workers: list[Any], steps: int) -> int:
    """Images of so many steps, which all workers take."""
    return sum(ray.get([worker.take.remote(steps) for worker in workers]))


def measured(shards: ShardSet, folder: Path, nodes: int, streams: Any, options: Any) -> str:
    """Lines: a number of nodes with so many streams."""
    count = folder / f"count-{nodes}-{streams}"
    count.touch()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": STORE},
        connect=False,
    )
    try:
        raylets = -(-nodes // options.share)
        on_each = [nodes // raylets + (i < nodes % raylets) for i in range(raylets)]
        for here in on_each:
            cluster.add_node(num_cpus=here, object_store_memory=STORE * min(2, here))
        cluster.wait_for_nodes()
        ray.init(
            cluster.address,
            logging_level="error",
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": light_decoders},
        )
        batch = nodes * CHUNK
        window = max(1, options.window // batch) * batch
        reading = reading_of(shards, seed=0, global_batch=batch, window=window)
        spec = spec_of(reading, counted(shards.columns, count))
        steps = options.warm_up + 2 * options.steps + 500
        feeder = launch_feeder(reading, spec, steps, DecodeTasks(0.85, nodes), nodes, streams)
        workers = consumers(feeder, on_each)
        began = time.perf_counter()
        taken(workers, 1)
        start = time.perf_counter() - began
        taken(workers, options.warm_up)
        time.sleep(options.settle_s)  # metrics are exported every few seconds
        quiet = cpu_seconds()[0]
        waited = time.perf_counter()
        time.sleep(options.settle_s)
        before = counts(count)
        waited = before.at - waited
        images = taken(workers, options.steps)  # much of it had been made
        middle = time.perf_counter()
        later = taken(workers, options.steps)
        rate = later / CHUNK / (time.perf_counter() - middle)
        images += later
        time.sleep(options.settle_s)
        after = counts(count)
        _, memory = cpu_seconds()
    finally:
        ray.shutdown()
        cluster.shutdown()
    blocks = images / CHUNK
    idle = (before.cpu_s["coordinator"] - quiet["coordinator"]) / waited  # cores
    busy = after.cpu_s["coordinator"] - before.cpu_s["coordinator"]
    without = 1000 * (busy - idle * (after.at - before.at)) / blocks
    cost = {
        kind: 1000 * (seconds - before.cpu_s.get(kind, 0.0)) / blocks
        for kind, seconds in after.cpu_s.items()
    }
    sent = (after.sent - before.sent) / images
    groups = sum(len(file.row_groups) for file in shards.files)
    read = (after.read - before.read) / per_group(shards, folder) / groups * shards.rows / images
    kinds = ", ".join(f"{k} {ms:.2f}" for k, ms in sorted(cost.items(), key=lambda x: -x[1]))
    return (
        f"{nodes:3} nodes, {streams} stream{'s' * (streams != 1)}: "
        f"start {start:.0f} s; {rate:7.1f} blocks/s; "
        f"between nodes {sent / 1000:.2f} KB an image ({sent / CROPS.bytes:.0%} of its crops); "
        f"read {read:.2f} x; memory {memory / 1024:.1f} GiB\n"
        f"    coordinators: {without:.2f} ms a block and each "
        f"{1000 * idle / streams:.1f} ms a second\n"
        f"    CPU ms a block: {kinds}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", default="1,8")
    parser.add_argument("--streams", default="one,each", help="one, one a node, or a number")
    parser.add_argument("--steps", type=int, default=200, help="twice so many are measured")
    parser.add_argument("--warm-up", type=int, default=60, help="steps before that")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--share", type=int, default=1, help="nodes of one raylet")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--settle-s", type=float, default=12.0)
    options = parser.parse_args()
    quiet_environment()
    folder = Path(tempfile.mkdtemp(prefix="rd", dir="/tmp"))
    try:
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
        shards = shards_in(folder, options.images)
        ray.shutdown()
        for nodes in map(int, options.nodes.split(",")):
            for streams in dict.fromkeys(
                {"one": 1, "each": nodes}.get(which) or int(which)
                for which in options.streams.split(",")
            ):
                print(measured(shards, folder, nodes, streams, options), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
