"""What a curation would do, for `--dry-run`: rules counted on a sample, steps and their cost."""

from __future__ import annotations

import logging

from pipeline.config.config import Config
from pipeline.context import DESCRIPTOR, Context, result_line, with_packed_sets
from pipeline.curate.copies.cells import cells_for
from pipeline.curate.images.descriptor import DIM
from pipeline.curate.images.fingerprint import Decoding
from pipeline.curate.images.quality import sample_counts
from pipeline.curate.run_choose import check_clusters
from pipeline.curate.run_copies import false_positives
from pipeline.curate.run_images import rules
from pipeline.curate.sets import Sets, open_sets
from pipeline.curate.threshold.calibrate import COMPARED
from pipeline.errors import DataError, StorageError
from pipeline.storage.run_folder import RunFolder
from pipeline.train.speed.bottleneck import duration
from pipeline.uri import public

log = logging.getLogger("pipeline.curate")

# CPU seconds of one core, measured on small photos (docs/curation.md); larger ones take longer.
IMAGE_S = 7e-4  # of an image
PIXEL_S = 1.8e-8  # and of each of its pixels, decoding included
FLOPS = 4e10  # of a core, in products of matrices
COMPARED_S = 15  # of comparing the images of a calibration
ATTACKED_S = 0.05  # of an image that calibration attacks nine times
TABLE_BYTES = 13_000  # of a photo: 5.4 KB of fingerprints, 7.5 KB of the join by descriptors
PIXELS = 200_000  # of an image, where nothing is known


def curation_plan(config: Config, folder: RunFolder) -> None:
    """Prints what the rules would remove from a sample and what each step will do and take.

    Raises:
        PipelineError: a set is not there.
    """
    context = Context(with_packed_sets(config, folder), folder)
    try:
        sets = open_sets(context)
    except StorageError:
        raise
    except DataError as error:
        if not config.data.source:
            raise
        result_line("curate", f"its steps are known when the images are packed: {error.what}")
        return
    check_clusters(config, sets)
    inputs = sets.inputs
    if config.quality.enabled:
        counts = sample_counts(
            inputs,
            rules(config),
            config.quality.sample,
            config.run.seed,
            Decoding(config.model.in_channels, config.data.max_image_pixels),
        )
        result_line("quality", f"of a sample of {counts.images:,} of {inputs.rows:,} images:")
        for line in counts.lines():
            result_line("", line)
    for line in steps_of(config, sets):
        result_line("curate", line)


def steps_of(config: Config, sets: Sets) -> list[str]:
    """A line for each step that the recipe asks for."""
    rows = sets.inputs.rows
    others = sum(shards.rows for shards in sets.leaks.values())
    if not sets.include:
        others += sum(shards.rows for shards in sets.seeds.values())
    each = IMAGE_S + PIXEL_S * PIXELS
    lines = [
        f"fingerprint {rows + others:,} images, each decoded once: about "
        f"{duration(each * (rows + others))} of one core at {PIXELS:,} pixels, "
        f"{(rows + others) * TABLE_BYTES / 2**30:.2f} GiB of tables"
    ]
    lines.append("quality     rules above; equal bytes and equal pixels collapse")
    dedup, name = config.dedup, public(config.curate.copy_embedder)
    if dedup.enabled or sets.leaks or sets.earlier:
        if dedup.threshold == "auto" and not sets.earlier:
            images, compared = (min(rows, n) for n in (dedup.calibration_images, COMPARED))
            lines.append(
                f"threshold   calibrated: all pairs of {compared:,} images, "
                f"{false_positives(config, rows):.2g} of them may pass; {images:,} images are "
                f"attacked: about {duration(COMPARED_S + ATTACKED_S * images)} of one core"
            )
        else:
            shown = sets.earlier[0].result["threshold"] if sets.earlier else dedup.threshold
            lines.append(f"threshold   {shown} (given)")
        cells = cells_for(rows, dedup.probes, DIM, dedup.cell_images)
        views = 19 if name == DESCRIPTOR else 1
        flops = 2 * DIM * rows * views * (cells + rows / max(1, cells) * dedup.probes * 1.6)
        lines.append(
            f"copies      by {name}: {cells:,} cells, {dedup.probes} probes, about "
            f"{duration(flops / FLOPS)} of one core; one of each group of copies stays"
        )
    for set_name, shards in sets.leaks.items():
        lines.append(
            f"leaks       {set_name}: {shards.rows:,} images of {public(shards.uri)}; "
            f"what goes: {config.leaks.scope}"
        )
    for one in sets.earlier:
        lines.append(f"against     {public(one.run)}: {one.result['images']:,} images are there")
    for set_name, shards in sets.seeds.items():
        lines.append(f"retrieve    like {set_name}: {shards.rows:,} images of {public(shards.uri)}")
    if config.balance.images:
        lines.append(f"balance     a sample of {config.balance.images:,} images")
    return lines
