"""Does curation pay? k-NN after the same steps on a polluted set, as it is and curated.

    python benchmarks/curation_pays.py --cifar cifar10/

The pile is CIFAR-10's training split and as many rows again that a crawl would bring: near copies
of a few images (40,000 of 2,000 images, each recompressed, resized, blurred, brightened, cropped or
mirrored) and 10,000 flat pictures (plain colours, gradients, place holders with a word). Both runs
take the same steps with the same recipe; the clean training split votes in both. A worse crawl:

    python benchmarks/curation_pays.py --cifar cifar10/ --images 10000 --copies 80000 --sources 200
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

ROOT = Path(__file__).resolve().parents[1]


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def near_copy(image: Image.Image, rng: np.random.Generator) -> bytes:
    """One of six small changes, and always another JPEG quality."""
    side = image.width
    kind = int(rng.integers(6))
    if kind == 0:
        image = image.resize((side * 2, side * 2), Image.Resampling.BICUBIC)
    elif kind == 1:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.7))))
    elif kind == 2:
        image = ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.75, 1.3)))
    elif kind == 3:
        image = ImageEnhance.Contrast(image).enhance(float(rng.uniform(0.75, 1.3)))
    elif kind == 4:
        image = ImageOps.mirror(image)
    else:
        left, top = (int(v) for v in rng.integers(0, 3, 2))
        image = image.crop((left, top, left + side - 2, top + side - 2))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=int(rng.integers(70, 96)))
    return data.getvalue()


def flat(side: int, rng: np.random.Generator) -> bytes:
    """A plain colour, a gradient, or a place holder."""
    first, last = rng.integers(0, 256, (2, 3))
    kind = int(rng.integers(3))
    if kind == 1:
        ramp = np.linspace(first, last, side)[None].repeat(side, 0)
        ramp = ramp if rng.random() < 0.5 else ramp.transpose(1, 0, 2)
        return png(Image.fromarray(ramp.astype(np.uint8)))
    image = Image.new("RGB", (side, side), tuple(int(v) for v in first))
    if kind == 2:
        ink = tuple(int(v) for v in last)
        ImageDraw.Draw(image).text((side // 4, side // 3), "n/a", fill=ink)
    return png(image)


def pile(cifar: Path, folder: Path, images: int, copies: int, sources: int, junk: int) -> None:
    """Writes images of the training split and the rows beside them as hub-style parquet."""
    rng = np.random.default_rng(0)
    tables = [pq.read_table(path) for path in sorted(cifar.glob("train*.parquet"))]
    column = "img" if "img" in tables[0].column_names else "image"
    encoded = [row["bytes"] for table in tables for row in table.column(column).to_pylist()]
    if images < len(encoded):
        encoded = [encoded[i] for i in rng.choice(len(encoded), images, replace=False)]
    pictures = [
        Image.open(io.BytesIO(encoded[i])).convert("RGB")
        for i in rng.choice(len(encoded), sources, replace=False)
    ]
    rows = list(encoded)
    rows += [near_copy(pictures[int(rng.integers(sources))], rng) for _ in range(copies)]
    rows += [flat(pictures[0].width, rng) for _ in range(junk)]
    folder.mkdir(parents=True)
    order, parts = rng.permutation(len(rows)), 8
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for part in range(parts):
        values = [{"bytes": rows[i], "path": None} for i in order[part::parts]]
        table = pa.table({"image": pa.array(values, kind)})
        pq.write_table(table, folder / f"pile-{part:05d}.parquet", row_group_size=1000)


def run(name: str, source: Path, cifar: Path, runs: Path, more: list[str]) -> dict[str, object]:
    """The chain in a process of its own; the figures of its stages."""
    command = [
        *(sys.executable, str(ROOT / "jobs/run.py"), str(ROOT / "configs/cifar10.yaml")),
        *(f"data.source={source}", f"evaluate.reference={cifar}/train*"),
        *(f"evaluate.queries={cifar}/test*", f"run.folder={runs}", f"run.name={name}"),
        *more,
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    done = {
        stage: json.loads((runs / name / stage / "_done.json").read_text())["result"]
        for stage in ("pack", "curate", "pretrain", "evaluate")
        if (runs / name / stage / "_done.json").is_file()
    }
    return {stage: result.get("text", "") for stage, result in done.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cifar", required=True, help="folder of the hub's parquet files")
    parser.add_argument("--images", type=int, default=50_000, help="of the training split")
    parser.add_argument("--copies", type=int, default=40_000)
    parser.add_argument("--sources", type=int, default=2_000, help="images that are copied")
    parser.add_argument("--junk", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--folder", help="for the pile and the runs; default: a temporary one")
    parser.add_argument("--only", default="raw,curated")
    options = parser.parse_args()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="rd")).absolute()
    cifar, source = Path(options.cifar).absolute(), folder / "pile"
    if not source.is_dir():
        pile(cifar, source, options.images, options.copies, options.sources, options.junk)
    presets = {"raw": "", "curated": "dedup"}
    for name in options.only.split(","):
        more = [f"curate.preset={presets[name]}", f"optim.steps={options.steps}"]
        more += ["dedup.max_share=1"] * (name == "curated")  # most of the pile is planted copies
        found = run(name, source, cifar, folder / "runs", more)
        score = re.search(r"top-1 ([0-9.]+)", str(found["evaluate"]))
        print(f"{name}: k-NN-20 top-1 {score[1] if score else found['evaluate']}")
        for stage, text in found.items():
            print(f"  {stage}: {text}", flush=True)


if __name__ == "__main__":
    main()
