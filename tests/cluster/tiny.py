"""A pile and a recipe for clusters: the demo in small, with everything planted that it plants."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.data.demo import make_demo

CLASSES = ("astronaut", "coffee", "gravel", "retina")
TILES, LEAKS = 30, 6  # of each class; of all
STEPS = 60
BATCH = 16
RECIPE = f"""\
# Tests on clusters: a few of the demo's tiles, seconds of training.
data: {{max_bad_fraction: 0.2, shuffle_images: 32, row_group_images: 16}}
curate: {{preset: dedup}}
quality: {{min_sharpness: 1.0}}
dedup: {{threshold: 0.89}}
augment: {{global_size: 16, local_size: 8, local_crops: 2}}
model: {{width: 32, depth: 2, heads: 2, patch_size: 4, registers: 1, drop_path: 0.1}}
head: {{prototypes: 64, bottleneck: 16, hidden: 32}}
optim: {{steps: {STEPS}, global_batch_size: {BATCH}}}
train: {{workers: 2, log_every: 1, save_every: 10, eval_every: 30, precision: float32}}
evaluate: {{batch_size: 32}}
track: {{enabled: false}}
resources: {{cpus_per_worker: 1, threads: 1}}
"""


@dataclass(frozen=True)
class Pile:
    """`folder`/train and `folder`/test, and how many files of each kind were planted in train."""

    folder: Path
    tiles: int
    near: int
    copies: int
    flat: int
    leaks: int
    broken: int

    @property
    def files(self) -> int:
        """All files of the training part."""
        return self.tiles + self.near + self.copies + self.flat + self.leaks + self.broken


def make_pile(folder: Path) -> Pile:
    """A few of the demo's classes and tiles; the same files each time."""
    demo = folder / "demo"
    make_demo(demo)
    counts = dict.fromkeys(("tile", "near", "copy", "flat", "broken"), 0)
    train = folder / "train"
    for name in CLASSES:
        source = demo / "train" / name
        planted = [p for p in sorted(source.iterdir()) if not p.name.startswith("tile_")]
        originals = {source / f"tile_{p.name.partition('_')[2].removeprefix('tile_')}"
                     for p in planted if p.name.startswith(("near_", "copy_"))}  # fmt: skip
        others = [p for p in sorted(source.glob("tile_*")) if p not in originals]
        chosen = [*planted, *sorted(originals), *others[: TILES - len(originals)]]
        (train / name).mkdir(parents=True)
        for path in chosen:
            counts[path.name.partition("_")[0]] += 1
            shutil.copy(path, train / name / path.name)
        (folder / "test" / name).mkdir(parents=True)
        for path in sorted((demo / "test" / name).iterdir())[:15]:
            shutil.copy(path, folder / "test" / name / path.name)
    tests = sorted((folder / "test").rglob("*.jpg"))
    for path in tests[:: len(tests) // LEAKS][:LEAKS]:
        stream = io.BytesIO()
        Image.open(path).save(stream, "JPEG", quality=70)
        (train / path.parent.name / f"leak_{path.name}").write_bytes(stream.getvalue())
    shutil.rmtree(demo)
    return Pile(
        folder,
        tiles=counts["tile"],
        near=counts["near"],
        copies=counts["copy"],
        flat=counts["flat"],
        leaks=LEAKS,
        broken=counts["broken"],
    )


def write_recipe(folder: Path) -> Path:
    """The recipe; its run is called `small`."""
    path = folder / "small.yaml"
    path.write_text(RECIPE)
    return path


def arguments(pile: Pile, recipe: Path, runs: Path) -> list[str]:
    """Of `jobs/run.py`."""
    return [
        str(recipe),
        f"data.source={pile.folder}/train",
        f"evaluate.queries={pile.folder}/test",
        f"run.folder={runs}",
    ]
