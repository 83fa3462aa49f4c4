"""A pile for clusters: the demo in small, with everything planted that it plants."""

from __future__ import annotations

import io
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.pack.demo.tiles import make_demo
from tests.tiny import write_tiny

CLASSES = ("astronaut", "coffee", "gravel", "retina")
TILES, LEAKS = 30, 6  # of each class; of all
STEPS = 60


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


def write_recipe(folder: Path, curate: bool = False) -> Path:
    """The recipe; its run is called `small`."""
    decided = {
        "curate": {"preset": "dedup"},
        "quality": {"min_sharpness": 1.0},
        "dedup": {"threshold": 0.89},
    }
    return write_tiny(
        folder / "small.yaml",
        data={"max_bad_fraction": 0.2},  # of some files that are broken on purpose
        optim={"steps": STEPS},
        train={"save_every": 10, "eval_every": 30},
        resources={"cpus_per_worker": 1},
        **(decided if curate else {}),
    )


def arguments(pile: Pile, recipe: Path, runs: Path) -> list[str]:
    """Of `jobs/run.py`."""
    return [
        str(recipe),
        f"data.source={pile.folder}/train",
        f"evaluate.queries={pile.folder}/test",
        f"run.folder={runs}",
    ]
