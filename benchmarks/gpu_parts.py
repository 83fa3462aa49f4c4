"""The parts of `gpu.py`: each yields figures as soon as it has them."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import RECIPES, ROOT, VALUES, encodings, spec_of, views_of
from gpu_trainee import (
    GIB,
    Size,
    Trainee,
    chunk,
    fitting,
    machine,
    memory,
    process_group,
)
from PIL import Image
from reference_step import Collated, Reference

from pipeline.evaluate.neighbours.nearest import nearest
from pipeline.loss.form import Kernels
from pipeline.model.pair import HeadSpec
from pipeline.plan.plan import Plan
from pipeline.train import build
from pipeline.train.checkpoint.saving import Saving
from pipeline.train.objective import Answer
from pipeline.train.parallel.strategy import Layout
from pipeline.views.batch import Batch

Figures = Iterator[dict[str, Any]]
TOP = 12  # kernels


def where(size: Size) -> Figures:
    """The machine."""
    yield machine(size)


def large(size: Size) -> Figures:
    """ViT-L/16: a step, its waits and kernels, and the reference's."""
    trainee = fitting(size, "vitl16_short")
    yield (step := trainee.measured())
    yield waits(trainee)
    yield kernels(trainee)
    del trainee
    yield reference(size, step)


def small(size: Size) -> Figures:
    """ViT-S/16: a step, its kernels, a bad image, the views of a step, and the reference's."""
    trainee = fitting(size, "vits16_8gpu")
    yield (step := trainee.measured())
    yield kernels(trainee)
    yield bad_image(trainee)
    yield views(trainee, step)
    del trainee
    yield reference(size, step)


def base(size: Size) -> Figures:
    """ViT-B/14: a step."""
    yield fitting(size, "vitb14_8gpu").measured()


def waits(trainee: Trainee) -> dict[str, Any]:
    """Lines at which the host waits for the device in a step."""
    if trainee.size.small:
        return {"waits": "needs a GPU"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        trainee.step()
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{Path(x.filename).name}:{x.lineno}" for x in said if "synchroniz" in str(x.message)
    )
    return {"recipe": trainee.recipe, "waits": sum(places.values()), "lines": dict(places)}


