"""What every stage gets: config, run folder, tracking, and the places of its inputs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.config.config import Config
from pipeline.driver import cluster
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.pack.source_places import absolute_source
from pipeline.plan.layout import Machine
from pipeline.plan.nodes import Node
from pipeline.shards.columns import MANIFEST
from pipeline.shards.set_range import ranged
from pipeline.shards.shards import ShardSet, open_shards
from pipeline.storage.places import absolute_uri, exists, resolve_uri
from pipeline.storage.run_folder import RunFolder, fingerprint
from pipeline.storage.transfer import read_mark
from pipeline.uri import Place, is_uri, join, public

log = logging.getLogger("pipeline")

CGROUP = Path("/sys/fs/cgroup")
DESCRIPTOR = "descriptor"  # an embedder that needs no weights
BUILTIN = "builtin:photos"  # a source that needs no network: photographs inside scikit-image


@dataclass
class Context:
    """One job: a config, its run folder and the pipeline run in MLflow."""

    config: Config
    folder: RunFolder
    tracking: Any = None  # pipeline.track.driver.Pipeline, once a stage has to run
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    only: bool = False  # single stages were asked for by name
    stages: Mapping[str, Any] = field(default_factory=dict)  # of a chain, by name
    asked: Config | None = None  # the recipe before anything was derived from weights and images

    @property
    def shards_uri(self) -> str:
        """Where the training shards are."""
        return shards_uri(self.config, self.folder)

    @property
    def packed_uri(self) -> str:
        """Where the shards are before any of their images is left out."""
        return packed_uri(self.config, self.folder)

    def shards(self) -> ShardSet:
        """The training shards.

        Raises:
            DataError: where there are none.
        """
        return open_training_shards(self.config, self.folder)


def packed_uri(config: Config, folder: RunFolder) -> str:
    """The shards that the recipe names, or those that pack writes into the run folder."""
    return config.data.shards or str(folder.at("shards"))


def labels_of(config: Config, field: str) -> Literal["auto", "folder", "none"]:
    """`data.labels` for a set: `none` is said of the training images alone, for evaluation sets are
    there for their labels.
    """
    labels = config.data.labels
    return "auto" if labels == "none" and field != "data.source" else labels


def shards_uri(config: Config, folder: RunFolder) -> str:
    """What is trained on: curated shards where the recipe curates, else all packed ones."""
    curate = config.curate
    if not curate.preset:
        return packed_uri(config, folder)
    return curate.shards or str(folder.at("curated"))


def open_training_shards(config: Config, folder: RunFolder) -> ShardSet:
    """The training shards.

    Raises:
        ConfigError: where neither shards nor a source are named.
        DataError: where the shards are not there or cannot be used.
    """
    if not config.curate.preset:
        return open_packed_shards(config, folder)
    uri = shards_uri(config, folder)
    if not exists(*resolve_uri(uri)):
        raise DataError(
            f"the images are not curated yet: there is no {public(uri)}",
            "curate them with jobs/curate.py and the same arguments, run all with jobs/run.py, or "
            "train on all images with curate.preset=",
        )
    shards = open_shards(uri, field="curate.shards")
    return ranged(shards, config.data.range, config.model.in_channels)


def open_packed_shards(config: Config, folder: RunFolder) -> ShardSet:
    """The shards before any of their images is left out.

    Raises:
        ConfigError: where neither shards nor a source are named.
        DataError: where the shards are not there or cannot be used.
    """
    if not config.data.shards and not exists(*resolve_uri(str(folder.at("shards")))):
        if config.data.source:
            raise DataError(
                f"{public(config.data.source)} is not packed yet: there is no "
                f"{public(folder.at('shards'))}",
                "pack it with jobs/pack.py and the same arguments, or run all with jobs/run.py",
            )
        raise ConfigError(
            "no images: neither data.shards nor data.source is set",
            "data.source=photos/ names images to pack, data.shards=shards/ packed ones",
        )
    data = config.data
    shards = open_shards(
        packed_uri(config, folder),
        data.image_column,
        data.label_column,
        labels=data.labels != "none",
    )
    return ranged(shards, data.range, config.model.in_channels)


def local_machine(config: Config) -> Machine:
    """What a Ray that is started on this machine would find, without starting one."""
    import torch

    cpus, gpus = config.resources.cpus or os.cpu_count() or 1, torch.cuda.device_count()
    memory = max(1.0, memory_bytes() - config.resources.object_store_gb * 2**30)
    return Machine(
        cpus=cpus,
        gpus=gpus,
        bfloat16=cluster.cpu_has_bfloat16(),
        nodes=(Node(cpus, gpus, driver=True, memory=memory),),
    )


def memory_bytes() -> float:
    """What this process may have: the machine's memory, or less where a container has a limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such limit, or "max"
            limits.append(int((CGROUP / limit).read_text()))
    return float(min(limits))


def with_packed_sets(config: Config, folder: RunFolder) -> Config:
    """The config with evaluation sources replaced by the shards that pack made of them."""
    changed = {}
    for name, source in evaluation_sources(config).items():
        packed = packed_set(name, source, folder)
        if not is_shards(source) and source_of(packed) == _place(source, folder):
            changed[name] = str(packed)
    if not changed:
        return config
    guard = {name: changed.pop(name) for name in ("keep",) if name in changed}
    sections = {
        "evaluate": config.evaluate.model_copy(update=changed),
        "guard": config.guard.model_copy(update=guard),
    }
    return config.model_copy(update=sections)


def evaluation_sources(config: Config) -> dict[str, str]:
    """The sets beside the training images that a recipe names, by what pack calls them."""
    named = {
        "reference": config.evaluate.reference,
        "queries": config.evaluate.queries,
        "keep": config.guard.keep,
    }
    return {name: source for name, source in named.items() if source}


def packed_set(name: str, source: str, folder: RunFolder) -> Place:
    """Where pack puts an evaluation set: `pack/reference`, or beside it where another set is there,
    so that one run can score many.

    Args:
        name: `reference`, `queries` or `keep`.
        source: of the images.
        folder: of the run.
    """
    usual, place = folder.at("pack", name), _place(source, folder)
    if source_of(usual) in ("", place):
        return usual
    return folder.at("pack", f"{name}-{fingerprint([place])[:8]}")


def _place(source: str, folder: RunFolder) -> str:
    if source.startswith(BUILTIN):
        source = str(folder.at("source", source.removeprefix(BUILTIN).strip("/")))
    return public(absolute_source(source))


def source_of(packed: Place) -> str:
    """What shards that pack wrote are of; "" where none are there."""
    manifest = read_mark(*resolve_uri(str(join(packed, MANIFEST))))
    return str(manifest.get("source", ""))


def is_shards(uri: str) -> bool:
    """Whether a place holds parquet files directly, i.e. can be read without packing."""
    if not uri or uri.startswith(BUILTIN):
        return False
    try:
        open_shards(uri)
    except StorageError:
        raise  # nobody knows what is there
    except DataError:
        return False
    return True


def nearest(place: str | Place) -> Path | None:
    """What is there of a local place: itself, or the nearest folder above it; None for a URI."""
    text = str(place).removeprefix("file://")
    if is_uri(text):
        return None
    path = Path(absolute_uri(text))
    return next(p for p in (path, *path.parents) if p.exists())


def result_line(stage: str, text: str) -> None:
    """`pack        1,000 images …`: one aligned line of a stage's result."""
    log.info("%-11s %s", stage, text)


def size_of(size: float) -> str:
    """`1.5 GiB`, `36.0 MiB` or `0.9 KiB`."""
    for name, unit in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 2**10:,.1f} KiB"
