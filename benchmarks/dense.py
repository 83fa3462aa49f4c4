"""Dense scores of a run, of its step 0, of raw pixels and of a constant, over three seeds.

    python benchmarks/dense.py --run runs/cifar10 [--size 192] [--only camvid|stereo|scenes]

* camvid: segmentation of street scenes, 120 frames to fit to and 60 to score, void 11;
* stereo: the left picture of the pair of scikit-image (a motorcycle) in 96 tiles of 60 x 60 pixels,
  every other one to fit to; the truth is its disparity, so larger is nearer;
* scenes: made pictures of spheres on a floor (`tests/data.py`), 160 to fit to and 60 to score.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.card.dense import DenseSet, DenseSettings, open_dense_set
from pipeline.card.dense.results import constant_results, model_results, pixel_results
from pipeline.config.load import load
from pipeline.embed.embedders import EmbedderSpec, embedder_of
from pipeline.train.build import pair
from tests.data import encoded, scene

CAMVID = Path(__file__).parents[2] / "shared" / "data" / "camvid"

TILE = 60
Sets = tuple[DenseSet, DenseSet]


def camvid(folder: Path) -> Sets:
    """Street scenes with eleven classes, in `folder`."""
    train, test = (open_dense_set(str(folder / part), void=(11,)) for part in ("train", "test"))
    return train, test


def _save(folder: Path, name: str, pixels: Any, depth: Any) -> None:
    stream = io.BytesIO()
    np.save(stream, depth)
    for kind, content in (("images", encoded(pixels)), ("depth", stream.getvalue())):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        (folder / kind / f"{name}.{'png' if kind == 'images' else 'npy'}").write_bytes(content)


def stereo(folder: Path) -> Sets:
    """Tiles of the motorcycle, with the disparity of each pixel."""
    from skimage.data import stereo_motorcycle

    left, _, disparity = stereo_motorcycle()
    for row in range(left.shape[0] // TILE):
        for column in range(left.shape[1] // TILE):
            at = slice(row * TILE, (row + 1) * TILE), slice(column * TILE, (column + 1) * TILE)
            part = folder / ("test" if (row + column) % 2 else "train")
            _save(part, f"{row}-{column:02}", left[at], disparity[at])
    return open_dense_set(str(folder / "train")), open_dense_set(str(folder / "test"))


def scenes(folder: Path) -> Sets:
    """Made pictures, whose depth is known to the last digit."""
    for part, seeds in (("train", range(160)), ("test", range(1000, 1060))):
        for seed in seeds:
            _save(folder / part, f"{seed:04}", *scene(seed, 192))
    return open_dense_set(str(folder / "train")), open_dense_set(str(folder / "test"))


def step0(config: str) -> Any:
    """The run's network before its first step."""
    return pair(load([config])).teacher.backbone.eval()


def contenders(run: str, grid: int) -> dict[str, Callable[..., Any]]:
    """By name, what gives results of both sets and settings."""
    spec = embedder_of(run)
    fresh: EmbedderSpec = replace(
        spec, digest="step 0", load=partial(step0, str(Path(run) / "config.yaml"))
    )
    return {
        "the run": partial(model_results, spec),
        "its step 0": partial(model_results, fresh),
        "raw pixels": lambda *inputs: pixel_results(*inputs, grid),
        "constant": lambda *inputs: constant_results(*inputs),
    }


def main() -> None:
    """Prints a table for each set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--only", default="camvid,stereo,scenes")
    parser.add_argument("--camvid", type=Path, default=CAMVID)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    makers = {"camvid": camvid, "stereo": stereo, "scenes": scenes}
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.only.split(","):
            folder = arguments.camvid if name == "camvid" else Path(scratch) / name
            sets = makers[name](folder)
            for one in sets:
                print(f"{name}: {len(one.rows)} images; {'; '.join(one.remarks)}")
            models = contenders(arguments.run, arguments.size // arguments.patch)
            for contender, results_of in models.items():
                began = time.process_time()
                runs = []
                for seed in range(1 if contender == "constant" else arguments.seeds):
                    settings = DenseSettings(size=arguments.size, seed=seed)
                    runs.append(results_of(*sets, settings))
                seconds = (time.process_time() - began) / len(runs)
                for score, first in runs[0].items():
                    values = [results[score].interval.value for results in runs]
                    spread = max(values) - min(values)
                    interval = f"{first.interval.low:.4f} to {first.interval.high:.4f}"
                    more = first.details.get("pixel_accuracy", 0)
                    print(
                        f"| {contender} | {score} | {np.mean(values):.4f} | {spread:.4f} | "
                        f"{interval} | {more:.3f} | {seconds:.0f} s |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
