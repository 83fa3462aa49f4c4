"""What embedding costs beyond the model: reading, decoding, handing over, writing.

    python benchmarks/embed.py photos/ [images] [side] [rounds]
    python benchmarks/embed.py photos/ [images] [side] [rounds] --pool

A ViT-S/14 with random weights on the same photos, in turn: the bare network in a loop over prepared
images, and all that embedding does, from shards to parts. Without `--pool` both in this process, on
one thread, in seconds of CPU, so that other programs do not count. With it in as many actors of
Ray as there are CPUs, in seconds of the wall from an actor's first batch on; that asks for a
machine on which nothing else runs.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.driver.cluster import quiet_environment
from pipeline.embed import pool, run, units
from pipeline.embed.embedders import Embedder, EmbedderSpec, embedder_of
from pipeline.embed.run import Request
from pipeline.embed.units import Decoding, reads_of, units_of
from pipeline.evaluate.features import normalise
from pipeline.images.decode import decode_image
from pipeline.model.pair import BackboneSpec
from pipeline.model.weights import save_backbone
from pipeline.shards.shards import open_shards

BATCH, UNIT = 32, 32  # images; small units, so that few images make many


class Bare:
    """The network alone, on prepared images."""

    def __init__(self, spec: EmbedderSpec, files: list[bytes]) -> None:
        self.embedder = Embedder(spec)
        self.images = np.stack([self.embedder.prepare(decode_image(file)) for file in files])

    def seconds(self, clock: Callable[[], float] = time.perf_counter) -> float:
        network, mean, std = self.embedder.network, self.embedder.mean, self.embedder.std
        begin = clock()
        with torch.no_grad():
            for at in range(0, len(self.images), BATCH):
                network(normalise(self.images[at : at + BATCH], mean, std))
        return clock() - begin


def here(request: Request, files: list[bytes], folder: str) -> Callable[[int], tuple[float, float]]:
    """Seconds of CPU an image, bare and embedded, in this process."""
    bare = Bare(request.spec, files)
    facts: dict[str, Any] = run._model_facts(request.spec, request.outputs, request.blocks)
    facts |= {**run._set_facts(request), "version": run.VERSION, "key": request.key}
    decoding = Decoding(request.shards.columns, "backbone", bare.embedder.size, 3, 10**9)
    reads = reads_of(units_of(request.shards, bare.images[0].nbytes))

    def seconds(number: int) -> tuple[float, float]:
        alone = bare.seconds(time.process_time)
        begin = time.process_time()
        place = f"{folder}/{number}"
        pool._embed_all(reads, pool.Assignment(request.spec, decoding, facts, place, gpu=False))
        return alone / len(files), (time.process_time() - begin) / len(files)

    return seconds


def by_pool(
    request: Request, files: list[bytes], folder: str
) -> Callable[[int], tuple[float, float]]:
    """Seconds an image and actor, bare and embedded, by as many actors as there are CPUs."""
    import ray

    quiet_environment()
    ray.init(include_dashboard=False, logging_level="error", log_to_driver=False)
    actors = int(ray.cluster_resources()["CPU"])
    remote = ray.remote(Bare).options(num_cpus=0)
    bare = [remote.remote(request.spec, files[n::actors]) for n in range(actors)]

    def seconds(number: int) -> tuple[float, float]:
        alone = sum(ray.get([one.seconds.remote() for one in bare]))
        pace = run.embed_set(request, f"{folder}/{number}").pace
        return alone / len(files), (pace.embed_s + pace.wait_s) / pace.images

    return seconds


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--pool"]
    source, numbers = Path(words[0]), [int(x) for x in words[1:]]
    images, side, rounds = [*numbers, *(128, 224, 5)[len(numbers) :]]
    files = [path.read_bytes() for path in sorted(source.rglob("*.[jJ]*"))[:images]]
    torch.set_num_threads(1)
    units.UNIT_IMAGES = UNIT
    with tempfile.TemporaryDirectory() as folder:
        spec = BackboneSpec(image_size=side, patch_size=14, width=384, depth=12, heads=6)
        weights = save_backbone(spec.build().eval(), spec, Path(folder) / "weights")
        pq.write_table(pa.table({"image": files}), f"{folder}/a.parquet", row_group_size=UNIT)
        model = embedder_of(str(weights), batch_size=BATCH)
        request = Request(model, open_shards(f"{folder}/a.parquet"))
        seconds = (by_pool if "--pool" in sys.argv else here)(request, files, folder)
        pairs = []
        for number in range(rounds):
            pairs.append(seconds(number))
            print(f"round {number}: {pairs[-1][1] / pairs[-1][0]:.3f}", flush=True)
    bare, embedded = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(e / b for b, e in pairs)
    size = sum(map(len, files)) / len(files) / 1e3
    print(
        f"torch {torch.__version__}, {len(files)} photos of {size:.0f} kB at {side} x {side}: bare "
        f"{bare:.1f} ms an image, embedded {embedded:.1f} ms; ratio "
        f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


if __name__ == "__main__":
    main()
