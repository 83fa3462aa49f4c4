"""What stops a job at its start: each in one function, which the job and its dry run both call.

Nothing of it needs Ray, and nothing that it writes stays.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import environment
from pipeline.config.config import Config
from pipeline.config.embedding import NEEDS_LABELS, group_of
from pipeline.context import (
    Context,
    evaluation_sources,
    nearest,
    open_packed_shards,
    open_training_shards,
    packed_uri,
    with_packed_sets,
)
from pipeline.curate.decide.shards import check_shards
from pipeline.curate.earlier import Earlier
from pipeline.curate.sets import open_earlier, open_other_sets, opened
from pipeline.embed.folder import check_folder
from pipeline.embed.vectors import is_vectors
from pipeline.errors import ConfigError, PipelineError, StorageError
from pipeline.evaluate.labels import check_deciding, check_keep, check_labels
from pipeline.evaluate.sets import KEEP
from pipeline.heartbeat import doing
from pipeline.stages import curate, embed, finetune, pack, search
from pipeline.stages.checks.known_sets import KnownSet, known_set
from pipeline.stages.checks.parts import taken_together
from pipeline.stages.checks.weights import check_weights
from pipeline.storage.places import absolute_uri, resolve_uri
from pipeline.storage.run_folder import RunFolder
from pipeline.track.settings import TrackSettings
from pipeline.uri import is_uri

log = logging.getLogger("pipeline")


def check_start(config: Config, stages: Sequence[str]) -> dict[str, KnownSet]:
    """All that can be known to be wrong before a job starts.

    Returns:
        what is known of the image sets, by the field that names them.

    Raises:
        PipelineError: the first thing that is wrong.
    """
    folder = RunFolder.of(config.run.folder, config.run.name)
    check_outputs(config, stages)
    check_place("run.folder", config.run.folder)
    if "pack" in stages and config.data.source and config.data.shards:
        check_place("data.shards", config.data.shards)
    if "curate" in stages and config.curate.shards:
        check_place("curate.shards", config.curate.shards)
    if embeds(config, stages):
        check_place("embed.vectors", embed.vectors_uri(config, folder))
        check_folder(absolute_uri(embed.vectors_uri(config, folder)))
        if config.embed.model or "pretrain" not in stages:
            embed.model_of(config, folder)
    if "search" in stages and config.search.enabled:
        search.check(config, folder, embeds(config, stages))
    if "finetune" in stages and "pretrain" not in stages:
        finetune.check(config, folder)
    check_tracking(config, folder)
    if "pretrain" in stages and config.model.encoder.startswith("module:"):
        from pipeline.stages import pretrain  # loads torch

        pretrain.check_encoder(config, folder)
    if "export" in stages and "pretrain" not in stages:
        from pipeline.stages import evaluation  # loads torch

        evaluation.chosen_in(folder, config)
    if "pretrain" in stages and config.evaluate.models:
        raise ConfigError(
            "evaluate.models names models, but a run that trains scores its own teacher",
            "leave it out, and score them side by side afterwards: jobs/evaluate.py models=[…]",
        )
    check_decides(config, stages)
    if "evaluate" in stages and "pretrain" not in stages:
        from pipeline.stages import evaluation

        evaluation.networks(config, folder)
    if "evaluate" in stages and (config.evaluate.dense or config.evaluate.dense_queries):
        from pipeline.stages import evaluation

        with doing("reading the images with masks or depth"):
            evaluation.dense_of(config)
    if config.export.onnx and "export" in stages:
        from pipeline.model.onnx_out import needs_packages  # loads torch

        needs_packages()
    if "pack" not in stages:  # what an earlier job packed
        config = with_packed_sets(config, folder)
    with doing("listing the image sets"):
        known = _known_sets(config, folder, stages)
    if "pack" in stages and {"pretrain", "evaluate"} & set(stages):
        for remark in taken_together(config):
            log.warning("%s", remark)
    if "pack" in stages:
        pack.check_places(config, folder)
    if "curate" in stages and (config.curate.preset or len(stages) == 1):
        earlier = open_earlier(config)
        seeds, _ = open_other_sets(config, packing="pack" in stages)
        if config.curate.rounds == 1 or len(stages) == 1:  # else it is trained before
            curate.embedders(config)
        if config.curate.preset and not config.curate.query:
            check_curated(config, folder, [seed.uri for seed in seeds.values()], earlier)
    images = known.get("data.shards") or known.get("data.source")
    if "pretrain" in stages and images:
        check_weights(config, folder, images)
    if {"pretrain", "evaluate"} & set(stages):
        _check_evaluation(config, known)
    if KEEP in known:
        check_keep(known[KEEP].labels)
    if "finetune" in stages and "pretrain" not in stages:
        images = known.get("data.shards") or known["data.source"]
        finetune.check_known_labels(images.labels, known.get("evaluate.queries"))
    return known


def check_decides(config: Config, stages: Sequence[str]) -> None:
    """Refuses a score that cannot choose the best checkpoint of a training, or that has no images.

    Raises:
        ConfigError: it is one.
    """
    settings = config.evaluate
    score = settings.decide_by
    if "pretrain" in stages and score and score not in settings.choosing():
        raise ConfigError(
            f"evaluate.decide_by={score} cannot choose the best checkpoint, for it is not computed "
            f"while training; these can: {', '.join(settings.choosing())}",
            "name one of them, and score the run by any other one afterwards: jobs/evaluate.py "
            f"evaluate.decide_by={score}",
        )
    if score and group_of(score) == "dense" and not settings.dense:
        raise ConfigError(
            f"evaluate.decide_by={score} needs images with masks or depth, and none are named",
            "name them with evaluate.dense=…, or choose another score",
        )


def embeds(config: Config, stages: Sequence[str]) -> bool:
    """Whether a job makes vectors: it was asked to by name, or the recipe says so."""
    return "embed" in stages and (config.embed.enabled or "pretrain" not in stages)


def check_outputs(config: Config, stages: Sequence[str]) -> None:
    """Refuses a submitted job that would write below its working directory.

    Raises:
        ConfigError: where it would: Ray deletes that directory some time after the job.
    """
    if not environment.uploaded():
        return
    places = {
        "run.folder": config.run.folder,
        "curate.shards": config.curate.shards,
        "embed.vectors": config.embed.vectors,
    }
    if "pack" in stages and config.data.source:
        places["data.shards"] = config.data.shards
    copy = Path.cwd()
    for field, place in places.items():
        if place and not is_uri(place) and (copy / place).is_relative_to(copy):
            raise ConfigError(
                f"{field}={place} is in the copy of the project that Ray made for this job, which "
                "is deleted some time after it",
                f"give storage that all nodes share: {field}=s3://bucket/… or an absolute path",
            )


def check_place(field: str, place: str) -> None:
    """Refuses a local place where no folder can be made or written. What is tried leaves nothing.

    Raises:
        PipelineError: why not; also where a URI cannot be opened.
    """
    hint = f"give {field} a folder that this user may write in"
    try:
        there = nearest(place)
        if there is None:
            resolve_uri(place)
            return
        if not there.is_dir():
            raise PipelineError(f"{field}={place} cannot be a folder: {there} is a file", hint)
        Path(tempfile.mkdtemp(prefix=".raydino-", suffix=".tmp", dir=there)).rmdir()
    except StorageError:
        raise  # says what to do
    except OSError as error:
        raise PipelineError(f"{field}={place} cannot be written: {error.strerror}", hint) from None


def check_curated(
    config: Config, folder: RunFolder, seeds: Sequence[str], earlier: Sequence[Earlier]
) -> None:
    """Refuses a folder of curated shards that holds what others wrote, or that others write to.

    Args:
        config: the recipe.
        folder: of the run.
        seeds: addresses of the seed sets.
        earlier: curations that the images are added to, the latest first.

    Raises:
        DataError: whose it is.
    """
    sets = [packed_uri(config, folder), *(seeds if config.retrieve.include else ())]
    sets += [str(one.result["shards"]) for one in earlier[:1]]
    context = Context(config, folder)
    check_shards(context.shards_uri, curate.steps_of(context), [absolute_uri(s) for s in sets])


def check_tracking(config: Config, folder: RunFolder) -> None:
    """Refuses an address that is none of an MLflow server. No server is asked or started.

    Raises:
        PipelineError: what is wrong with it.
    """
    if config.track.enabled:
        TrackSettings(str(folder.path), "pipeline", uri=config.track.uri).endpoint()


def _known_sets(config: Config, folder: RunFolder, stages: Sequence[str]) -> dict[str, KnownSet]:
    """The image sets of the stages, by field.

    Raises:
        PipelineError: one is not there, or cannot be used.
    """
    sets: dict[str, KnownSet] = {}
    packing = "pack" in stages
    packed = packing and pack.finished(config, folder)
    if packing and config.data.source:
        sets["data.source"] = known_set(config, "data.source", config.data.source, packed)
    elif {"curate", "doctor", "embed", "finetune"} & set(stages):
        sets["data.shards"] = KnownSet.of("data.shards", open_packed_shards(config, folder))
    elif _compares(config, stages) and _trains_or_votes(config, stages):
        sets["data.shards"] = KnownSet.of("data.shards", open_training_shards(config, folder))
    if not ({"pack", "curate", "finetune"} & set(stages) or _compares(config, stages)):
        return sets
    for name, uri in evaluation_sources(config).items():
        field = pack.FIELDS[name]
        if field == KEEP and not {"pack", "pretrain"} & set(stages):
            continue
        if field != KEEP and is_vectors(uri):
            continue
        if packing:
            sets[field] = known_set(config, field, uri, packed)
        else:
            sets[field] = KnownSet.of(field, opened(config, field, uri))
    return sets


def _compares(config: Config, stages: Sequence[str]) -> bool:
    """Whether a k-NN is computed: files in ONNX are compared by theirs too."""
    onnx = config.export.onnx and "export" in stages
    return onnx or bool({"pretrain", "evaluate"} & set(stages))


def _trains_or_votes(config: Config, stages: Sequence[str]) -> bool:
    """Whether the training shards are needed: not where named models are scored on named images."""
    evaluation = config.evaluate
    named = evaluation.models or (evaluation.reference and is_vectors(evaluation.reference))
    others = evaluation.reference or (evaluation.dense and not evaluation.queries)
    return bool({"pretrain", "export"} & set(stages)) or not (named and others)


def voting(known: Mapping[str, KnownSet]) -> KnownSet | None:
    """The set that votes: the reference, else the training images."""
    fields = ("evaluate.reference", "data.shards", "data.source")
    return next((known[field] for field in fields if field in known), None)


def check_scored(config: Config) -> None:
    """Refuses a recipe whose sets cannot be scored, as far as it shows before they are packed.

    Raises:
        PipelineError: what is wrong with which set.
    """
    sets = {"train": config.data.source, **evaluation_sources(config)}
    fields = {pack.FIELDS[name]: uri for name, uri in sets.items()}
    known = {
        field: known_set(config, field, uri)
        for field, uri in fields.items()
        if field in ("data.source", KEEP) or not is_vectors(uri)
    }
    _check_evaluation(config, known)
    if KEEP in known:
        check_keep(known[KEEP].labels)


def _check_evaluation(config: Config, known: Mapping[str, KnownSet]) -> None:
    queries, reference = known.get("evaluate.queries"), voting(known)
    score = config.evaluate.decide_by
    if queries and reference:
        check_labels(queries.labels, reference.labels)
    elif reference and score and group_of(score) in NEEDS_LABELS:
        check_deciding(score, reference.labels)
