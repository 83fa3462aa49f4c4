"""`--dry-run`: what a job would do, without Ray and without writing anything."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline.config import Config
from pipeline.data.listing import absolute_source, list_source
from pipeline.data.schema import open_shards
from pipeline.data.sources import plan_tasks
from pipeline.errors import DataError, StorageError
from pipeline.files import RunFolder
from pipeline.plan import resolve
from pipeline.stages.chain import named, with_absolute_weights
from pipeline.stages.context import BUILTIN, local_machine, packed_uri, shards_uri
from pipeline.stages.curate_plan import curation_plan
from pipeline.stages.pretrain import describe, starting_pair
from pipeline.train import build, start, state
from pipeline.train.clock import duration
from pipeline.train.run import check_resume

log = logging.getLogger("pipeline")
NOT_PACKED = "not packed yet"
NOT_CURATED = "not curated yet"  # the number of images is then that of all
# Share of the peak of matrix products that a whole step reaches
EFFICIENCY = {"cuda": 0.35, "cpu": 0.15}


def dry_run(config: Config, stages: Sequence[str]) -> None:
    """Prints steps, images, memory, disk and time.

    Raises:
        PipelineError: for all that would stop the real run at its start.
    """
    import torch

    config = with_absolute_weights(named(config, stages))
    folder = RunFolder.of(config.run.folder, config.run.name)
    log.info("run         %s in %s (dry run: nothing is written)", config.run.name, folder)
    machine = local_machine(config)
    images, digest, size = _images(config, folder)
    if "pack" in stages and config.data.source:
        log.info(
            "pack        %s: %s images, %.2f GiB of shards in %s",
            config.data.source,
            f"about {images:,}" if images else "an unknown number of",
            size / 2**30,
            packed_uri(config, folder),
        )
    if config.curate.preset:
        if "curate" in stages:
            curation_plan(config, folder)
        images, digest = _curated(config, folder) or (images, NOT_CURATED)
    if "pretrain" not in stages:
        return
    if not images:
        log.info("pretrain    the archives were not opened: pack them first to see the plan")
        return
    plan = resolve(config, images=images, digest=digest, class_names=(), machine=machine)
    if digest not in (NOT_PACKED, NOT_CURATED):
        check_resume(config, digest, folder)
    plan = start.located(plan, state.latest(folder.checkpoints))
    built = starting_pair(plan, folder)
    for line in describe(plan, built):
        log.info("%s", line)
    cost = build.estimated_cost(plan, built)
    from pipeline.train.cost import peak_flops

    dtype = torch.bfloat16 if plan.precision == "bfloat16" else torch.float32
    peak = peak_flops(plan.device, dtype, plan.threads) * plan.workers * EFFICIENCY[plan.device]
    log.info(
        "disk        about %.2f GiB of checkpoints and weights",
        (config.train.keep_last + 1.25) * cost.checkpoint_bytes / 2**30,
    )
    seconds = cost.flops_per_image * config.optim.global_batch_size * plan.steps / max(peak, 1.0)
    log.info(
        "time        about %s of training on %d %s (%.1f GFLOP an image)",
        duration(seconds),
        plan.workers,
        plan.device,
        cost.flops_per_image / 1e9,
    )


def _curated(config: Config, folder: RunFolder) -> tuple[int, str] | None:
    """Rows and digest of the curated shards, where there are any."""
    try:
        found = open_shards(shards_uri(config, folder))
    except StorageError:
        raise
    except DataError:
        return None
    return found.rows, found.digest


def _images(config: Config, folder: RunFolder) -> tuple[int, str, int]:
    """Rows (0: unknown), digest and bytes of the shards, or an estimate from the source."""
    try:
        found = open_shards(
            packed_uri(config, folder), config.data.image_column, config.data.label_column
        )
        return found.rows, found.digest, sum(file.bytes for file in found.files)
    except StorageError:
        raise
    except DataError:
        if not config.data.source:
            raise
    if config.data.source.startswith(BUILTIN):
        from pipeline.data.demo import DEMO_BYTES, DEMO_IMAGES

        return DEMO_IMAGES, NOT_PACKED, DEMO_BYTES
    data = config.data
    source = absolute_source(data.source)
    listing = list_source(source, follow_links=data.follow_links)
    plan = plan_tasks(
        source, listing, data.image_column, data.label_column, int(data.max_image_mb * 2**20)
    )
    return plan.images, NOT_PACKED, sum(entry.size for entry in listing.entries)
