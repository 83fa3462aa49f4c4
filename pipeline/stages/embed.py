"""The embed stage: a table of vectors of the images, of any model, for search and for other tools.

`jobs/embed.py` packs its source first, like every run, so that vectors and images stay together:
whoever has the vectors of an image finds its bytes by its id.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.config.config import Config
from pipeline.context import Context, packed_uri, result_line, shards_uri, size_of
from pipeline.embed.embedders import EmbedderSpec, embedder_of, open_embedder
from pipeline.embed.run import Report, Request, embed_set
from pipeline.embed.vectors import MARK, open_vectors, shape_in
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.images.value_range import AUTO, shown
from pipeline.plan.plan import evaluation_size
from pipeline.shards.set_range import other_range
from pipeline.shards.shards import ShardSet, open_shards
from pipeline.stages.evaluation import chosen_in
from pipeline.storage.places import list_files, resolve_uri
from pipeline.storage.run_folder import RunFolder, fingerprint
from pipeline.storage.transfer import read_mark
from pipeline.train.start import checkpoint_at
from pipeline.uri import public

BYTES = {"float32": 4, "float16": 2}
ABOUT = 100  # bytes of an image's id, source, label and row


def model_of(config: Config, folder: RunFolder) -> EmbedderSpec:
    """What makes the vectors: the model of the recipe, else the run's own chosen teacher.

    Raises:
        PipelineError: there is nothing of that kind.
    """
    embed = config.embed
    model = embed.model
    if not model:  # the run, not its checkpoint, which may be pruned: search opens it by this name
        own, run = chosen_in(folder, config).path, str(folder.at())
        named = checkpoint_at(run)
        model = run if named and str(named.path) == str(own) else str(own)
    scored = None if embed.model else config.evaluate.own_image_size
    return embedder_of(
        model,
        image_size=embed.image_size or scored,
        batch_size=embed.batch_size,
        mean=config.augment.mean,
        std=config.augment.std,
        half=embed.precision == "bfloat16",
        folder=config.run.folder,
    )


def images_of(config: Config, folder: RunFolder, spec: EmbedderSpec) -> ShardSet:
    """The images, with the range of values that the model knows.

    Raises:
        DataError: they are not there, or their values are others than the model was trained with.
    """
    data = config.data
    curated = config.embed.images == "curated"
    if curated and not config.curate.preset:
        raise ConfigError(
            "embed.images=curated, but the recipe curates nothing",
            "set curate.preset, or embed.images=all",
        )
    uri = (shards_uri if curated else packed_uri)(config, folder)
    labels = data.labels != "none"
    shards = open_shards(uri, data.image_column, data.label_column, labels=labels)
    return of_model_range(config, shards, spec)


def of_model_range(config: Config, shards: ShardSet, spec: EmbedderSpec) -> ShardSet:
    """A set that is decoded with the range of values that a model knows, or that the recipe names.

    Raises:
        DataError: its values are others than the model was trained with.
    """
    if config.data.range != AUTO:
        return replace(shards, value_range=config.data.range)
    own = other_range(shards, spec.value_range, len(spec.mean))
    if own is not None:
        raise DataError(
            f"{public(shards.uri)} holds values of {shown(own)}, {spec.name} was trained with "
            f"{shown(spec.value_range)}: what it says of these images would mean nothing",
            "take a model that was trained on such images, or say which values become 0 and 255: "
            "data.range=[low,high]",
        )
    return replace(shards, value_range=spec.value_range)


def request_of(context: Context) -> Request:
    """What the recipe asks for.

    Raises:
        PipelineError: the model or the images are not there, or do not fit each other.
    """
    config, embed = context.config, context.config.embed
    spec = model_of(config, context.folder)
    shards = images_of(config, context.folder, spec)
    return Request(
        spec,
        shards,
        embed.outputs,
        embed.blocks,
        embed.dtype,
        config.data.max_image_pixels,
        config.data.max_bad_fraction,
        gpu=config.train.device != "cpu",
    )


def vectors_uri(config: Config, folder: RunFolder) -> str:
    """Where the vectors go."""
    return config.embed.vectors or str(folder.at("vectors"))


def key(context: Context) -> str:
    """Changes with the model, the images and all that the vectors depend on."""
    return fingerprint([request_of(context).key, vectors_uri(context.config, context.folder)])


def intact(context: Context) -> bool:
    """Whether the parts of a finished stage are still there."""
    result = context.folder.last("embed")
    try:
        vectors = open_vectors(vectors_uri(context.config, context.folder))
    except StorageError:
        raise
    except DataError:
        return False
    fs, path = resolve_uri(vectors.uri)
    names = {info.base_name for info in list_files(fs, path, recursive=False)}
    return vectors.key == result.get("vectors_key") and names >= {name for name, _ in vectors.parts}


def run(context: Context, tracker: Any) -> dict[str, Any]:
    """Embeds; the result has the counts and where the vectors are."""
    request = request_of(context)
    uri = vectors_uri(context.config, context.folder)
    shards = request.shards
    tracker.dataset("images", shards.digest, public(shards.uri), "embedding", shards.rows)
    report = embed_set(request, uri, context.folder.at("embed", "bad.parquet"))
    vectors, bad = report.vectors, report.bad
    text = _sentence(report, uri, size_on_disk(uri))
    result_line("embed", text)
    facts = vectors.facts
    shown_facts = ("model", "image_size", "dim", "dtype", "precision")
    tracker.params({name: facts[name] for name in shown_facts} | {"images": vectors.rows})
    numbers: dict[str, float] = {"embed/images": vectors.rows, "embed/bad_images": bad}
    if report.embedded:
        numbers["embed/images_per_s"] = round(report.images_per_s, 1)
        numbers["embed/model_wait_fraction"] = round(report.pace.waiting, 4)
    tracker.metrics(0, numbers)
    tracker.tags({"vectors": public(uri), "model.digest": facts["digest"]})
    tracker.note(text)
    return {
        "text": text,
        "images": vectors.rows,
        "bad": bad,
        "vectors": uri,
        "vectors_key": vectors.key,
        "dim": vectors.dim,
        "model": facts["model"],
        **{name.removeprefix("embed/"): value for name, value in numbers.items()},
    }


def _sentence(report: Report, uri: str, size: float) -> str:
    vectors, bad = report.vectors, report.bad
    shapes = ", ".join(f"{name} {shape}" for name, shape in shapes_of(vectors.facts).items())
    text = f"{vectors.rows:,} images by {public(vectors.facts['model'])}: {shapes}; "
    text += f"{size_of(size)} in {public(uri)}"
    if bad:
        text += f"; {bad:,} could not be decoded, listed in embed/bad.parquet"
    if report.embedded:
        text += f"; {report.images_per_s:,.0f} images/s, "
        text += f"the model waited {100 * report.pace.waiting:.0f} % of its time for images"
    return text


def replaced_model(config: Config, folder: RunFolder) -> str:
    """For a dry run: the model whose vectors a job would replace by those of another one; empty
    where it would not.
    """
    fs, path = resolve_uri(vectors_uri(config, folder))
    mark = read_mark(fs, f"{path}/{MARK}")
    if not mark or mark.get("digest") == model_of(config, folder).digest:
        return ""
    return public(str(mark.get("model")))


def shapes_of(facts: dict[str, Any]) -> dict[str, str]:
    """`[384]` or `[256, 384]` of each output of a table."""
    return {name: str(list(shape_in(facts, name))) for name in facts["outputs"]}


def size_on_disk(uri: str) -> float:
    """Bytes of the parts of a table."""
    fs, path = resolve_uri(uri)
    return float(sum(info.size for info in list_files(fs, path, recursive=False)))


def bytes_of_row(config: Config, dim: int, patches: int) -> float:
    """What an image takes in the table, about.

    Args:
        config: the recipe.
        dim: width of the vectors.
        patches: of an image.
    """
    embed = config.embed
    number = BYTES[embed.dtype]
    sizes = {"cls": number, "mean": number, "patches": 2 * patches, "blocks": number * embed.blocks}
    return ABOUT + dim * sum(sizes[name] for name in embed.outputs)


def expected(config: Config, folder: RunFolder, training: bool) -> tuple[str, int, int]:
    """For a dry run: the model's name, the width of its vectors and the patches of an image.

    Args:
        config: the recipe.
        folder: of the run.
        training: a teacher comes first; without `embed.model` it is the model.

    Raises:
        PipelineError: there is no such model.
    """
    model = config.model
    if training and not config.embed.model:
        width = model.dimensions[0]
        if model.encoder != "dinov2":
            from pipeline.train import build

            width = build.pair(config, heads=False).student.backbone.width
        side = (config.embed.image_size or evaluation_size(config)) // model.patch_size
        return "the teacher of this run", width, side**2
    embedder = open_embedder(model_of(config, folder))
    embedder.outputs([], config.embed.outputs, config.embed.blocks)
    rows, columns = embedder.grid
    return embedder.spec.name, embedder.dim, rows * columns
