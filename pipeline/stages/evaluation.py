"""What a recipe asks an evaluation to score, and on what: models, sets, groups of scores."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

from pipeline.card.dense.opening import looks_dense, open_dense_set
from pipeline.card.dense.sets import DenseSet
from pipeline.card.dense.split import DenseSettings
from pipeline.card.inputs.networks import Network, Opening, networks_of, short_names
from pipeline.card.inputs.ranges import check_ranges
from pipeline.card.inputs.sets import EvaluationSet, Sets, check_sets, open_set
from pipeline.card.scoring.request import Dense, Request
from pipeline.card.scoring.scores import Scoring
from pipeline.config.config import Config
from pipeline.config.embedding import group_of
from pipeline.context import Context, open_training_shards, source_of, with_packed_sets
from pipeline.embed.embedders import EmbedderSpec
from pipeline.embed.vectors import VectorSet, is_vectors, open_vectors
from pipeline.errors import ConfigError, TrainError
from pipeline.evaluate.sets import TRAINING_SHARDS
from pipeline.images.value_range import AUTO
from pipeline.model.pair import Encoder
from pipeline.plan.plan import Plan
from pipeline.plan.resume import plan_of
from pipeline.stages import pack
from pipeline.stages.checks.chosen_from import with_choices
from pipeline.stages.checks.known_sets import of_runs
from pipeline.storage.places import exists, resolve_uri
from pipeline.storage.run_folder import RunFolder
from pipeline.train.checkpoint import state
from pipeline.train.start import encoder_of
from pipeline.uri import parent, public

log = logging.getLogger("pipeline.evaluate")
JOB = ["pack", "evaluate"]
# For a run's own teacher: what costs seconds beside its training. Linear layers cost minutes.
IN_CHAIN = ("knn", "logistic", "few_shot", "retrieval", "copies", "unlabelled", "dense")
ALL = (*IN_CHAIN, "linear")
ASKED_AT_MOST = 50_000  # training images that are asked one by one, where no queries are named
NAMED = 2  # models in a title
UNLABELLED_AT_MOST = 25_600  # images of scores that need no labels (RankMe, section 3)


# ---- The run's own model.


def chosen(context: Context) -> state.Saved:
    """The checkpoint that `export.checkpoint` means.

    Raises:
        TrainError: where the run has none.
    """
    return chosen_in(context.folder, context.config)


def chosen_in(run: RunFolder, config: Config) -> state.Saved:
    """As `chosen`, before a stage starts."""
    folder = run.checkpoints
    best = state.best(folder) if config.export.checkpoint == "best" else None
    saved = best[0] if best else state.latest(folder)
    if saved is None:
        raise TrainError(
            f"run {run.path.name} has no checkpoint in {public(folder)}",
            "pretrain first, or name the run with run.name=…; jobs/evaluate.py and "
            "jobs/finetune.py take any model that is named: model=…",
        )
    return saved


def has_checkpoint(run: RunFolder) -> bool:
    """Whether a run has trained."""
    return state.latest(run.checkpoints) is not None


def trained_plan(saved: state.Saved) -> Plan:
    """The plan that a checkpoint was trained with; today's recipe may differ."""
    return plan_of(saved.meta, saved.path)


def teacher(saved: state.Saved) -> Encoder:
    """The teacher of a checkpoint, heads included."""
    return encoder_of(saved)[0]


# ---- What the command line means.


def is_own(config: Config) -> bool:
    """Whether the run's own teacher is scored: no model and no vectors are named."""
    return not config.evaluate.models and not vectors_given(config)


def vectors_given(config: Config) -> str:
    """Where the vectors are that are scored; "" where images are named, or nothing."""
    reference = config.evaluate.reference
    return reference if reference and is_vectors(reference) else ""


