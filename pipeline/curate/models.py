"""What the embedder fields of `curate` mean: no weights, a run of ours, weights, timm, or ONNX."""

from __future__ import annotations

from pipeline.config.config import Config
from pipeline.embed import embedders
from pipeline.embed.embedders import EmbedderSpec
from pipeline.embed.load import at_hand
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.uri import public


def embedder_of(config: Config, field: str, value: str) -> EmbedderSpec:
    """The embedder that a field of the recipe names.

    Args:
        config: the recipe, for image size and batch size; its mean and deviation count where the
            weights do not say theirs.
        field: for messages.
        value: as `pipeline.embed.embedders.embedder_of` takes it.

    Raises:
        PipelineError: there is nothing of that kind, or nothing is named.
    """
    if not value:
        raise ConfigError(*_asked_for(field, at_hand(config.run.folder)))
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


def _asked_for(field: str, models: str) -> tuple[str, str]:
    """What and hint where retrieval or balance have no model to go by."""
    there = f"at hand are {models}" if models else "none is at hand: train on the deduplicated set"
    return (
        f"retrieval and balance go by what an image shows, and {field} names no network that "
        "tells it",
        f"set {field} to a run's folder, weights or an ONNX model ({there}), or to descriptor, "
        "which tells copies only",
    )
