"""What is said without shards: what this machine has for a run, line by line, and a verdict."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pipeline.config.config import Config
from pipeline.context import memory_bytes, nearest, size_of
from pipeline.doctor import surroundings
from pipeline.driver import cluster, compiler
from pipeline.errors import PipelineError
from pipeline.track import server

log = logging.getLogger("pipeline")
PYTHON = ((3, 11), (3, 14))  # from, and below
GIB = 2**30
# Below these a run may fail. A driver, a worker, decoders and an evaluator take about 3 GiB
# together, each with its own torch.
FREE_MEMORY, FREE_DISK = 4 * GIB, 5 * GIB
# What is not needed for a run: packages, what they give, and what installs them
OPTIONAL = (
    (("timm",), "encoders and weights by name (timm:NAME)", "timm"),
    (("transformers",), "Hugging Face's loaders, fine-tuned classifiers", "transformers"),
    (("onnx", "onnxruntime", "onnxscript"), "weights in ONNX", "onnx onnxruntime onnxscript"),
    (("faiss-cpu",), "an index for more than a million vectors", "faiss-cpu"),
    (("pillow-heif",), "HEIC photos of phones", "pillow-heif"),
    (("pydicom",), "DICOM images", "pydicom"),
    (("fastapi", "uvicorn"), "jobs/serve.py", "'ray[serve]'"),
)


@dataclass(frozen=True)
class Line:
    """One thing.

    Attributes:
        what: it is about.
        text: what there is.
        todo: what to do; "" where all is well.
        stops: no run works without it.
    """

    what: str
    text: str
    todo: str = ""
    stops: bool = False


def checkup(config: Config) -> bool:
    """Prints a line for each thing and a verdict; False where something stops a run."""
    lines = [*_programs(), *_machine(config), *_services(config), *_optional()]
    for line in lines:
        mark = "ok" if not line.todo else "MISSING" if line.stops else "warning"
        log.info("%-8s %-12s %s", mark, line.what, line.text + f": {line.todo}" * bool(line.todo))
    stopping = [line.what for line in lines if line.todo and line.stops]
    warned = [line.what for line in lines if line.todo and not line.stops]
    if stopping:
        verdict = f"no run works here yet: see {', '.join(stopping)}"
    elif warned:
        verdict = f"runs work here; a word on {', '.join(warned)} above"
    else:
        verdict = "all that runs need is here"
    log.info("%-8s %s", "verdict", f"{verdict}. Next: python jobs/start.py photos/")
    return not stopping


def _programs() -> Iterator[Line]:
    low, high = PYTHON
    known = low <= sys.version_info[:2] < high
    asked = f"take one from {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
    yield Line("Python", platform.python_version(), "" if known else asked, stops=True)
    problems = _unfit()
    what = ", ".join(problems) or "all that pyproject.toml names, in its versions"
    install = "python -m pip install -c constraints.txt -e . in the clone installs them"
    yield Line("packages", what, install if problems else "", stops=True)
    yield _torch()


def _unfit() -> list[str]:
    """Required packages that are not there, or of another version than is asked for."""
    try:
        required = metadata.requires("raydino") or []
    except metadata.PackageNotFoundError:  # a clone that is not installed
        required = list(surroundings.PACKAGES)
    from packaging.requirements import Requirement

    problems = []
    for text in required:
        asked = Requirement(text)
        if asked.marker and not asked.marker.evaluate({"extra": ""}):
            continue
        version = version_of(asked.name)
        if not version:
            problems.append(f"{asked.name} is not installed")
        elif not asked.specifier.contains(version, prereleases=True):
            problems.append(f"{asked.name} is {version}, not {asked.specifier}")
    return problems


def version_of(name: str) -> str:
    """Of an installed package; "" where it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _torch() -> Line:
    if not version_of("torch"):
        return Line("torch", "is not installed", "pip install torch torchvision", stops=True)
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs alone"
    text = f"{torch.__version__}, built for {built}"
    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        sizes = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        least = min(card.total_memory for card in sizes)
        text += f"; {len(sizes)} GPU: {', '.join(names)} with {size_of(least)}"
        return Line("torch", text)
    if shutil.which("nvidia-smi"):
        todo = "there is nvidia-smi, so install a build of torch for its driver (docs/gpus.md)"
        return Line("torch", f"{text}; it sees no GPU", todo)
    return Line("torch", f"{text}; no GPU, so training is on CPUs: small networks")