def asked_for(config: Config, folder: RunFolder, stages: Sequence[str]) -> tuple[Config, list[str]]:
    """The recipe and stages of `jobs/evaluate.py`, which packs evaluation sets and nothing else;
    those of other jobs as they are.

    Raises:
        ConfigError: there is nothing to evaluate on.
    """
    if list(stages) != JOB:
        return config, list(stages)
    config = of_runs(config)
    source, settings = config.data.source, config.evaluate
    reference = settings.reference
    if reference and not settings.dense and looks_dense(reference):
        log.info("evaluate    %s has masks or depth: dense scores are of it", public(reference))
        named = {"dense": reference, "dense_queries": settings.queries}
        settings = settings.model_copy(update={**named, "reference": "", "queries": ""})
        config = config.model_copy(update={"evaluate": settings})
    if not is_own(config) and not settings.reference and not _has_shards(config, folder):
        if not source and not settings.dense:
            raise ConfigError(
                "there is nothing to evaluate on",
                "name images: data=photos/ (with a folder for each class, where there are "
                "classes), packed shards, or vectors of jobs/embed.py",
            )
        settings = settings.model_copy(update={"reference": source})
    config = config.model_copy(update={"evaluate": settings})
    data = config.data.model_copy(update={"source": ""})
    guard = config.guard.model_copy(update={"keep": ""})  # for trainings alone
    packing = config.model_copy(update={"data": data, "guard": guard})
    packed_before = is_own(config) or "train" in folder.last("pack")
    if packed_before and not pack.named_sources(with_packed_sets(packing, folder), folder):
        return config, ["evaluate"]  # what the chain of this run packed stays as it is
    if not pack.named_sources(packing, folder):
        return config, ["evaluate"]
    return packing, JOB


def _has_shards(config: Config, folder: RunFolder) -> bool:
    return bool(config.data.shards) or exists(*resolve_uri(str(folder.at("shards"))))


# ---- Models.


def networks(config: Config, folder: RunFolder) -> list[Network]:
    """The models that are scored, each followed by what it began as.

    Raises:
        PipelineError: there is no such model.
    """
    settings = config.evaluate
    vectors = vectors_given(config)
    if vectors and settings.models:
        raise ConfigError(
            f"evaluate.reference={public(vectors)} holds vectors of a model, and evaluate.models "
            f"names {', '.join(map(public, settings.models))}",
            "leave model= out to score the model of the vectors, or give images: data=photos/",
        )
    if vectors:
        return [_of_vectors(open_vectors(vectors, "evaluate.reference"))]
    models = settings.models or (str(chosen_in(folder, config).path),)
    augment = config.augment
    opening = Opening(
        settings.image_size, settings.batch_size, augment.mean, augment.std, config.run.folder
    )
    return networks_of(models, opening)


def _of_vectors(vectors: VectorSet) -> Network:
    """The model of a table of vectors, which is not opened."""
    facts = vectors.facts
    spec = EmbedderSpec(
        str(facts["kind"]),
        name=str(facts["model"]),
        digest=str(facts["digest"]),
        image_size=facts["image_size"],
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        half=facts["precision"] == "bfloat16",
    )
    return Network("model", short_names([spec.name])[0], "", spec)


# ---- Sets.


def sets_of(config: Config, folder: RunFolder, models: Sequence[Network]) -> Sets | None:
    """The sets that vectors are scored on; None where only dense images are named.

    Raises:
        PipelineError: a set is not there, or cannot be compared with the other or with a model.
    """
    settings, data = config.evaluate, config.data
    columns = (data.image_column, data.label_column)
    if only_dense(config, folder):
        return None
    if settings.reference:
        reference = _opened("reference", settings.reference, columns, folder)
    else:
        shards = open_training_shards(config, folder)
        reference = EvaluationSet(TRAINING_SHARDS, shards.uri, shards)
    queries = None
    if settings.queries:
        queries = _opened("queries", settings.queries, columns, folder)
    sets = check_sets(reference, queries)
    if not sets.from_vectors and data.range == AUTO:
        check_ranges(sets, models, is_own(config))
    return _bounded(sets)


def _opened(name: str, uri: str, columns: tuple[str, str], folder: RunFolder) -> EvaluationSet:
    """A set, called as the user named it where this run has packed it."""
    own = str(parent(uri)[0]) == str(folder.at("pack"))
    source = source_of(uri) if own else ""
    return open_set(f"evaluate.{name}", uri, columns, source)


