"""Memory of the stream: thumbnails, 20-megapixel photos, and a set larger than the object store.

    python benchmarks/sizes.py --photos photos/

Real photos are re-encoded to the wanted size, written as shards, and streamed to one worker. Every
half second each process of Ray is looked at. Printed are, for each kind of process, the largest
memory of its own (anonymous; neither libraries nor the object store are in it), the most
that the object store held, what it spilled to disk, and images/s in steady state.

    thumbnails   about 10 KB each, many of them
    photos       20 megapixels, about 6 MB each
    endless      thumbnails over and over, through a store of `--small-store-mb`; the worker is
                 slower than the decoders, so that everything fills up that can
"""

from __future__ import annotations

import argparse
import io
import math
import os
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import psutil
import pyarrow as pa
import torch
from loader import spec_of
from PIL import Image

from pipeline.driver.cluster import quiet_environment
from pipeline.pack.merge import ROW_GROUP_BYTES
from pipeline.plan.portions import chunk_of, window_of
from pipeline.shards.columns import IMAGE_SHARD_SCHEMA, image_id, shard_metadata
from pipeline.shards.shards import ShardSet, open_shards
from pipeline.storage.places import resolve_uri
from pipeline.storage.transfer import write_parquet_atomic
from pipeline.stream.reader import reading_of
from pipeline.views.crops import CropSpec

MIB = 2**20
KINDS = {  # part of a process title: what it is called here
    "_Read": "read task",
    "MapWorker": "decoder",
    "Worker": "consumer",
    "Feeder": "feeder",
    "Dealer": "dealer",
    "WindowReader": "window reader",
    "SplitCoordinator": "coordinator",
}


@dataclass
class Memory:
    """The most of everything that was seen, MiB."""

    own: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    store: float = 0.0
    spilled: float = 0.0
    images_per_s: float = 0.0
    sent: float = 0.0  # crops that went through the store


def anonymous(pid: int) -> int:
    """Bytes of a process that are neither files nor shared memory: pages of the object store that
    only one process has touched would count as its own otherwise.
    """
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) * 1024
    return 0


class Watch:
    """Looks at this process's children until it is stopped."""

    def __init__(self, spill: Path) -> None:
        self.found, self.spill = Memory(), spill
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def __enter__(self) -> Memory:
        self.thread.start()
        return self.found

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.thread.join()

    def _run(self) -> None:
        import ray

        while not self.stopped.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                try:
                    title = " ".join(process.cmdline()[:1])
                    name = next((k for part, k in KINDS.items() if part in title), None)
                    if name and title.startswith("ray::"):
                        own = anonymous(process.pid) / MIB
                        self.found.own[name] = max(self.found.own[name], own)
                except (psutil.Error, OSError):
                    continue
            whole = ray.cluster_resources().get("object_store_memory", 0)
            free = ray.available_resources().get("object_store_memory", 0)
            self.found.store = max(self.found.store, (whole - free) / MIB)
            spilled = sum(f.stat().st_size for f in self.spill.rglob("*") if f.is_file())
            self.found.spilled = max(self.found.spilled, spilled / MIB)


def encoded(photos: list[Path], i: int, megapixels: float, quality: int) -> bytes:
    """A photo shrunk to about so many pixels; where it has too few, many photos side by side."""

    def opened(n: int) -> Image.Image:
        with Image.open(photos[n % len(photos)]) as image:
            return image.convert("RGB")

    image = opened(i)
    scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
    width, height = round(image.width * scale), round(image.height * scale)
    if scale <= 1:
        image = image.resize((width, height))
    else:  # enlarged ones would be smooth: few bytes, and not what a camera gives
        image = Image.new("RGB", (width, height))
        tiles = [(x, y) for y in range(0, height, 375) for x in range(0, width, 500)]
        for n, corner in enumerate(tiles):
            image.paste(opened(i + n).resize((500, 375)), corner)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, comment=str(i).encode())
    return stream.getvalue()


