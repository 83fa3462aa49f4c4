"""The data path against the reference's: CPU seconds and images/s for ten crops of a photo.

    python benchmarks/loader.py --photos photos/

Four roads over the same photos, two processes each, measured in turn in every round:

    reference   torch DataLoader, torchvision's PIL transforms in DINOv2's order
    bare        our functions in a loop, no Ray: read, decode, boxes, uint8 crops, masks
    stream      our path: Ray Data, two decode tasks, one consuming worker
    + colour    the same, and the consuming worker applies colour on its CPU

CPU seconds are those of every process that the road uses (Ray's own ones too), after the first
images. `--profile` prints where the time of the stream goes, process by process.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("RAY_worker_niceness", "0")  # like the roads without Ray; its default is 15

import psutil
import torch
from PIL import Image
from torchvision import transforms

from pipeline.driver.cluster import quiet_environment
from pipeline.shards.shards import open_shards
from pipeline.stream.decoder import StreamSpec, make_chunks
from pipeline.stream.reader import Reading, read_portions, reading_of
from pipeline.views.crops import CropSpec
from pipeline.views.masks import MaskSpec
from pipeline.views.photometric import PhotometricSpec

BATCH, PROCESSES = 128, 2
GRID = (16, 16)


@dataclass
class Figures:
    """Of the steady part of one run."""

    cpu_s: float  # per 1,000 images
    images_per_s: float
    first_batch_s: float = float("nan")


class Meter:
    """CPU seconds of this process and all below it, and the clock, between two points."""

    def __init__(self, ray: bool = True) -> None:
        self.ray = ray
        self.begin = time.perf_counter()
        self.first = float("nan")
        self.marks: list[tuple[int, float, dict[int, tuple[str, float]]]] = []

    def mark(self, images: int) -> None:
        self.marks.append((images, time.perf_counter(), cpu_seconds(self.ray)))

    def figures(self) -> Figures:
        (n0, t0, c0), (n1, t1, c1) = self.marks[0], self.marks[-1]
        images = n1 - n0
        spent = sum(seconds - c0.get(pid, ("", 0.0))[1] for pid, (_, seconds) in c1.items())
        return Figures(1000 * spent / images, images / (t1 - t0), self.first)

    def by_process(self) -> dict[str, float]:
        (n0, _, c0), (n1, _, c1) = self.marks[0], self.marks[-1]
        found: dict[str, float] = defaultdict(float)
        for pid, (name, seconds) in c1.items():
            found[name] += 1000 * (seconds - c0.get(pid, ("", 0.0))[1]) / (n1 - n0)
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def cpu_seconds(ray: bool) -> dict[int, tuple[str, float]]:
    me = psutil.Process()
    found = {}
    for process in [me, *me.children(recursive=True)]:
        try:
            times, words = process.cpu_times(), process.cmdline()
        except psutil.Error:
            continue
        if not ray and any(word.startswith("ray::") or "/ray/" in word for word in words[:3]):
            continue  # Ray idles beside the roads that do not use it
        name = " ".join(words[:1])[-40:] if words else "?"
        found[process.pid] = name, times.user + times.system
    return found


def watch(batches: Iterator[Any], size: Any, warm_up: int, images: int, meter: Meter) -> Figures:
    """Take `images` after `warm_up` ones; the roads must be able to give a few more."""
    seen = 0
    for batch in batches:
        if not seen:
            meter.first = time.perf_counter() - meter.begin
        seen += size(batch)
        if not meter.marks and seen >= warm_up:
            meter.mark(seen)
        elif meter.marks and seen >= meter.marks[0][0] + images:
            meter.mark(seen)
            break
    return meter.figures()


class ReferenceViews:
    """DINOv2's DataAugmentationDINO, for PIL images: 2 global crops of 224, 8 local ones of 98.

    Blur as the released code really does it (0, 0.9, 0.5), like `PhotometricSpec`'s default.
    """

    def __init__(self) -> None:
        def geometry(size: int, scale: tuple[float, float]) -> Any:
            bicubic = transforms.InterpolationMode.BICUBIC
            crop = transforms.RandomResizedCrop(size, scale=scale, interpolation=bicubic)
            return transforms.Compose([crop, transforms.RandomHorizontalFlip(0.5)])

        def blur(p: float) -> Any:
            return transforms.RandomApply([transforms.GaussianBlur(9, (0.1, 2.0))], p)

        jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
        colour = transforms.Compose([jitter, transforms.RandomGrayscale(0.2)])
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        end = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
        solarize = transforms.RandomSolarize(128, 0.2)
        self.global_crop, self.local_crop = geometry(224, (0.32, 1)), geometry(98, (0.05, 0.32))
        self.first = transforms.Compose([colour, end])
        self.second = transforms.Compose([colour, blur(0.9), solarize, end])
        self.local = transforms.Compose([colour, blur(0.5), end])

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        views = [self.first(self.global_crop(image)), self.second(self.global_crop(image))]
        return views + [self.local(self.local_crop(image)) for _ in range(8)]


class Photos(torch.utils.data.Dataset[Any]):
    """Encoded photos in memory, over and over."""

    def __init__(self, encoded: list[bytes], length: int) -> None:
        self.encoded, self.length, self.views = encoded, length, ReferenceViews()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        torch.set_num_threads(1)
        with Image.open(io.BytesIO(self.encoded[i % len(self.encoded)])) as image:
            return self.views(image.convert("RGB"))


def reference(encoded: list[bytes], warm_up: int, images: int) -> Figures:
    meter = Meter(ray=False)
    data = Photos(encoded, warm_up + images + 8 * BATCH)
    loader = torch.utils.data.DataLoader(data, BATCH, num_workers=PROCESSES, drop_last=True)
    return watch(iter(loader), lambda batch: len(batch[0]), warm_up, images, meter)


def bare(reading: Reading, spec: StreamSpec, warm_up: int, images: int) -> Figures:
    """The functions of the read and decode tasks, one after the other, in each process."""
    context = multiprocessing.get_context("fork")
    done = context.Value("q", 0)
    meter = Meter(ray=False)

    def work(share: int) -> None:
        torch.set_num_threads(1)
        mine = reading.tasks(0, 1 << 12)[share::PROCESSES]
        for portion in read_portions(mine, spec.columns, spec.seed, spec.portion_images):
            for chunk in make_chunks(portion, spec):
                with done:
                    done.value += len(chunk["labels"])

    processes = [context.Process(target=work, args=(i,), daemon=True) for i in range(PROCESSES)]
    for process in processes:
        process.start()

    def progress() -> Iterator[int]:
        seen = 0
        while True:
            time.sleep(0.01)
            if (now := done.value) > seen:
                yield now - seen
                seen = now

    found = watch(progress(), int, warm_up, images, meter)
    for process in processes:
        process.kill()
        process.join()
    return found


def stream(
    reading: Reading, spec: StreamSpec, warm_up: int, images: int, colour: bool, profile: bool
) -> Figures:
    import ray

    from pipeline.stream.dealer import DecodeTasks
    from pipeline.stream.feeder import launch_feeder
    from pipeline.stream.worker import StreamRequest, batches

    steps = (warm_up + images) // BATCH + 40

    @ray.remote(num_cpus=0)
    class Worker:
        def __init__(self, feeder: Any) -> None:
            torch.set_num_threads(1)
            self.batches = batches(StreamRequest(feeder, "one", 0, 1, 0, steps), BATCH, spec.chunk)

        def take(self, images: int) -> int:
            """Receives at least so many images."""
            seen = 0
            while seen < images:
                batch = next(self.batches)
                if colour:
                    batch.views(spec.photometric)
                seen += batch.images
            return seen

    meter = Meter()
    feeder = launch_feeder(reading, spec, steps, DecodeTasks(0.95, PROCESSES), 1)
    worker = Worker.remote(feeder)
    seen = ray.get(worker.take.remote(1))
    meter.first = time.perf_counter() - meter.begin
    seen += ray.get(worker.take.remote(warm_up - seen))
    meter.mark(seen)
    seen += ray.get(worker.take.remote(images))
    meter.mark(seen)
    ray.kill(worker)
    ray.kill(feeder)
    if profile:
        for name, seconds in meter.by_process().items():
            print(f"    {seconds:7.2f} s per 1,000 images  {name}")
    return meter.figures()


@contextmanager
def cluster(folder: Path, store_gb: float, **options: Any) -> Iterator[None]:
    """A Ray of its own for each run: what a killed one held would slow the next one down."""
    import ray

    ray.init(
        num_cpus=PROCESSES,
        object_store_memory=int(store_gb * 2**30),
        include_dashboard=False,
        logging_level="error",
        log_to_driver=False,
        _temp_dir=str(folder / "ray"),
        **options,
    )
    try:
        yield
    finally:
        ray.shutdown()


def spec_of(reading: Reading, chunk: int, store_bytes: float = 2**30) -> StreamSpec:
    """The usual ten crops with the masks of patches of 14."""
    return StreamSpec(
        columns=reading.shards.columns,
        seed=0,
        global_batch=reading.order.global_batch,
        steps_per_pass=reading.order.steps_per_pass,
        crops=CropSpec(),
        photometric=PhotometricSpec(),
        masks=MaskSpec(GRID, 0.5, (0.1, 0.5)),
        chunk=chunk,
        max_pixels=10**9,
        image_bytes=reading.shards.image_bytes,
        store_bytes=store_bytes,
    )


def packed(photos: str, folder: Path) -> Any:
    from pipeline.pack.pack import PackPlaces, pack

    pack(
        photos,
        str(folder / "shards"),
        PackPlaces(bad_images=str(folder / "bad.parquet"), scratch=str(folder / "work")),
    )
    return open_shards(str(folder / "shards"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2000, help="measured, per road and round")
    # A decoder meets each page of the object store that it writes to for the first time once, some
    # 4,000 images long; each costs microseconds.
    parser.add_argument("--warm-up", type=int, default=4000, help="images before that")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--store-gb", type=float, default=2.0)
    parser.add_argument("--only", default="reference,bare,stream,colour")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_environment()
    folder = Path(tempfile.mkdtemp(prefix="rd", dir="/tmp"))
    try:
        with cluster(folder, options.store_gb):
            shards = packed(str(Path(options.photos).absolute()), folder)
        encoded = [
            shards.parquet(0).read_row_group(g, columns=["image"])["image"].to_pylist()
            for g in range(len(shards.files[0].row_groups))
        ]
        photos = [image for group in encoded for image in group]
        reading = reading_of(shards, seed=0, global_batch=BATCH, window=options.window)
        spec = spec_of(reading, options.chunk)
        size = options.warm_up, options.images

        def with_ray(colour: bool) -> Figures:
            with cluster(folder, options.store_gb):
                return stream(reading, spec, *size, colour, options.profile)

        roads = {
            "reference": lambda: reference(photos, min(size[0], 256), size[1] // 4),
            "bare": lambda: bare(reading, spec, min(size[0], 256), size[1]),
            "stream": lambda: with_ray(False),
            "colour": lambda: with_ray(True),
        }
        found: dict[str, list[Figures]] = defaultdict(list)
        for _ in range(options.rounds):
            for name in options.only.split(","):
                found[name].append(roads[name]())
                one = found[name][-1]
                print(f"{name:10} {one.cpu_s:7.2f} CPU s per 1,000 images, "
                      f"{one.images_per_s:7.1f} images/s, first batch {one.first_batch_s:.1f} s",
                      flush=True)  # fmt: skip
        report(found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def report(found: dict[str, list[Figures]]) -> None:
    def line(what: str, values: list[float]) -> None:
        middle = statistics.median(values)
        print(f"{what:46} {middle:8.2f}  ({min(values):.2f} to {max(values):.2f})")

    print(f"\n{len(next(iter(found.values())))} rounds: median (smallest to largest)")
    for name, figures in found.items():
        line(f"{name}: CPU s per 1,000 images", [f.cpu_s for f in figures])
        line(f"{name}: images/s", [f.images_per_s for f in figures])
        line(f"{name}: s to the first batch", [f.first_batch_s for f in figures])
    for over, under in (
        ("reference", "stream"),
        ("reference", "colour"),
        ("bare", "stream"),
    ):
        if over in found and under in found:
            pairs = zip(found[over], found[under], strict=True)
            line(f"CPU s of {over} over {under}", [a.cpu_s / b.cpu_s for a, b in pairs])
    if "bare" in found and "stream" in found:
        pairs = zip(found["stream"], found["bare"], strict=True)
        line("images/s of stream over bare", [a.images_per_s / b.images_per_s for a, b in pairs])


if __name__ == "__main__":
    main()