def _bounded(sets: Sets) -> Sets:
    """Sets of millions of images without queries are sampled: what is asked is all of them."""
    reference = sets.reference
    if sets.queries is not None or reference.shards is None:
        return sets
    own = reference.field == TRAINING_SHARDS
    limit = (ASKED_AT_MOST if own else None) if sets.labelled else UNLABELLED_AT_MOST
    if limit is None:
        return sets
    return Sets(reference.first(limit))


def only_dense(config: Config, folder: RunFolder) -> bool:
    """Whether models are scored on dense images alone."""
    settings = config.evaluate
    named = settings.reference or settings.queries
    return bool(
        settings.dense and settings.models and not named and not _has_shards(config, folder)
    )


def dense_of(config: Config) -> Dense | None:
    """What dense scores are of; None where no dense images are named.

    Raises:
        DataError: there is no such set, or none of its images can be used.
    """
    settings = config.evaluate
    if not settings.dense:
        if settings.dense_queries:
            raise ConfigError(
                "evaluate.dense_queries is set, but evaluate.dense is not: heads are fitted to it",
                "name images with masks or depth: evaluate.dense=…",
            )
        return None
    queries = settings.dense_queries
    return Dense(
        _dense_set(settings.dense, "evaluate.dense", settings.void),
        _dense_set(queries, "evaluate.dense_queries", settings.void) if queries else None,
        DenseSettings(settings.dense_size or settings.image_size, seed=config.run.seed),
    )


@lru_cache(4)  # each image of it is read, and it is asked for with the key and with the run
def _dense_set(uri: str, field: str, void: tuple[int, ...]) -> DenseSet:
    return open_dense_set(uri, field, void)


# ---- All of it.


def groups_of(config: Config) -> tuple[str, ...]:
    """The groups of scores: those named; else for the run's own teacher what is cheap beside its
    training, in a whole chain and after it, and for models that are named all. The one that
    `evaluate.decide_by` is of is always among the latter.
    """
    settings = config.evaluate
    if settings.scores:
        return settings.scores
    decides = {group_of(settings.decide_by)} if settings.decide_by else set()
    default: tuple[str, ...] = IN_CHAIN if is_own(config) else ALL
    return (*default, *sorted(decides - set(default)))


def request_of(context: Context) -> Request:
    """What the recipe asks for.

    Raises:
        PipelineError: models or sets are not there, or do not fit each other.
    """
    config, folder = context.config, context.folder
    models = networks(config, folder)
    sets = sets_of(config, folder, models)
    settings = config.evaluate
    named = [one.name for one in models if one.role == "model"]
    whose = " and ".join(named) if len(named) <= NAMED else f"{len(named)} models"
    request = Request(
        tuple(models),
        sets,
        folder.at("evaluate"),
        groups_of(config),
        Scoring(settings.k, settings.temperature, config.run.seed),
        dense_of(config),
        settings.decide_by,
        title=f"Evaluation of {whose}",
        max_pixels=config.data.max_image_pixels,
        gpu=_gpu(config, folder),
        remarks=(*sampled(sets), *_unread(sets, folder)),
    )
    if is_own(config) and config.export.checkpoint == "last":
        return request  # not chosen, even where it happens to be the best
    return with_choices(request)


def _unread(sets: Sets | None, folder: RunFolder) -> list[str]:
    """A sentence on each set that not all files of its source are in."""
    shards = {what: one.shards for what, one in sets.each.items() if one.shards} if sets else {}
    return [
        f"files of the {what}: {text}"
        for what, one in shards.items()
        if (text := pack.unread_of(folder, one.uri))
    ]


def _gpu(config: Config, folder: RunFolder) -> bool:
    if is_own(config):
        return trained_plan(chosen_in(folder, config)).device == "cuda"
    return config.train.device != "cpu"


def sampled(sets: Sets | None) -> tuple[str, ...]:
    """A sentence where not all images of a set are scored."""
    shards = sets.reference.shards if sets and not sets.queries else None
    if sets is None or shards is None:
        return ()
    whole = sets.reference.whole
    sample = (
        f"{shards.rows:,} of {whole:,} images are scored, the first by the hashes of their bytes"
    )
    return (sample,) if whole else ()
