"""What embedding costs beyond the model: reading, decoding, handing over, writing.

    python benchmarks/embed.py photos/ [images] [side] [rounds]

A ViT-S/14 with random weights on the same photos, in turn: actors that loop over prepared images in
memory with the bare network, and `embed_set` from shards to parts. As many actors in both, each
with one thread of torch. Seconds of an actor, so that starting processes is in neither.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.driver.cluster import quiet_environment
from pipeline.embed import units
from pipeline.embed.embedders import Embedder, embedder_of
from pipeline.embed.run import Request, embed_set
from pipeline.evaluate.features import normalise
from pipeline.images.decode import decode_image
from pipeline.model.pair import BackboneSpec
from pipeline.model.weights import save_backbone
from pipeline.shards.shards import open_shards

BATCH, UNIT = 32, 32  # images; small units, so that few images make many


@ray.remote(num_cpus=1)
class Bare:
    """The network alone, on prepared images."""

    def __init__(self, spec, files: list[bytes]) -> None:
        self.embedder = Embedder(spec)
        self.images = np.stack([self.embedder.prepare(decode_image(file)) for file in files])

    def seconds(self) -> float:
        network, mean, std = self.embedder.network, self.embedder.mean, self.embedder.std
        begin = time.perf_counter()
        with torch.no_grad():
            for at in range(0, len(self.images), BATCH):
                network(normalise(self.images[at : at + BATCH], mean, std))
        return time.perf_counter() - begin


def main() -> None:
    source, numbers = Path(sys.argv[1]), [int(x) for x in sys.argv[2:]]
    images, side, rounds = [*numbers, *(512, 224, 5)[len(numbers) :]]
    files = [path.read_bytes() for path in sorted(source.rglob("*.[jJ]*"))[:images]]
    quiet_environment()
    ray.init(include_dashboard=False, logging_level="error", log_to_driver=False)
    actors = int(ray.cluster_resources()["CPU"])
    units.UNIT_IMAGES = UNIT
    with tempfile.TemporaryDirectory() as folder:
        spec = BackboneSpec(image_size=side, patch_size=14, width=384, depth=12, heads=6)
        weights = save_backbone(spec.build().eval(), spec, Path(folder) / "weights")
        model = embedder_of(str(weights), batch_size=BATCH)
        pq.write_table(pa.table({"image": files}), f"{folder}/a.parquet", row_group_size=UNIT)
        request = Request(model, open_shards(f"{folder}/a.parquet"))
        bare = [Bare.options(num_cpus=0).remote(model, files[n::actors]) for n in range(actors)]
        bare_s, embed_s, ratios, waits = [], [], [], []
        for number in range(rounds):
            bare_s.append(sum(ray.get([one.seconds.remote() for one in bare])) / len(files))
            pace = embed_set(request, f"{folder}/vectors-{number}").pace
            embed_s.append((pace.embed_s + pace.wait_s) / pace.images)
            ratios.append(embed_s[-1] / bare_s[-1])
            waits.append(pace.waiting)
            print(f"round {number}: {ratios[-1]:.3f}, waited {100 * waits[-1]:.1f} %", flush=True)
    print(
        f"torch {torch.__version__}, ray {ray.__version__}, {actors} actors, {len(files)} photos "
        f"of {sum(map(len, files)) / len(files) / 1e3:.0f} kB at {side} x {side}: bare "
        f"{1e3 * statistics.median(bare_s):.1f} ms an image, embedded "
        f"{1e3 * statistics.median(embed_s):.1f} ms; ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}), waited {100 * statistics.median(waits):.1f} %"
    )
    ray.shutdown()


if __name__ == "__main__":
    main()
