"""Who is on a card: the models that were asked for, and the networks that they began as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.card.card import Role
from pipeline.embed.beginnings import (
    at_step_0,
    checkpoint_of,
    computes_in_half,
    start_of,
    trained_on,
)
from pipeline.embed.embedders import EmbedderSpec, embedder_of
from pipeline.errors import ConfigError, PipelineError, StorageError
from pipeline.uri import parent, public


@dataclass(frozen=True)
class Network:
    """One network whose vectors are scored; small, sent to tasks.

    Attributes:
        role: `model`, or which baseline.
        name: for people.
        of: the name of the model that a baseline belongs to, else "".
        spec: how it is opened.
        step: of the checkpoint; 0 for other weights.
        images: that it was trained on; 0: that is not known.
        start: the weights that its training began with; "": random ones, or that is not known.
    """

    role: Role
    name: str
    of: str
    spec: EmbedderSpec
    step: int = 0
    images: int = 0
    start: str = ""

    @property
    def identity(self) -> list[Any]:
        """Changes with the network and with the images that it sees."""
        return [self.role, self.name, self.spec.settings]


@dataclass(frozen=True)
class Opening:
    """How models are opened.

    Attributes:
        image_size: side of the images, pixels; None: the models' own.
        batch_size: images embedded at once.
        mean: of each channel, where a model does not say its own.
        std: likewise.
        runs: the folder in which runs are looked for by their names.
    """

    image_size: int | None
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    runs: str


def networks_of(models: Sequence[str], opening: Opening) -> list[Network]:
    """The models, each followed by what it began as where it is a run's.

    Raises:
        PipelineError: there is no such model, or two names mean the same one.
    """
    networks: list[Network] = []
    digests: dict[str, str] = {}
    for model in models:
        spec = _opened(model, opening)
        if spec.key in digests:
            raise ConfigError(
                f"evaluate.models names one model twice: {digests[spec.key]} and {model}",
                "name each model once",
            )
        digests[spec.key] = model
        networks += _with_beginnings(model, spec)
    return networks


def _opened(model: str, opening: Opening) -> EmbedderSpec:
    try:
        return embedder_of(
            model,
            image_size=opening.image_size,
            batch_size=opening.batch_size,
            mean=opening.mean,
            std=opening.std,
            folder=opening.runs,
        )
    except StorageError:
        raise
    except PipelineError as error:  # several models may be named
        raise ConfigError(f"evaluate.models: {error.what}", error.hint) from error


def _with_beginnings(model: str, spec: EmbedderSpec) -> list[Network]:
    checkpoint = checkpoint_of(spec)
    if not checkpoint:
        return [Network("model", spec.name, "", spec)]
    spec = replace(spec, half=computes_in_half(checkpoint))
    folder, step_name = parent(checkpoint)
    step = int(step_name.partition("-")[2])
    run = parent(folder)[0]
    name = f"{public(_shown(model, str(run)))} (step {step:,})"
    start = start_of(checkpoint)
    trained = Network("model", name, "", spec, step, trained_on(checkpoint), start)
    if not start:
        return [trained, Network("step0", f"{name} at step 0", name, at_step_0(spec))]
    began = Network("init", public(start), name, at_step_0(spec))
    random = Network("untrained", f"{name} untrained", name, at_step_0(spec, untrained=True))
    return [trained, began, random]


def _shown(model: str, run: str) -> str:
    """The run of a model as the user named it: a checkpoint of it is named by the run."""
    return run if "checkpoints" in str(model) else str(model)
