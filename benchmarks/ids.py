"""What comparing stored ids with the bytes costs where an image is decoded and cut for training.

python benchmarks/ids.py shared/data/imagenet-samples
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.images.bad_image import check_id
from pipeline.shards.columns import image_id
from pipeline.shards.shards import ShardColumns
from pipeline.stream.decoder import StreamSpec, make_chunk
from pipeline.stream.reader import EncodedImages
from pipeline.views.crops import CropSpec
from pipeline.views.masks import MaskSpec
from pipeline.views.photometric import PhotometricSpec

IMAGES, REPEATS = 24, 3


def portion(folder: Path) -> EncodedImages:
    """The first images of a folder, as a read task deals them out."""
    files = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    encoded = [file.read_bytes() for file in files[:IMAGES]]
    ids = [list(bytes.fromhex(image_id(item))) for item in encoded]
    return EncodedImages(
        pass_index=0,
        positions=np.arange(len(encoded)),
        image_ids=np.array(ids, np.uint8),
        labels=np.full(len(encoded), -1),
        sizes=np.zeros((len(encoded), 2), np.int64),
        offsets=np.cumsum([0, *map(len, encoded)]),
        encoded=b"".join(encoded),
        read_s=0.0,
        retries=0,
        named=True,
    )


def main() -> None:
    """Prints the CPU time of an image with and without, and of the comparison alone."""
    named = portion(Path(sys.argv[1]))
    count = len(named)
    spec = StreamSpec(
        columns=ShardColumns("", "image", "label"),
        seed=0,
        global_batch=count,
        steps_per_pass=1,
        crops=CropSpec(),
        photometric=PhotometricSpec(),
        masks=MaskSpec((16, 16), 0.5, (0.1, 0.5)),
        chunk=count,
        max_pixels=200_000_000,
    )
    times: dict[str, list[float]] = {"ids compared": [], "not compared": [], "comparison alone": []}
    for _ in range(REPEATS):
        for name, one in (("ids compared", named), ("not compared", replace(named, named=False))):
            begin = time.process_time()
            assert make_chunk(one, 0, count, spec)["valid"].all()
            times[name].append((time.process_time() - begin) / count)
        begin = time.process_time()
        for i in range(count):
            check_id(named.image(i), named.image_ids[i].tobytes())
        times["comparison alone"].append((time.process_time() - begin) / count)
    size = len(named.encoded) / count
    lines = [f"{name}: {1000 * min(found):.3f} ms an image" for name, found in times.items()]
    share = min(times["comparison alone"]) / min(times["not compared"])
    sys.stdout.write("\n".join([f"{count} images of {size / 1000:.0f} kB", *lines]))
    sys.stdout.write(f"\nshare of the comparison: {share:.1%}\n")


if __name__ == "__main__":
    main()
