"""How many test images of CIFAR-10 have a near copy in its training set, by the descriptor.

    python benchmarks/leaks.py [--cifar FOLDER] [--images N] [--gallery leaks.png]

The threshold is calibrated on training images as the curate stage does it by default. For every
test image the 100 training images with the most similar wholes are compared exactly, crops
included. The gallery shows pairs drawn from bands of similarity around the threshold (test left,
training right), and the table how many of a band `same_picture` takes for copies.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from pipeline.curate.images.descriptor import MIRROR, describe, describe_grey, similarity, square
from pipeline.curate.look.second_look import Verdict, form_of, second_look
from pipeline.curate.threshold.calibrate import COMPARED, attacked_copies
from pipeline.curate.threshold.threshold import Sample, measure_threshold
from pipeline.images.decode import decode_image
from pipeline.shards.columns import image_id

CIFAR = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
NEIGHBOURS = 100
STEP = 0.05  # width of a band
SHOWN = 12  # pairs of a band
TILE = 64


def images_of(folder: Path, split: str) -> tuple[Any, list[bytes]]:
    """uint8 [n, 32, 32, 3] and ids."""
    files = sorted(folder.glob(f"{split}-*.parquet"))
    rows = [row["bytes"] for f in files for row in pq.read_table(f).column("image").to_pylist()]
    ids = [bytes.fromhex(image_id(row)) for row in rows]
    return np.stack([decode_image(row) for row in rows]), ids


def described(images: Any) -> tuple[Any, Any]:
    found = []
    for at in range(0, len(images), 2000):
        greys = [square(Image.fromarray(x).convert("L")) for x in images[at : at + 2000]]
        found.append(describe_grey(np.stack(greys)))
    full, crops = (np.concatenate(x) for x in zip(*found, strict=True))
    return full, crops


def calibrated(images: Any, ids: list[bytes], seed: int, count: int, compared: int) -> Any:
    """As the curate stage does it, but for the draw of the sample."""
    drawn = np.random.default_rng(seed).permutation(len(ids))[:compared]
    chosen = sorted(drawn.tolist(), key=lambda i: ids[i])
    attacked = sorted(chosen.index(i) for i in drawn[:count].tolist())
    copies = [attacked_copies(images[chosen[i]], ids[chosen[i]])[1:] for i in attacked]
    found = [[describe(copy) for copy in some] for some in copies]
    full, crops = described(images[chosen])

    def look(a: int, b: int) -> Verdict:
        return second_look(form_of(images[chosen[a]]), form_of(images[chosen[b]]))

    sample = Sample(
        full,
        crops,
        look,
        np.array(attacked),
        np.stack([np.stack([whole for whole, _ in some]) for some in found]),
        np.stack([np.stack([views for _, views in some]) for some in found]),
    )
    return measure_threshold(sample, min(1e-6, 0.01 / len(images)))


def best_matches(test: Any, train: Any, penalty: float) -> tuple[Any, Any]:
    """The most similar training image of each test image, and how similar it is."""
    found, score = np.zeros(len(test[0]), int), np.zeros(len(test[0]))
    wide = train[0].astype(np.float32)
    for at in range(0, len(test[0]), 200):
        part = test[0][at : at + 200].astype(np.float32)
        near = np.maximum(part @ wide.T, (part * MIRROR.astype(np.float32)) @ wide.T)
        which = np.argpartition(-near, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
        i, j = np.repeat(np.arange(at, at + len(part)), NEIGHBOURS), which.ravel()
        exact = similarity(test[0][i], test[1][i], train[0][j], train[1][j], penalty)
        exact = exact.reshape(len(part), NEIGHBOURS)
        best = exact.argmax(1)
        rows = np.arange(len(part))
        found[at : at + 200], score[at : at + 200] = which[rows, best], exact[rows, best]
    return found, score


def gallery(bands: list[tuple[str, Any]], path: Path) -> None:
    """A row for each band: its name, then pairs uint8 [n, 2, 32, 32, 3]."""
    height, width = TILE + 6, 90 + SHOWN * (2 * TILE + 10)
    sheet = Image.new("RGB", (width, height * len(bands)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, pairs) in enumerate(bands):
        draw.text((4, row * height + 24), name, fill="black")
        for n, pair in enumerate(pairs[:SHOWN]):
            both = Image.fromarray(np.concatenate(list(pair), 1)).resize((2 * TILE, TILE))
            sheet.paste(both, (90 + n * (2 * TILE + 10), row * height + 3))
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cifar", type=Path, default=CIFAR)
    parser.add_argument("--images", type=int, default=500, help="that are attacked to calibrate")
    parser.add_argument("--compared", type=int, default=COMPARED, help="with each other")
    parser.add_argument("--samples", type=int, default=1, help="calibrate so many times")
    parser.add_argument("--gallery", type=Path, default=Path("leaks.png"))
    given = parser.parse_args()
    (train, ids), (test, _) = images_of(given.cifar, "train"), images_of(given.cifar, "test")
    samples = [
        calibrated(train, ids, seed, given.images, given.compared) for seed in range(given.samples)
    ]
    for one in samples:
        print(f"threshold {one.threshold:.4f} ({one.low:.3f} to {one.high:.3f}), penalty", end=" ")
        print(f"{one.penalty}, recall {one.recall:.3f}, rate {one.reached:.1e},", end=" ")
        print(f"{one.negatives:,} pairs, {one.copies} of copies left out")
    chosen, limit = samples[0], samples[0].threshold
    found, score = best_matches(described(test), described(train), chosen.penalty)
    above = np.flatnonzero(score > limit)
    copies = [i for i in above if second_look(form_of(test[i]), form_of(train[found[i]])).same]
    print(f"{len(above)} of {len(test):,} test images look like a training image,", end=" ")
    print(f"{len(copies)} are copies by the second look\n")

    rng = np.random.default_rng(0)
    bands = []
    print("| similarity | test images | same picture, of those looked at |\n|---|---|---|")
    edges = [limit + STEP * n for n in range(-3, 5)]
    for low, high in zip(edges, [*edges[1:], 1.01], strict=True):
        inside = rng.permutation(np.flatnonzero((score > low) & (score <= high)))
        looked = inside[:100]
        same = sum(second_look(form_of(test[i]), form_of(train[found[i]])).same for i in looked)
        print(f"| {low:.3f} to {min(high, 1):.3f} | {len(inside)} | {same} of {len(looked)} |")
        pairs = [np.stack([test[i], train[found[i]]]) for i in inside[:SHOWN]]
        bands.append((f"{low:.2f}-{min(high, 1):.2f}" + " *" * (low >= limit), pairs))
    gallery(bands, given.gallery)
    print(f"\ngallery: {given.gallery} (bands with * are above the threshold)")


if __name__ == "__main__":
    main()
