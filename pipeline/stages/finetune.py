"""The finetune stage: a classifier from labelled shards, its accuracy, and its weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from pipeline.config.config import Config
from pipeline.context import Context, packed_uri, result_line
from pipeline.driver import cluster
from pipeline.embed.embedders import BACKBONE, EmbedderSpec, embedder_of
from pipeline.embed.forward import own_size
from pipeline.errors import ConfigError, DataError, PipelineError, StorageError, TrainError
from pipeline.evaluate.labels import Labels, check_labels
from pipeline.evaluate.score import Score
from pipeline.finetune.classifier import Classifier, classifier_of, described
from pipeline.finetune.export import CLASSES, export, form_of
from pipeline.finetune.rows import Split, split_of
from pipeline.finetune.run import check_resume, finetune, layout_of, precision_of, write_bad
from pipeline.finetune.settings import Settings, steps_of, steps_per_epoch
from pipeline.finetune.worker import Task
from pipeline.heartbeat import now
from pipeline.model.low_rank import merge_low_rank
from pipeline.shards.shard_set import ShardSet
from pipeline.shards.shards import open_shards
from pipeline.stages.checks.known_sets import KnownSet
from pipeline.stages.embed import of_model_range
from pipeline.stages.evaluation import chosen_in
from pipeline.storage.run_folder import RunFolder, fingerprint
from pipeline.uri import public

log = logging.getLogger("pipeline.finetune")
TUNED = {"all": "all weights", "head": "head only", "low_rank": "low-rank"}
# fields of the recipe that settings do not have as they are
RESOLVED = (
    "model",
    "epochs",
    "steps",
    "layerwise_decay",
    "label_fraction",
    "image_size",
    "precision",
)
Sets = tuple[ShardSet, ShardSet | None]  # what is trained on, what is scored


def model_of(config: Config, folder: RunFolder) -> EmbedderSpec:
    """What is fine-tuned: the model of the recipe, else the run's own chosen teacher.

    Raises:
        PipelineError: there is none, or it has no weights that could learn.
    """
    settings = config.finetune
    model = settings.model or str(chosen_in(folder, config).path)
    try:
        spec = embedder_of(
            model,
            image_size=settings.image_size,
            mean=config.augment.mean,
            std=config.augment.std,
            folder=config.run.folder,
        )
    except StorageError:
        raise
    except PipelineError as error:
        raise ConfigError(f"finetune.model: {error.what}", error.hint) from error
    if spec.kind != BACKBONE:
        raise ConfigError(
            f"{spec.name} cannot be fine-tuned: torch has no weights of it that could learn",
            "give a run, weights in one of the three formats, or timm:<name>",
        )
    return spec


def check(config: Config, folder: RunFolder) -> None:
    """Refuses what can be known to be wrong before anything starts.

    Raises:
        PipelineError: what it is.
    """
    if config.data.labels == "none":
        raise ConfigError(
            "data.labels=none leaves the labels out, and fine-tuning learns from them",
            "leave data.labels out: folders are classes, and label columns are read",
        )
    model_of(config, folder)


def check_known_labels(images: Labels, queries: KnownSet | None) -> None:
    """Refuses sets from which no classifier can learn, as far as it shows before they are packed.

    Raises:
        DataError: why not.
    """
    if images.kind == "none":
        raise DataError(
            f"{images.place} has no labels, and fine-tuning learns from them",
            "put its images into one folder for each class, or name the label column with "
            "data.label_column=…",
        )
    if queries is not None:
        check_labels(queries.labels, images)


def sets_of(config: Config, folder: RunFolder, spec: EmbedderSpec) -> Sets:
    """The images to train on and to score, decoded with the range of values that the model knows.

    Raises:
        DataError: one is not there, or the two cannot be compared by their labels.
    """
    data = config.data
    images = open_shards(packed_uri(config, folder), data.image_column, data.label_column)
    images = of_model_range(config, images, spec)
    if not config.evaluate.queries:
        return images, None
    uri, field = config.evaluate.queries, "evaluate.queries"
    queries = open_shards(uri, data.image_column, data.label_column, field)
    check_labels(Labels.of(field, queries), Labels.of("data.shards", images))
    return images, replace(queries, value_range=images.value_range)


def key(context: Context) -> str:
    """Changes with the model, the images and all that the classifier depends on."""
    config = context.config
    spec = model_of(config, context.folder)
    sets = sets_of(config, context.folder, spec)
    digests = [[s.digest, s.label_column, s.columns.value_range] for s in sets if s]
    fields = config.finetune.model_dump(mode="json", exclude={"model"})
    return fingerprint([spec.digest, spec.image_size, spec.mean, spec.std, digests, fields])


def intact(context: Context) -> bool:
    """Whether what a finished stage wrote is still there."""
    place = context.folder.path / "finetune" / str(context.folder.last("finetune").get("form"))
    return all((place / name).is_file() for name in ("model.safetensors", "config.json", CLASSES))


def run(context: Context, tracker: Any) -> dict[str, Any]:
    """Fine-tunes or goes on; the result has status `finished` or `stopped`."""
    config, folder = context.config, context.folder
    spec = model_of(config, folder)
    now("finetune: reading ids and labels")
    images, queries = sets_of(config, folder, spec)
    split = split_of(
        ("data.shards", images),
        ("evaluate.queries", queries) if queries else None,
        config.finetune.label_fraction,
        config.finetune.seed,
    )
    for remark in split.remarks:
        log.warning("finetune: %s", remark)
    batch_size = config.finetune.batch_size
    layout, precision = cluster.with_room(
        lambda machine: (
            (layout := layout_of(config, machine, min(batch_size, len(split.training)))),
            precision_of(config, machine, layout.device),
        ),
        config.resources.wait_s,
    )
    settings = settings_of(config, spec, len(split.training), precision, split.digest)
    classifier = classifier_of(_loaded(spec), len(split.class_names), settings)
    form = form_of(classifier)  # before it is trained
    check_resume(settings, folder.at("finetune", "checkpoints"))
    for line in _described(settings, split, classifier):
        log.info("%s", line)
    log.info("workers     %d, %s, %s", layout.workers, layout.device, settings.precision)
    del classifier
    tracker.dataset("train", images.digest, public(images.uri), "training", images.rows)
    tracker.params(_params(settings, split))
    assert spec.load is not None  # of a backbone, always
    task = Task(
        settings,
        spec.load,
        images,
        split,
        config.data.max_image_pixels,
        config.data.max_bad_fraction,
        config.train.log_every,
    )
    outcome = finetune(task, layout, folder, config.train.max_restarts, tracker)
    if outcome["status"] == "stopped":
        return {"text": f"stopped at step {outcome['step']}", **outcome}
    now("finetune: exporting")
    value_range = images.columns.value_range
    place = folder.path / "finetune" / form
    trained = trained_classifier(spec, settings, len(split.class_names), folder)
    compared = export(trained, split.class_names, settings, value_range, place)
    bad = outcome["bad"] | outcome["bad_queries"]
    write_bad(folder, bad)
    score = Score.of_hits("finetune_top1", outcome["hits"], outcome["ids"])
    interval, majority = score.interval(), split.majority(outcome["ids"])
    text = (
        f"{'from scratch' if settings.from_scratch else 'fine-tuned'} ({TUNED[settings.tune]}) "
        f"{interval.value:.3f} ± {interval.margin:.3f} on {len(outcome['hits']):,} "
        f"{'' if queries else 'held-out '}images; majority class {majority:.3f}"
    )
    if bad:
        count = f"{len(bad):,} image{'s' * (len(bad) != 1)}"
        text += f"; {count} could not be decoded, listed in finetune/bad.parquet"
    result_line("finetune", text)
    result_line("weights", f"{public(folder.at('finetune', form))}: {compared}")
    numbers = {"eval/finetune_top1": interval.value, "eval/finetune_top1_majority": majority}
    tracker.metrics(settings.steps, numbers)
    tracker.headline(settings.steps, numbers)
    tracker.artifact(place / CLASSES, "classifier")
    tracker.artifact(place / "config.json", "classifier")
    notes = [text, *split.remarks, f"Weights: {compared}."]
    if not settings.from_scratch:
        notes.append(
            "What the pretraining is worth: the same from random weights, with "
            "finetune.from_scratch=true under another run.name."
        )
    tracker.note("\n\n".join(notes))
    return {
        "text": text,
        "status": "finished",
        "form": form,
        "weights": public(folder.at("finetune", form)),
        "finetune_top1": interval.value,
        "interval": [interval.low, interval.high],
        "majority": majority,
        "images": len(split.training),
        "queries": len(outcome["hits"]),
        "classes": len(split.class_names),
        "steps": settings.steps,
        "bad": len(bad),
        "remarks": list(split.remarks),
        "train_top1": outcome["scalars"].get("finetune/train_top1"),
    }


def describe(config: Config, folder: RunFolder, images: int) -> str:
    """For a dry run: opens the network, and says what would be done with how many images.

    Args:
        config: the recipe.
        folder: of the run.
        images: about, before those without a label and the queries are left out; 0: unknown.

    Raises:
        PipelineError: the network cannot be fine-tuned or exported.
    """
    spec, finetune = model_of(config, folder), config.finetune
    settings = settings_of(config, spec, max(1, images), "float32")
    classifier = classifier_of(_loaded(spec), 2, settings)
    form = form_of(classifier)
    length = f"{finetune.steps or settings.steps:,} steps"
    return (
        f"{public(spec.name)} ({TUNED[settings.tune]}) on "
        f"{f'at most {images:,} images' if images else 'images that are not counted yet'} of "
        f"{settings.image_size} pixels"
        f"{f', about {length}' if images or finetune.steps else ''}; written as {form}"
    )


def settings_of(
    config: Config, spec: EmbedderSpec, images: int, precision: Any, digest: str = ""
) -> Settings:
    """What follows from the recipe, the model, the number of images and their digest."""
    finetune = config.finetune
    return Settings(
        model=spec.name,
        digest=spec.digest,
        steps=steps_of(finetune.epochs, finetune.steps, images, finetune.batch_size),
        image_size=spec.image_size or own_size(_loaded(spec)),
        precision=precision,
        images=digest,
        # lower layers that were trained change little; drawn anew they have all to learn
        layerwise_decay=finetune.layerwise_decay or (1.0 if finetune.from_scratch else 0.75),
        mean=tuple(spec.mean),
        std=tuple(spec.std),
        **finetune.model_dump(exclude=set(RESOLVED)),
    )


def trained_classifier(
    spec: EmbedderSpec, settings: Settings, classes: int, folder: RunFolder
) -> Classifier:
    """The classifier of the last checkpoint, merged, on the CPU in evaluation mode.

    Raises:
        TrainError: its checkpoint is gone.
    """
    saved = check_resume(settings, folder.at("finetune", "checkpoints"))
    if saved is None:
        raise TrainError("the checkpoint of the fine-tuning is gone", "run the same command again")
    classifier = classifier_of(_loaded(spec), classes, settings)
    loaded = classifier.load_state_dict(saved.load()["classifier"], strict=False)
    if loaded.unexpected_keys:
        raise TrainError(
            f"checkpoint {public(saved.path)} holds {loaded.unexpected_keys[0]}, which this "
            "version of raydino calls otherwise",
            "export it with the version that wrote it, or fine-tune again under another run.name",
        )
    merge_low_rank(classifier.backbone)
    return classifier.eval()


def _loaded(spec: EmbedderSpec) -> Any:
    assert spec.load is not None  # of a backbone, always
    return spec.load()


def _described(settings: Settings, split: Split, classifier: Classifier) -> list[str]:
    images = len(split.training)
    epoch = steps_per_epoch(images, settings.batch_size)
    drawn = ", weights drawn anew" if settings.from_scratch else ""
    return [
        f"model       {public(settings.model)}{drawn}: {described(classifier)} "
        f"({TUNED[settings.tune]})",
        f"data        {images:,} images of {len(split.class_names):,} classes to train on, "
        f"{len(split.queries):,} to score, {settings.image_size} pixels",
        f"steps       {settings.steps:,} x {min(settings.batch_size, images)}, "
        f"{settings.steps / epoch:.1f} epochs, warm-up {settings.warmup_steps}, "
        f"lr {settings.lr:.3g}",
    ]


def _params(settings: Settings, split: Split) -> dict[str, Any]:
    """At most eight short ones; MLflow prints them above every picture."""
    return {
        "model": public(settings.model),
        "tune": settings.tune + (" from scratch" if settings.from_scratch else ""),
        "images": len(split.training),
        "classes": len(split.class_names),
        "steps": settings.steps,
        "batch": settings.batch_size,
        "lr": f"{settings.lr:.3g}",
        "seed": settings.seed,
    }