def kernels(trainee: Trainee) -> dict[str, Any]:
    """What the device does for longest in a step."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = not trainee.size.small
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as seen:
        trainee.step()
        trainee.size.wait()
    column = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    averages = [row for row in seen.key_averages() if row.device_type == kind]
    rows = [(getattr(row, column), row.count, row.key) for row in averages]
    rows = sorted((row for row in rows if row[0] > 0), reverse=True)
    return {
        "recipe": trainee.recipe,
        "kernels": sum(count for _, count, _ in rows),
        "busy_ms": round(sum(us for us, _, _ in rows) / 1e3, 1),
        "top": [f"{key[:50]} x{count} {us / 1e3:.1f} ms" for us, count, key in rows[:TOP]],
    }


def bad_image(trainee: Trainee) -> dict[str, Any]:
    """Whether an image that cannot be decoded compiles anything anew."""
    graphs = torch._dynamo.utils.counters["stats"]
    views, before = trainee.with_a_bad_image(), graphs["unique_graphs"]
    timed = trainee.size.timed
    first = timed(lambda: trainee.step(views))
    return {
        "recipe": trainee.recipe,
        "bad_image_first_ms": round(1e3 * first, 1),
        "bad_image_again_ms": round(1e3 * timed(lambda: trainee.step(views), 4), 1),
        "new_graphs": graphs["unique_graphs"] - before,
    }


def views(trainee: Trainee, step: dict[str, Any]) -> dict[str, Any]:
    """The way from chunks on the host to views on the device, and colour's share of a step."""
    size, plan = trainee.size, trainee.plan
    make = build.view_maker(plan, trainee.state.pair, size.device)
    pin = not size.small
    parts = [chunk(plan, max(1, plan.micro_batch // 4), seed) for seed in range(4)]
    batch = Batch.concat(parts, pin)
    first = size.timed(lambda: make(batch))
    joined = size.timed(lambda: Batch.concat(parts, pin), 2)
    copied = size.timed(lambda: batch.to(size.device), 3)
    there = replace(batch.to(size.device), photometric=batch.photometric)
    coloured = size.timed(lambda: there.views(make.spec, make.dtype, make.colours), 3)
    return {
        "recipe": trainee.recipe,
        "images": batch.images,
        "join_ms": round(1e3 * joined, 1),
        "copy_ms": round(1e3 * copied, 1),
        "colour_first_s": round(first, 1),
        "colour_ms": round(1e3 * coloured, 2),
        "colour_share": round(1e3 * coloured / step["step_ms"] * step["images"] / batch.images, 3),
    }


def reference(size: Size, ours: dict[str, Any]) -> dict[str, Any]:
    """The reference's step on the same device, in 16 bits; `ratio`: our images/s over its own."""
    recipe, images = ours["recipe"], ours["images"]
    while True:
        gc.collect()
        if not size.small:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds, *spread = _reference_step(size, size.plan(recipe, images))
            break
        except torch.OutOfMemoryError:
            images //= 2
    return {
        "recipe": recipe,
        "reference_images": images,
        "reference_ms": round(1e3 * seconds, 1),
        "reference_spread_ms": [round(1e3 * x, 1) for x in spread],
        "reference_images_s": round(images / seconds, 1),
        "ratio": round(ours["images_s"] * seconds / images, 2),
        **memory(),
    }


def _reference_step(size: Size, plan: Plan) -> tuple[float, float, float]:
    config = plan.config
    heads = build.pair(config).student
    ibot = HeadSpec(**config.ibot_head.model_dump(exclude={"separate"}))
    step = Reference(
        spec_of(plan), (HeadSpec(**config.head.model_dump()), ibot if heads.ibot_head else None),
        config.loss.centring == "sinkhorn", config.optim.layerwise_decay, torch.bfloat16,
        size.device,
    )  # fmt: skip
    step.load(heads.state_dict())
    batch = Collated.of(views_of(plan, 0, size.device))
    for _ in range(2):
        step.step(batch, VALUES)
    return size.median(lambda: step.step(batch, VALUES), 4)


def losses(size: Size) -> Figures:
    """Targets, losses and their gradient: plain torch and kernels."""
    forms = ("eager",) if size.small else ("eager", "triton")
    for recipe in ("vits16_8gpu", "vitl14"):
        plan = size.plan(recipe, RECIPES[recipe])
        took = {form: _losses(size, plan, form) for form in forms}
        figures = {f"{form}_ms": round(1e3 * seconds, 2) for form, seconds in took.items()}
        ratio = {"times": round(took["eager"] / took["triton"], 2)} if len(took) == 2 else {}
        yield {"recipe": recipe, "images": plan.micro_batch, **figures, **ratio, **memory()}


def _losses(size: Size, plan: Plan, form: Kernels) -> float:
    pair = build.pair(plan.config)
    objective = build.objective(plan.config, pair)
    objective.spec = replace(objective.spec, kernels=form)
    seen = views_of(plan, 0, size.device)
    teacher, student = encodings(plan, pair, seen, size.device)
    patches = objective.masked(seen)

    def once() -> None:
        answers = iter([Answer(teacher, patches.rows)])
        targets = next(objective.targets(answers, VALUES.teacher_temperature))
        objective.losses(student, targets, seen, patches).total.backward()
        objective.commit()

    once()
    return size.median(once, 3)[0]


class Alone(Layout):
    """Of a group of one process, which is split all the same."""

    @property
    def sharded(self) -> bool:
        return self.strategy == "fsdp"


def parallel(size: Size) -> Figures:
    """ViT-L/16 in a group of one process: DDP with whole and split graphs, and FSDP."""
    plan = size.plan("vitl16_short", RECIPES["vitl16_short"])
    with process_group(size):
        for name in ("ddp", "ddp, graphs split", "fsdp"):
            torch._dynamo.reset()
            layout = replace(build.layout(plan, size.device), workers=2)
            if size.device.type == "cuda":
                layout = replace(layout, device=torch.device("cuda", 0))
            if name == "fsdp":
                fields = {**layout.__dict__, "workers": 1, "strategy": "fsdp"}
                layout = Alone(**fields)
            split = name.endswith("split")
            trainee = Trainee.of(size, "vitl16_short", plan, layout, split)
            yield {"strategy": name, **trainee.measured(4)}
            del trainee
            gc.collect()


def checkpoint(size: Size) -> Figures:
    """Checkpoints of ViT-L/16: how long a step waits for the copy, and until all is written."""
    plan = size.plan("vitl16_short", 8, "train.compile=false")
    trainee = Trainee.of(size, "vitl16_short", plan)
    with tempfile.TemporaryDirectory(prefix="raydino-") as folder:
        saving = Saving(Path(folder))
        waited, written = [], []
        for step in (1, 2):  # the first one makes room in host memory
            begin = time.perf_counter()
            saving.begin(step, trainee.state.state(), {})
            waited.append(round(time.perf_counter() - begin, 2))
            ended = saving.ended(wait=True)
            written.append(round(time.perf_counter() - begin, 2))
            if ended is None or ended.error:
                raise OSError(f"the checkpoint was not written: {ended}")
    yield {
        "checkpoint_gib": round(saving.host.bytes / GIB, 2),
        "waited_s": waited,
        "written_s": written,
    }


def neighbours(size: Size) -> Figures:
    """The nearest of ImageNet's training images, as k-NN asks for them while a run trains."""
    rows, asked, width = (1000, 50, 64) if size.small else (1_281_167, 10_000, 1024)
    reference = torch.randn(rows, width, device=size.device)
    queries = torch.randn(asked, width, device=size.device)
    seconds = size.timed(lambda: nearest(reference, queries, 20))
    shape = f"{asked:,} of {rows:,} x {width}"
    yield {"nearest": shape, "seconds": round(seconds, 2), **memory()}


def goldens(size: Size) -> Figures:
    """The tests that are marked gpu: golden values and kernels on the device."""
    if size.small:
        yield {"tests": "need a GPU"}
        return
    files = [x for x in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in x.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    command += map(str, sorted(files))
    code, text = run(command, size.seconds)
    yield {"tests": text.strip().splitlines()[-1] if text.strip() else "", "exit_code": code}


@dataclass(frozen=True)
class Photos:
    """JPEG files that are made on the fly: soft shapes with grain, of the size of ImageNet's."""

    count: int
    width: int
    height: int

    def write(self, folder: Path) -> None:
        """All of them, on all cores."""
        from concurrent.futures import ThreadPoolExecutor

        folder.mkdir(parents=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda i: self._one(folder / f"{i:05d}.jpg", i), range(self.count)))

    def _one(self, file: Path, seed: int) -> None:
        rng = np.random.default_rng(seed)
        soft = rng.integers(0, 256, (self.height // 24 + 2, self.width // 24 + 2, 3), np.uint8)
        large = Image.fromarray(soft).resize((self.width, self.height), Image.Resampling.BICUBIC)
        grain = rng.integers(-12, 13, (self.height, self.width, 1), np.int16)
        pixels = np.clip(np.asarray(large) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, quality=90)


def job(size: Size) -> Figures:
    """`jobs/run.py` for 200 steps of ViT-S/16: images a second, and the share of waiting."""
    photos = Photos(64, 48, 40) if size.small else Photos(4096, 500, 375)
    steps, images = (8, 16) if size.small else (200, 256)
    with tempfile.TemporaryDirectory(prefix="raydino-") as folder:
        photos.write(Path(folder) / "photos")
        command = [
            *(sys.executable, str(ROOT / "jobs" / "run.py"), str(ROOT / "configs/vits16.yaml")),
            *(f"data.source={folder}/photos", f"run.folder={folder}/runs", "run.name=job"),
            *("optim.passes=null", f"optim.steps={steps}", f"optim.global_batch_size={images}"),
            *("train.workers=1", "train.accumulation=1", f"train.save_every={steps // 2}"),
            *(f"train.eval_every={steps}", "track.enabled=false", "resources.object_store_gb=8"),
        ]  # fmt: skip
        if size.small:
            sides = ("augment.global_size=32", "augment.local_size=16", "augment.local_crops=2")
            net = ("model.width=32", "model.depth=2", "model.heads=2", "head.prototypes=64")
            here = ("resources.cpus=2", "resources.object_store_gb=0.2", "resources.threads=1")
            command += [*sides, *net, *here, "data.shuffle_images=32"]
        code, text = run(command, size.seconds)
        done = Path(folder) / "runs" / "job" / "pretrain" / "_done.json"
        result = json.loads(done.read_text())["result"] if done.is_file() else {}
        keys = ("images_per_s", "data_wait_fraction", "peak_memory_gib", "data_limit")
        figures = {key: result[key] for key in keys if key in result}
        yield {"steps": result.get("step", 0), "images": images, "exit_code": code, **figures}
        if code:
            print(text[-4000:], file=sys.stderr, flush=True)


def run(command: list[str], seconds: float) -> tuple[int, str]:
    """A command's exit code and what it said; it is asked to end when the time is over."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=max(1.0, seconds - 20))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            text, _ = process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
    return process.returncode, text
