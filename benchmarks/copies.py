"""What finds copies without trained weights: the descriptor against a flip-aware perceptual hash.

    python benchmarks/copies.py [--photos FOLDER] [--images N] [--looked N]

Each photo is attacked in nine ways (pipeline/curate/threshold/attacks.py). The photos are dealt
into two halves. On one the thresholds (and the descriptor's penalty of crop views) are chosen, so
that 1e-6 of the pairs of different photos pass, copies with copies included (12.5 million pairs of
500 photos); on the other half it is counted what share of the copies is found. Then the halves
change places, and the table gives means. CPU time is that of one core, decoding left out.

The second row is what the curate stage does: the second look decides of the copies that the
descriptor finds. It is asked about those of `--looked` photos, drawn evenly, and what it passes of
each attack is taken for all. Pairs of different photos above the threshold are looked at too.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.fft import dctn

from pipeline.curate.images.descriptor import MIRROR, describe_grey, square, visiting
from pipeline.curate.look.forms import kept_form, opened_form
from pipeline.curate.look.second_look import Verdict, form_of, second_look
from pipeline.curate.threshold.attacks import ATTACKS, attacked_copies
from pipeline.curate.threshold.threshold import PENALTIES, Sample, measure_threshold
from pipeline.images.decode import decode_image
from pipeline.shards.columns import image_id

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "imagenet-samples"
RATE = 1e-6
COPIES = 1 + len(ATTACKS)
BITS = np.array([bin(i).count("1") for i in range(256)], np.uint8)


def phash(grey: Image.Image) -> tuple[Any, Any]:
    """64 bits as imagehash.phash makes them, and those of the mirrored image."""
    small = np.asarray(grey.resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    found = []
    for pixels in (small, small[:, ::-1]):
        low = dctn(pixels, type=2)[:8, :8]
        found.append(np.packbits((low > np.median(low)).ravel()))
    return found[0], found[1]


def prepared(files: list[Path]) -> tuple[Any, Any, Any, Any, dict[str, float]]:
    """Descriptors of all photos and copies [m, copies, …], of their crops, forms of the photos and
    copies, hashes [m, copies, 2, 8], and CPU ms a photo.
    """
    squares = np.zeros((len(files), COPIES, 128, 128))
    hashes = np.zeros((len(files), COPIES, 2, 8), np.uint8)
    forms: list[list[bytes]] = []
    spent = {"descriptor": 0.0, "pHash, flip-aware": 0.0}
    for i, file in enumerate(files):
        encoded = file.read_bytes()
        copies = attacked_copies(decode_image(encoded), bytes.fromhex(image_id(encoded)))
        forms.append([kept_form(form_of(copy)) for copy in copies])
        for j, copy in enumerate(copies):
            begin = time.process_time()
            squares[i, j] = square(Image.fromarray(copy).convert("L"))
            middle = time.process_time()
            hashes[i, j] = phash(Image.fromarray(copy).convert("L"))
            spent["descriptor"] += middle - begin
            spent["pHash, flip-aware"] += time.process_time() - middle
    begin = time.process_time()
    full, crops = describe_grey(squares.reshape(-1, 128, 128))
    spent["descriptor"] += time.process_time() - begin
    shape = (len(files), COPIES)
    each = {k: 1000 * v / (len(files) * COPIES) for k, v in spent.items()}
    full, crops = full.reshape(*shape, -1), crops.reshape(*shape, 9, -1)
    return full, crops, forms, hashes, each


def similarities(full: Any, crops: Any) -> tuple[Any, Any]:
    """[n, n] of the wholes (also mirrored), and of wholes with crops, n = photos x copies."""
    full = full.reshape(-1, full.shape[-1])
    crops = crops.reshape(len(full), 9, -1)
    wide = full.astype(np.float32)
    plain = np.maximum(wide @ wide.T, (wide * MIRROR.astype(np.float32)) @ wide.T)
    crop = np.full_like(plain, -1)
    for at in range(0, len(full), 500):
        visitors, is_crop = visiting(full[at : at + 500], crops[at : at + 500])
        for view in np.flatnonzero(is_crop):
            part = crop[:, at : at + 500]
            np.maximum(part, wide @ visitors[:, view].astype(np.float32).T, out=part)
    return plain, np.maximum(crop, crop.T)


def hash_similarity(hashes: Any) -> Any:
    """[n, n], 1 less the smallest distance / 64."""
    flat = hashes.reshape(-1, 2, 8)
    out = np.empty((len(flat), len(flat)), np.float32)
    for i, (one, mirrored) in enumerate(flat):
        near = [BITS[flat[:, 0] ^ code].sum(1, dtype=np.int32) for code in (one, mirrored)]
        out[i] = 1 - np.minimum(*near) / 64
    return np.maximum(out, out.T)


def split(similarity: Any) -> tuple[Any, Any]:
    """Similarities of pairs of different photos, and [photos, attacks] of photos and copies."""
    n = len(similarity)
    i, j = np.triu_indices(n, 1)
    negative = similarity[i, j][i // COPIES != j // COPIES]
    originals = np.arange(0, n, COPIES)
    own = originals[:, None] + np.arange(1, COPIES)
    return negative, similarity[originals[:, None], own]


def threshold(negative: Any) -> float:
    """Above it is at most the rate of the pairs."""
    allowed = int(RATE * len(negative))
    return float(np.partition(negative, len(negative) - allowed - 1)[len(negative) - allowed - 1])


def looked_at(forms: list[list[bytes]], own: Any, step: int) -> tuple[Any, float]:
    """Shares of the found copies [photos, attacks] that pass the second look, by attack, and CPU ms
    of a look, of every `step`th photo.
    """
    passed: list[list[bool]] = [[] for _ in ATTACKS]
    begin = time.process_time()
    for photo in range(0, len(forms), step):
        original = opened_form(forms[photo][0])
        for number in np.flatnonzero(own[photo]):
            copy = opened_form(forms[photo][1 + number])
            passed[number].append(second_look(original, copy).same)
    spent = time.process_time() - begin
    shares = np.array([np.mean(some) if some else 1.0 for some in passed])
    return shares, 1000 * spent / max(1, sum(map(len, passed)))


def halves_of(found: Any) -> tuple[Any, Any]:
    return found[0::2], found[1::2]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--looked", type=int, default=200, help="photos of the second look")
    given = parser.parse_args()
    files = sorted([*given.photos.glob("*.JPEG"), *given.photos.glob("*.jpg")])[: given.images]
    full, crops, forms, hashes, spent = prepared(files)
    compared = [similarities(full[half::2], crops[half::2]) for half in (0, 1)]
    hashed = [hash_similarity(half) for half in halves_of(hashes)]

    rows: dict[str, list[Any]] = {}
    hits = np.zeros((len(files), len(ATTACKS)), bool)
    chosen: dict[str, list[str]] = {}
    for choose, score in ((0, 1), (1, 0)):
        plain, crop = compared[choose]
        best = (-1.0, 0.0, 0.0)
        for penalty in PENALTIES:
            negative, own = split(np.maximum(plain, crop - penalty))
            limit = threshold(negative)
            best = max(best, (float((own > limit).mean()), limit, penalty))
        _, limit, penalty = best
        there = {
            "descriptor": (limit, np.maximum(compared[score][0], compared[score][1] - penalty))
        }
        there["descriptor, no crop views"] = (threshold(split(plain)[0]), compared[score][0])
        there["pHash, flip-aware"] = (threshold(split(hashed[choose])[0]), hashed[score])
        for name, (limit, similarity) in there.items():
            negative, own = split(similarity)
            rows.setdefault(name, []).append(
                [(own > limit).mean(), *(own > limit).mean(0), (negative > limit).mean()]
            )
            chosen.setdefault(name, []).append(f"{limit:.3f}")
            if name == "descriptor":
                hits[score::2] = own > limit
    shares, ms = looked_at(forms, hits, max(1, len(files) // given.looked))
    after = np.array(rows["descriptor"])
    after[:, 1:-1] *= shares
    after[:, 0] = after[:, 1:-1].mean(1)
    rows = {"descriptor": rows["descriptor"], "and the second look": list(after), **rows}
    chosen["and the second look"], spent["and the second look"] = chosen["descriptor"], ms
    print(f"{len(files)} photos of {given.photos.name}, chosen at a rate of {RATE:g} of", end=" ")
    print(f"{len(split(compared[0][0])[0]):,} pairs; penalty {penalty}\n")
    heads = ["recall", *ATTACKS, "rate reached", "thresholds", "ms"]
    print("| method | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for name, found in rows.items():
        mean = np.mean(found, 0)
        cells = [f"{mean[0]:.4f}", *(f"{x:.3f}" for x in mean[1:-1]), f"{mean[-1]:.1e}"]
        cells += [" / ".join(chosen[name]), f"{spent.get(name, spent['descriptor']):.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    ours, theirs = (np.mean(rows[n], 0)[0] for n in ("descriptor", "pHash, flip-aware"))
    print(f"\ndescriptor over flip-aware pHash: {ours / theirs:.3f} times the pairs")
    every = np.arange(len(files))

    def look(a: int, b: int) -> Verdict:
        return second_look(opened_form(forms[a][0]), opened_form(forms[b][0]))

    sample = Sample(full[:, 0], crops[:, 0], look, every, full[:, 1:], crops[:, 1:])
    own = measure_threshold(sample, RATE)
    print(f"calibration of the same photos: threshold {own.threshold:.4f}", end=" ")
    print(f"({own.low:.3f} to {own.high:.3f}), penalty {own.penalty}, recall {own.recall:.4f},")
    print(f"{own.copies} of {own.negatives:,} pairs are copies and were left out")


if __name__ == "__main__":
    main()
