"""A backbone in ONNX against torch: error, speed on a CPU, k-NN, at the native size and two others.

    python benchmarks/onnx_out.py runs/demo     a run with checkpoints and evaluation sets
    python benchmarks/onnx_out.py vits14        random weights of a size: error and speed alone

k-NN is of at most IMAGES of each evaluation set of the run, at each size by torch and by each file.
Speed is of one thread and of a batch of 8; the kinds run in turn, and the table gives medians.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from pipeline import api
from pipeline.config.load import load
from pipeline.context import Context
from pipeline.evaluate.teacher import Evaluator
from pipeline.images.preprocessing import Preprocessing
from pipeline.model.onnx_out import KINDS, OnnxFile, SessionModule, save_onnx
from pipeline.stages.evaluate import chosen_in, teacher, trained_plan
from pipeline.storage.run_folder import RunFolder
from pipeline.train.evaluator import evaluation_spec
from pipeline.views.photometric import PhotometricSpec

ROUNDS, BATCH, IMAGES = 7, 8, 1000


def sizes_of(native: int, patch: int) -> list[int]:
    """The native size, and those nearest to 3/4 and 3/2 of it."""
    return [round(native * share / patch) * patch for share in (0.75, 1, 1.5)]


def speeds(network: torch.nn.Module, files: list[OnnxFile]) -> dict[str, float]:
    """Milliseconds an image, by kind; torch is one of them."""
    x = torch.randn(BATCH, 3, files[0].size, files[0].size)
    ways = {"torch": network} | {file.kind: SessionModule(file.path) for file in files}
    took: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for one in range(ROUNDS + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way(x)
                if one:  # the first one warms up
                    took[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(times) / BATCH for name, times in took.items()}


def measured(name: str, network: torch.nn.Module, patch: int, native: int, spec=None) -> None:
    mean, std = (spec.mean, spec.std) if spec else (PhotometricSpec.mean, PhotometricSpec.std)
    with tempfile.TemporaryDirectory() as folder:
        files = save_onnx(
            network, Path(folder, "onnx"), sizes_of(native, patch), Preprocessing(None, mean, std)
        )
        for size in sizes_of(native, patch):
            of_size = [file for file in files if file.size == size]
            ms, knn = speeds(network, of_size), {}
            if spec:
                evaluator = Evaluator(replace(spec, image_size=size, half=False))
                knn = {
                    file.kind: evaluator.top1(SessionModule(file.path), IMAGES) for file in of_size
                }
                knn["torch"] = evaluator.top1(network, IMAGES)
            rows = [("torch", "", "")] + [
                (file.kind, f"{file.bytes / 2**20:.1f}", f"{file.error:.1g}") for file in of_size
            ]
            for kind, mib, error in rows:
                score = knn.get(kind)
                shown = (
                    "" if score is None else f"{score:.4f} ({100 * (score - knn['torch']):+.2f})"
                )
                print(
                    f"| {name}, {size} | {kind} | {mib} | {error} | {ms[kind]:.2f} | {shown} |",
                    flush=True,
                )


def main(models: list[str]) -> None:
    torch.set_num_threads(1)
    print(f"opset 18, kinds {', '.join(KINDS)}, batch {BATCH}, one thread")
    print(
        "| model, pixels | kind | MiB | error | ms an image | k-NN (points) |\n" + "|---" * 6 + "|"
    )
    for model in models:
        if not Path(model).is_dir():
            torch.manual_seed(0)
            spec = api.sized(model, layer_scale=1.0)
            measured(model, spec.build().eval(), spec.patch_size, spec.image_size)
            continue
        folder = Path(model).absolute()
        place = [f"run.folder={folder.parent}", f"run.name={folder.name}"]
        named = load(place)
        run = RunFolder.of(named.run.folder, named.run.name)
        saved = chosen_in(run, named)
        plan = trained_plan(saved)
        context = Context(plan.config.model_copy(update={"run": named.run}), run)
        size, patch = plan.config.augment.global_size, plan.config.model.patch_size
        spec = evaluation_spec(plan, context.shards())
        measured(folder.name, teacher(saved).backbone.eval(), patch, size, spec)


if __name__ == "__main__":
    main(sys.argv[1:] or ["vits14"])
