"""What the embedder fields of `curate` mean: no weights, a run of ours, weights, or ONNX."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config.config import Config
from pipeline.curate.embed.embedders import BACKBONE, DESCRIPTOR, EmbedderSpec, spec_of
from pipeline.curate.embed.onnx_files import is_onnx
from pipeline.errors import DataError, PipelineError
from pipeline.storage.run_folder import fingerprint
from pipeline.train import state
from pipeline.train.start import checkpoint_at, encoder_of
from pipeline.uri import is_uri, public


def embedder_of(config: Config, field: str, value: str) -> EmbedderSpec:
    """The embedder that a field of the recipe names.

    Args:
        config: the recipe, for image size and batch size; its mean and deviation count where the
            weights do not say theirs.
        field: for messages.
        value: `descriptor`, a run folder or a checkpoint in one, weights, or a `.onnx` file.

    Raises:
        PipelineError: there is nothing of that kind.
    """
    curate = config.curate
    if value == DESCRIPTOR:
        return EmbedderSpec()
    saved = None if is_onnx(value) else checkpoint_at(value)
    if saved is not None:
        theirs = encoder_config(saved)
        return EmbedderSpec(
            BACKBONE,
            name=public(value),
            digest=fingerprint([saved.step, saved.meta.get("plan")]),
            load=partial(load_teacher, str(saved.path)),
            image_size=curate.image_size or theirs.augment.global_size,
            mean=theirs.augment.mean,
            std=theirs.augment.std,
            batch_size=curate.batch_size,
        )
    try:
        augment = config.augment
        return spec_of(value, curate.image_size, curate.batch_size, augment.mean, augment.std)
    except PipelineError as error:
        raise DataError(f"{field}={public(value)}: {error.what}", error.hint) from error


def encoder_config(saved: state.Saved) -> Config:
    """The recipe that a checkpoint was trained with."""
    from pipeline.plan.resume import plan_of

    return plan_of(saved.meta, saved.path).config


def load_teacher(checkpoint: str) -> Any:
    """In a task: the teacher's backbone of a checkpoint.

    Raises:
        DataError: it is gone.
    """
    saved = state.at(checkpoint if is_uri(checkpoint) else Path(checkpoint))
    if saved is None:
        raise DataError(f"the checkpoint {public(checkpoint)} is gone", "curate again")
    return encoder_of(saved)[0].backbone.eval()
