"""The curate stage: images that are worth training on, and for each other one why it is not."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.config import Config
from pipeline.context import DESCRIPTOR, Context, result_line
from pipeline.curate.curation import Curation
from pipeline.curate.earlier import Earlier, keys_of
from pipeline.curate.models import embedder_of
from pipeline.curate.report import numbers, report
from pipeline.curate.report.pictures import pictures
from pipeline.curate.report.summary import Facts, Summary, summarise
from pipeline.curate.run import curate
from pipeline.curate.run_choose import check_clusters
from pipeline.curate.run_decide import write_shards
from pipeline.curate.sets import POOL_NAME, open_sets
from pipeline.embed.embedders import EmbedderSpec
from pipeline.embed.onnx.files import is_onnx
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.images.value_range import FULL
from pipeline.shards.shards import open_shards
from pipeline.stages.tracked import captions, pipeline_page
from pipeline.storage.run_folder import fingerprint
from pipeline.uri import Place, is_uri, public

log = logging.getLogger("pipeline.curate")

SENT_BYTES = 32 * 2**20  # of decisions that go to MLflow; larger ones stay where they are
TABLES = 2  # form of what a curation stores; a finished one of another form is curated once more
SECTIONS = ("curate", "quality", "dedup", "leaks", "retrieve", "balance", "mix")
COSTS = ("curate/seconds/", "curate/cpu_s/", "curate/peak_bytes/")  # of each step


def key(context: Context) -> str:
    """Changes with any setting of the curation and with the images of any set.

    Raises:
        PipelineError: the recipe curates nothing, or a set is not there.
    """
    config = context.config
    if not config.curate.preset:
        raise ConfigError(
            "nothing to curate: curate.preset is empty",
            "choose what to do: curate.preset=dedup takes away copies and junk",
        )
    settings = config.model_dump(mode="json", include=set(SECTIONS))
    # they change no decision: a later round's embedder is the round before
    for unused in ("query", "batch_size", "rounds", "rounds_init"):
        del settings["curate"][unused]
    del settings["quality"]["sample"]
    data = config.data
    shards = [data.shard_mb, data.row_group_images, data.max_image_pixels, context.shards_uri]
    channels = config.model.in_channels
    columns = [data.image_column, data.label_column]
    # what a place holds may change while its name does not
    vectors = [replace(spec, batch_size=1).settings for spec in embedders(config)]
    sets = open_sets(context)
    deep = sets.pool.columns.value_range
    parts = [TABLES, settings, sets.digests, shards, channels, columns, vectors, config.run.seed]
    return fingerprint(parts + [deep] * (deep != FULL))


def embedders(config: Config) -> list[EmbedderSpec]:
    """What makes the vectors: for copies, and for what an image shows.

    Raises:
        PipelineError: a field names nothing of that kind.
    """
    curate = config.curate
    embedder = curate.embedder if _selects(config) else DESCRIPTOR
    fields = {"copy_embedder": curate.copy_embedder, "embedder": embedder}
    return [embedder_of(config, f"curate.{name}", value) for name, value in fields.items()]


def _selects(config: Config) -> bool:
    """Whether images are chosen by what they show."""
    return bool(config.retrieve.seeds) or bool(config.balance.images)


def intact(context: Context) -> bool:
    """Whether the curated shards of a finished stage are still there, and the tables its own."""
    result, folder = context.folder.last("curate"), context.folder
    try:
        same = open_shards(context.shards_uri).digest == result.get("digest")
        return bool(same) and not Earlier(str(folder.uri or folder.path), result).overwritten()
    except StorageError:
        raise
    except DataError:
        return False


def steps_of(context: Context) -> Place:
    """Where the steps of the curation keep their tables."""
    return context.folder.at("curate", "steps")


def run(context: Context, tracker: Any) -> dict[str, Any]:
    """Curates; the result has the counts, what is kept and the digest of the curated shards."""
    config = context.config
    _warn(context)
    sets = open_sets(context)
    for name, digest in sets.digests.items():
        images = sets.pool.rows if name == POOL_NAME else 0
        uri, _, short = digest.rpartition(" ")
        tracker.dataset(name, short, public(uri), "curation", images)
    check_clusters(config, sets)
    curation = curate(config, sets, steps_of(context))
    tally, compared = curation.decisions.tally, curation.comparison
    threshold = compared.threshold if compared else None
    result_line("curate", tally.line())
    for line in tally.lines() if context.only else ():  # the report has them
        result_line("", line)
    summary = _summary(curation)
    page = context.folder.stage("curate") / "report.html"
    report.write(page, summary, f"Curation of {config.run.name}")
    if context.only:
        log.info("report      %s", public(context.folder.at("curate", "report.html")))
    tracker.params(params(config, tally.rows, threshold.copies if threshold else None))
    _track(tracker, curation, summary, page)
    if context.only:  # else the pipeline's page begins with what the training came to
        tracker.headline(0, {"curate/kept": summary.kept})
    _guard(context, curation)
    shards = write_shards(curation, context.shards_uri)
    tracker.dataset("curated", shards.digest, public(context.shards_uri), "curated", shards.rows)
    name = pipeline_page.name_of_images(config)
    context.tracking.tracker.dataset(
        name, shards.digest, public(context.shards_uri), "training", shards.rows
    )
    tracker.tags({"images.manifest": shards.digest, "shards": public(context.shards_uri)})
    return {
        "text": tally.line(),
        "images_in": tally.rows,
        "images": shards.rows,
        "digest": shards.digest,
        "reasons": tally.total(),
        "parts": tally.total_parts(),
        "sources": tally.reasons,
        "threshold": threshold.copies if threshold else None,
        "leak_threshold": threshold.leaks if threshold else None,
        "penalty": threshold.penalty if threshold else 0.0,
        "embedder": compared.embedded.spec.identity if compared else None,
        "copy_embedder": config.curate.copy_embedder,
        "shards": context.shards_uri,
        "against": config.curate.against,
        "value_range": sets.pool.columns.value_range,
        "steps": keys_of(curation.results),
        **curation.numbers,
    }


def _guard(context: Context, curation: Curation) -> None:
    """Ends the stage where more goes as near copies than `dedup.max_share`.

    Equal bytes and equal pixels do not count, nor do copies of what was curated earlier.
    """
    decisions, comparison = curation.decisions, curation.comparison
    near, rows = int(decisions.table.total("near")), decisions.tally.rows
    allowed = context.config.dedup.max_share
    if near <= allowed * rows:
        return
    assert comparison is not None  # without it nothing is a near copy
    enough = math.ceil(100 * near / rows) / 100
    report_file = public(context.folder.at("curate", "report.html"))
    raise DataError(
        f"{near:,} of {rows:,} images ({100 * near / rows:.1f} %) would go as near copies, more "
        f"than dedup.max_share={allowed:g}, at a similarity above "
        f"{comparison.threshold.copies:.4g}; look at them in {report_file}",
        f"if they are copies, set dedup.max_share={enough:g} and run the same command again; if "
        "not, set a higher dedup.threshold, or dedup.enabled=false",
    )


def params(config: Config, images: int, threshold: float | None) -> dict[str, Any]:
    """At most eight short ones; MLflow prints them above every picture."""
    curate, sampled = config.curate, config.balance.images
    chosen: dict[str, Any] = {
        "preset": curate.preset,
        "images": images,
        "copy_embedder": public(curate.copy_embedder),
        "threshold": f"{threshold:.4g}" if threshold is not None else "none",
        "seed": config.run.seed,
    }
    if config.retrieve.seeds or sampled:
        chosen["embedder"] = public(curate.embedder)
    if sampled:
        chosen["balanced_images"] = sampled
    if curate.against:
        chosen["against"] = public(curate.against)
    return chosen


def _warn(context: Context) -> None:
    config = context.config
    paper = config.curate.preset == "lvd142m"
    if paper and not is_onnx(config.curate.copy_embedder):
        log.warning(
            "curate.preset=lvd142m: the paper's thresholds (0.6 for copies, 0.45 for leaks) are "
            "those of SSCD vectors; with curate.copy_embedder=%s they are calibrated instead, "
            "unless the recipe sets them",
            public(config.curate.copy_embedder),
        )
    usual, dedup = type(config.dedup)(), config.dedup
    calibrates = (dedup.false_positives, dedup.calibration_images)
    if config.curate.against and calibrates != (usual.false_positives, usual.calibration_images):
        log.warning(
            "curate.against=%s: its threshold is used, so dedup.false_positives and "
            "dedup.calibration_images change nothing",
            public(config.curate.against),
        )
    if _selects(config) and config.curate.embedder == DESCRIPTOR:
        log.warning(
            "curate.embedder=descriptor tells copies, not what an image shows: retrieval and "
            "balance need a trained network, e.g. curate.embedder=runs/<name>"
        )


def _summary(curation: Curation) -> Summary:
    comparison, choice = curation.comparison, curation.choice
    threshold = comparison.threshold if comparison else None
    calibration = threshold.calibration if threshold else None
    leaks = comparison.leaks if comparison else None
    facts = Facts(
        steps=curation.results,
        calibration=calibration.to_json() if calibration else None,
        threshold=threshold.copies if threshold else None,
        leak_threshold=threshold.leaks if threshold else None,
        evaluation_sets=leaks.prints if leaks else {},
        leaked=leaks.leaked if leaks else {},
        seed_sets=choice.seeds.prints if choice else {},
        rows_in=curation.decisions.tally.rows,
        seed=curation.setup.config.run.seed,
    )
    return summarise(curation.setup.steps.root, facts, curation.folders)


def _track(tracker: Any, curation: Curation, summary: Summary, page: Path) -> None:
    values = numbers.metrics(summary)
    costs = {name: value for name, value in values.items() if name.startswith(COSTS)}
    tracker.metrics(0, costs, send=False)  # MLflow has them as a table; here a bar for each step
    tracker.metrics(0, {name: value for name, value in values.items() if name not in costs})
    for name, pixels in pictures(summary).items():
        tracker.picture(name, 0, pixels, captions.CURATION.get(name, ""))
    for name, columns in numbers.tables(summary).items():
        tracker.table(name, columns)
    tracker.note(numbers.note(summary))
    tracker.artifact(page, "curate")
    decisions = curation.decisions.table
    tracker.tags({"decisions": public(decisions.folder)})
    if not is_uri(decisions.folder) and decisions.total("bytes") <= SENT_BYTES:
        for file in curation.setup.images.files:
            tracker.artifact(Path(decisions.folder) / f"{file.name}.parquet", "curate/decisions")