def write_shards(
    photos: list[Path], folder: Path, images: int, distinct: int, megapixels: float, quality: int
) -> ShardSet:
    """A shard like pack's. Few large photos are made, and repeated with other bytes at the end."""
    bodies = [encoded(photos, i, megapixels, quality) for i in range(distinct)]
    files = sorted(
        (bodies[i % distinct] + i.to_bytes(4, "big") for i in range(images)), key=image_id
    )
    with Image.open(io.BytesIO(bodies[0])) as image:
        width, height = image.size
    table = pa.table(
        {
            "image_id": [image_id(f) for f in files],
            "image": pa.array(files, pa.binary()),
            # Sizes differ by the photos' shapes; 0 makes the decoder look.
            "width": pa.array([width if distinct == 1 else 0] * images, pa.int32()),
            "height": pa.array([height if distinct == 1 else 0] * images, pa.int32()),
            "format": ["JPEG"] * images,
            "source": [f"{i}" for i in range(images)],
            "label": pa.array([None] * images, pa.int64()),
        },
        schema=IMAGE_SHARD_SCHEMA.with_metadata(shard_metadata(())),
    )
    size = sum(map(len, files)) / images
    rows = max(1, min(256, int(ROW_GROUP_BYTES // size)))
    fs, path = resolve_uri(str(folder / "part-00000.parquet"))
    write_parquet_atomic(table, fs, path, row_group_size=rows)
    print(f"{images} images of {size / 1000:.0f} KB, {rows} in a row group", flush=True)
    return open_shards(path)


def stream(
    shards: ShardSet, folder: Path, store_mb: int, seconds: float, batch: int, pause_s: float = 0
) -> Memory:
    """One worker takes batches for so long, as the plan's window rule has it.

    A chunk is a 64th of the store: decoders are up to four chunks ahead each.
    """
    import ray

    from pipeline.stream.dealer import DecodeTasks
    from pipeline.stream.feeder import launch_feeder
    from pipeline.stream.worker import StreamRequest, batches

    spill = folder / "spill"
    spill.mkdir()
    ray.init(num_cpus=2, object_store_memory=store_mb * MIB, include_dashboard=False,
             logging_level="error", log_to_driver=False, _temp_dir=str(folder / "ray"),
             object_spilling_directory=str(spill))  # fmt: skip
    mean = shards.image_bytes
    window = window_of(1024, batch, mean)
    reading = reading_of(shards, seed=0, global_batch=batch, window=window)
    share = math.gcd(window, max(1, min(batch, store_mb * MIB // (64 * CropSpec().bytes))))
    chunk = chunk_of(share, CropSpec().bytes, mean)
    spec = spec_of(reading, chunk, store_mb * MIB / 2)
    steps = 10**6

    @ray.remote(num_cpus=0)
    class Worker:
        def __init__(self, feeder: Any) -> None:
            torch.set_num_threads(1)
            self.batches = batches(StreamRequest(feeder, "one", 0, 1, 0, steps), batch, chunk)

        def take(self, seconds: float) -> tuple[int, float]:
            seen, begin = 0, time.perf_counter()
            while time.perf_counter() < begin + seconds:
                found = next(self.batches)
                assert not found.bad
                seen += found.images
                time.sleep(pause_s)
            return seen, time.perf_counter() - begin

    try:
        feeder = launch_feeder(reading, spec, steps, DecodeTasks(0.9, 2), 1)
        worker = Worker.remote(feeder)
        with Watch(spill) as found:
            first, _ = ray.get(worker.take.remote(seconds / 3))
            images, took = ray.get(worker.take.remote(seconds * 2 / 3))
        found.images_per_s = images / took
        found.sent = (first + images) * spec.crops.bytes / MIB
        found.own["window"] = window * mean / MIB
        return found
    finally:
        ray.shutdown()
        shutil.rmtree(folder / "ray", ignore_errors=True)
        shutil.rmtree(spill, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", required=True)
    parser.add_argument("--only", default="thumbnails,photos,endless")
    parser.add_argument("--seconds", type=float, default=45, help="of each run, after its start")
    parser.add_argument("--thumbnails", type=int, default=8192)
    parser.add_argument("--large", type=int, default=192)
    parser.add_argument("--megapixels", type=float, default=20)
    parser.add_argument("--store-mb", type=int, default=1024)
    parser.add_argument("--small-store-mb", type=int, default=150)
    options = parser.parse_args()
    quiet_environment()
    photos = sorted(p for p in Path(options.photos).iterdir() if p.is_file())
    folder = Path(tempfile.mkdtemp(prefix="rd", dir="/tmp"))
    try:
        for name in options.only.split(","):
            large = name == "photos"
            place = folder / name
            place.mkdir()
            shards = write_shards(
                photos,
                place,
                # the endless set is several times as large as its store
                images=options.large
                if large
                else options.thumbnails * (1 + 3 * (name == "endless")),
                distinct=4 if large else 512,
                megapixels=options.megapixels if large else 0.05,
                quality=88 if large else 80,
            )
            found = stream(
                shards,
                place,
                options.small_store_mb if name == "endless" else options.store_mb,
                options.seconds,
                batch=32 if name == "endless" else 64,
                pause_s=0.2 if name == "endless" else 0.0,
            )
            shutil.rmtree(place)
            own = ", ".join(f"{kind} {mib:.0f}" for kind, mib in sorted(found.own.items()))
            print(
                f"{name:12} {found.images_per_s:.1f} images/s, {found.sent:.0f} MiB of crops; "
                f"object store {found.store:.0f}, spilled {found.spilled:.0f}; {own} (MiB)",
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
