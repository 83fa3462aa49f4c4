"""The picture in README: what the demo ends with, drawn from the files of its run.

    make demo
    python benchmarks/demo_picture.py runs/demo docs/demo.png

The verdict and the bars are those of `evaluate/card.json`, the neighbours are of the vectors that
the evaluation made, and the pairs are decisions of the curation.
"""

from __future__ import annotations

import argparse
import io
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN = 1440, 1010, 40
COLOURS = 160  # of the PNG, which stays below 200 KB
TILE, GAP = 84, 6
INK, GREY, PALE = (28, 32, 38), (110, 116, 124), (226, 229, 233)
RIGHT, WRONG, OURS, OTHER = (33, 136, 86), (196, 62, 52), (36, 99, 176), (168, 176, 186)
BARS = {  # role on the card to its words
    "model": "trained",
    "colours": "a colour histogram",
    "step0": "the same network, untrained",
    "raw_pixels": "raw pixels, 16 x 16",
    "majority": "the most frequent class",
}
KEPT_PAIRS = {"duplicate_near": "copies", "leaks_evaluation": "test images among them"}


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@dataclass
class Canvas:
    """A white page that is drawn on."""

    image: Image.Image
    draw: ImageDraw.ImageDraw

    @classmethod
    def new(cls) -> Canvas:
        image = Image.new("RGB", (WIDTH, HEIGHT), "white")
        return cls(image, ImageDraw.Draw(image))

    def text(self, x: int, y: int, text: str, size: int = 20, colour=INK) -> None:
        self.draw.text((x, y), text, colour, font(size))

    def tile(self, x: int, y: int, encoded: bytes, frame: tuple[int, int, int] | None = None):
        with Image.open(io.BytesIO(encoded)) as image:
            picture = image.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC)
        self.image.paste(picture, (x, y))
        if frame:
            box = (x - 3, y - 3, x + TILE + 2, y + TILE + 2)
            self.draw.rectangle(box, outline=frame, width=4)


def images_of(folder: Path) -> dict[str, bytes]:
    """Encoded images of shards by id."""
    tables = [
        pq.read_table(path, columns=["image_id", "image"]) for path in folder.glob("*.parquet")
    ]
    table = pa.concat_tables(tables)
    values = table["image"].to_pylist()
    encoded = [value["bytes"] if isinstance(value, dict) else value for value in values]
    return dict(zip(table["image_id"].to_pylist(), encoded, strict=True))


def bars(canvas: Canvas, card: dict, top: int) -> None:
    score = card["score"]
    queries = card["queries"]["labelled"]
    canvas.text(MARGIN, top, f"Held-out tiles classified by their neighbours ({queries})", 22)
    rows = {
        one["role"]: one["results"][score] for one in card["contenders"] if score in one["results"]
    }
    left, width = MARGIN, 420
    for number, role in enumerate(role for role in BARS if role in rows):
        y = top + 48 + number * 68
        value, low, high = (rows[role][name] for name in ("value", "low", "high"))
        colour = OURS if role == "model" else OTHER
        canvas.text(left, y, BARS[role], 19)
        canvas.draw.rectangle((left, y + 26, left + width, y + 46), fill=PALE)
        canvas.draw.rectangle((left, y + 26, left + round(width * value), y + 46), fill=colour)
        a, b = left + round(width * low), left + round(width * high)
        canvas.draw.line((a, y + 36, b, y + 36), fill=INK, width=2)
        for x in (a, b):
            canvas.draw.line((x, y + 30, x, y + 42), fill=INK, width=2)
        canvas.text(left + width + 14, y + 24, f"{value:.2f}", 20)


def vectors(folder: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Ids, labels and unit vectors of a table."""
    table = ds.dataset(sorted(str(x) for x in folder.glob("*.parquet"))).to_table()
    rows = np.stack(table["cls"].to_numpy(zero_copy_only=False)).astype(np.float32)
    labels = np.array(table["label"].to_pylist())
    return table["image_id"].to_pylist(), labels, rows / np.linalg.norm(rows, axis=1, keepdims=True)


def neighbours(canvas: Canvas, run: Path, left: int, top: int, rows: int = 4, k: int = 8) -> None:
    """Test tiles, evenly spread over the classes, and the training tiles most like them."""
    title = "Held-out tiles as another camera sees them, and what is most like them"
    canvas.text(left, top, title, 22)
    made = run / "evaluate" / "vectors" / "00-model"
    ids, labels, features = vectors(made / "reference")
    asked, wanted, queries = vectors(made / "queries")
    images = images_of(run / "curated"), images_of(run / "pack" / "queries")
    classes = np.unique(wanted)
    chosen = [classes[i * len(classes) // rows + 1] for i in range(rows)]
    for number, label in enumerate(chosen):
        query = int(np.flatnonzero(wanted == label)[0])
        similar = features @ queries[query]
        y = top + 48 + number * (TILE + 2 * GAP)
        canvas.tile(left, y, images[1][asked[query]], INK)
        for place, row in enumerate(np.argsort(-similar, kind="stable")[:k]):
            frame = RIGHT if labels[row] == label else WRONG
            x = left + TILE + 4 * GAP + place * (TILE + GAP)
            canvas.tile(x, y, images[0][ids[row]], frame)
    y = top + 48 + rows * (TILE + 2 * GAP) + 2
    canvas.text(left, y, "green: from the same photograph, red: from another", 17, GREY)


def curation(canvas: Canvas, run: Path, top: int) -> None:
    """What was taken away: pairs of copies and leaks, and flat tiles; with their numbers."""
    table = ds.dataset(run / "curate" / "steps" / "decisions", format="parquet").to_table()
    rows = table.to_pylist()
    images = images_of(run / "shards") | images_of(run / "pack" / "queries")
    kept = sum(row["kept"] for row in rows)
    canvas.text(MARGIN, top, f"What curation took away of {len(rows):,} tiles ({kept:,} stay)", 22)
    x, y = MARGIN, top + 76
    for reason, what in KEPT_PAIRS.items():
        gone = [row for row in rows if row["reason"] == reason]
        canvas.text(x, top + 40, f"{len(gone)} {what}", 19)
        for row in gone[:3]:
            other = row["keeper_id"] if reason == "duplicate_near" else row["query_id"]
            canvas.tile(x, y, images[row["image_id"]])
            canvas.tile(x + TILE + 2, y, images[other])
            x += 2 * TILE + 20
        x += 16
    gone = [row for row in rows if row["reason"] == "flat"]
    canvas.text(x, top + 40, f"{len(gone)} with nothing on them", 19)
    for row in gone[:2]:
        canvas.tile(x, y, images[row["image_id"]])
        x += TILE + GAP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run of configs/demo.yaml")
    parser.add_argument("picture", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    card = json.loads((arguments.run / "evaluate" / "card.json").read_text())
    canvas = Canvas.new()
    lines = textwrap.wrap(card["verdict"]["text"], 84)
    for number, line in enumerate(lines):
        canvas.text(MARGIN, 30 + 40 * number, line, 33)
    top = 56 + 40 * len(lines)
    bars(canvas, card, top)
    neighbours(canvas, arguments.run, 580, top)
    curation(canvas, arguments.run, top + 480)
    page = canvas.image.crop((0, 0, WIDTH, top + 480 + 76 + TILE + MARGIN))
    page.quantize(COLOURS).save(arguments.picture, optimize=True)
    print(f"{arguments.picture}: {arguments.picture.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