def _machine(config: Config) -> Iterator[Line]:
    import torch

    cpus = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cpus
    bfloat16 = "fast" if cluster.cpu_has_bfloat16() else "slow, so float32 is used on CPUs"
    text = f"{cpus}, torch uses {torch.get_num_threads()} threads; bfloat16 is {bfloat16}"
    less = f"this process may use {usable} of them; set resources.cpus={usable}"
    yield Line("CPUs", text, less if usable < cpus and not config.resources.cpus else "")
    yield _memory(config)
    yield _disk(config)
    shared = surroundings.SHARED_MEMORY
    if shared.is_dir():
        free, store = shutil.disk_usage(shared).free, config.resources.object_store_gb * GIB
        text = f"{size_of(free)} free, {size_of(store)} for Ray's objects"
        todo = "a larger --shm-size of the container, or a smaller resources.object_store_gb"
        yield Line(str(shared), text, todo if free < store else "")
    tried = compiler.tried()
    gpus = torch.cuda.is_available()
    text = str(tried).removeprefix("compiler: ")
    if not gpus:
        text += "; only GPUs need one"
    yield Line("compiler", text, compiler.INSTALL if tried.missing and gpus else "")


def _memory(config: Config) -> Line:
    import psutil

    whole, free = memory_bytes(), float(psutil.virtual_memory().available)
    store = config.resources.object_store_gb * GIB
    text = f"{size_of(whole)}, {size_of(min(whole, free))} free"
    todo = f"a run takes about {size_of(FREE_MEMORY)} beside Ray's {size_of(store)}: end others"
    return Line("memory", text, todo if min(whole, free) < FREE_MEMORY else "")


def _disk(config: Config) -> Line:
    place = config.run.folder
    try:
        path = surroundings.try_writing(place, b"doctor")
    except PipelineError as error:
        return Line("disk", error.what, error.hint, stops=True)
    if nearest(place) is None:
        return Line("disk", f"{path} can be written")
    free = shutil.disk_usage(path).free
    text = f"{size_of(free)} free in {path} (run.folder)"
    return Line("disk", text, "make room, or set run.folder" if free < FREE_DISK else "")


def _services(config: Config) -> Iterator[Line]:
    address = os.environ.get("RAY_ADDRESS")
    ray = version_of("ray") or "is not installed"
    if address:
        try:
            with cluster.joined(config.resources):
                machine, nodes = cluster.machine(), cluster.nodes()
            text = f"{ray}; cluster at {address}: {nodes} nodes, {machine.cpus} CPUs, "
            yield Line("Ray", f"{text}{machine.gpus} GPUs")
        except PipelineError as error:
            yield Line("Ray", f"{ray}; {error.what}", error.hint, stops=True)
    else:
        yield Line("Ray", f"{ray}; RAY_ADDRESS names no cluster: a job starts one here and ends it")
    version = version_of("mlflow") or "is not installed"
    uri = config.track.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("http"):
        up = server.healthy(uri.rstrip("/"))
        todo = "" if up else "start it, or let a job start its own: unset MLFLOW_TRACKING_URI"
        yield Line("MLflow", f"{version}; {uri} {'answers' if up else 'does not answer'}", todo)
        return
    near = nearest(config.run.folder)
    home = Path(config.run.folder) / "mlflow"
    running = server.running(home) if near is not None else None
    text = f"runs at {running.uri}" if running else "no server runs: a job starts one"
    yield Line("MLflow", f"{version}; {text}")


def _optional() -> Iterator[Line]:
    there, missing = [], []
    for names, gives, install in OPTIONAL:
        absent = [name for name in names if not version_of(name)]
        if absent:
            missing.append(f"{gives} (pip install {install})")
        else:
            there.append(f"{names[0]} {version_of(names[0])}")
    yield Line("extras", ", ".join(there) or "none")
    if missing:
        yield Line("not here", f"{'; '.join(missing)}; a run needs none of them")
