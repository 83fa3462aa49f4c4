"""What the embedder fields of `curate` mean: no weights, a run of ours, weights, timm, or ONNX."""

from __future__ import annotations

from pipeline.config.config import Config
from pipeline.embed import embedders
from pipeline.embed.embedders import EmbedderSpec
from pipeline.errors import DataError, PipelineError
from pipeline.uri import public


def embedder_of(config: Config, field: str, value: str) -> EmbedderSpec:
    """The embedder that a field of the recipe names.

    Args:
        config: the recipe, for image size and batch size; its mean and deviation count where the
            weights do not say theirs.
        field: for messages.
        value: as `pipeline.embed.embedders.embedder_of` takes it.

    Raises:
        PipelineError: there is nothing of that kind.
    """
    curate, augment = config.curate, config.augment
    try:
        return embedders.embedder_of(
            value,
            image_size=curate.image_size,
            batch_size=curate.batch_size,
            mean=augment.mean,
            std=augment.std,
            folder=config.run.folder,
        )
    except PipelineError as error:
        raise DataError(f"{field}={public(value)}: {error.what}", error.hint) from error
